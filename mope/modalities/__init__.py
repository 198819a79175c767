"""What each kind of input is: how a batch names it, how raw items are read and collated, how it is checked."""

from . import text, vision
from .registry import Modality, Slot, find_modality, known, register_modality, unregister_modality

__all__ = ["Modality", "Slot", "find_modality", "known", "register_modality", "text", "unregister_modality", "vision"]
