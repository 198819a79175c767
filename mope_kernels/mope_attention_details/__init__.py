"""Spec, launchers and kernels of `mope_attention`."""
