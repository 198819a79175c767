"""The demo's questions, answered by a small ALBEF-shaped fusion model with ModeX adapters."""
