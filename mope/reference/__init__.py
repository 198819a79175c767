"""What users of the released code have: its state dicts, and soon its checkpoints and live models."""

from .encoder import load_reference_encoder

__all__ = ["load_reference_encoder"]
