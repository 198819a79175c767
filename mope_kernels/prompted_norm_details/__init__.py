"""Spec, launchers and kernels of `prompted_norm`."""
