"""What users of the released code have: its state dicts, checkpoints and live models."""

from .accelerate import Acceleration, accelerate
from .checkpoint import ReferenceCheckpoint, read_reference_checkpoint
from .encoder import load_reference_encoder
from .loading import load_reference_checkpoint

__all__ = [
    "Acceleration",
    "ReferenceCheckpoint",
    "accelerate",
    "load_reference_checkpoint",
    "load_reference_encoder",
    "read_reference_checkpoint",
]
