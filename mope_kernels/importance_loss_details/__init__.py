"""Spec, launchers and kernels of `importance_loss`."""
