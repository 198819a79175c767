"""Frozen encoders with prompts."""
