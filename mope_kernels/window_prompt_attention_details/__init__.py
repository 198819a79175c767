"""Spec, launchers and kernels of `window_prompt_attention`."""
