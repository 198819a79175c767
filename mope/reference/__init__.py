"""What users of the released code have: its state dicts and checkpoints."""

from .checkpoint import ReferenceCheckpoint, read_reference_checkpoint
from .encoder import load_reference_encoder

__all__ = ["ReferenceCheckpoint", "load_reference_encoder", "read_reference_checkpoint"]
