"""Spec, launchers and kernels of `expert_adapter`."""
