"""Spec, launchers and kernels of `route`."""
