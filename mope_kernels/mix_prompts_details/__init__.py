"""Spec, launchers and kernels of `mix_prompts`."""
