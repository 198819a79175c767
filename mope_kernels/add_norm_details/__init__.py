"""Spec, launchers and kernels of `add_norm`."""
