"""Spec, launchers and kernels of `prompt_attention`."""
