"""Encoders with prompts, run layer by layer or in windows."""
