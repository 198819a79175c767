"""Spec, launchers and kernels of `gelu_mlp`."""
