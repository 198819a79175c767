"""What each kind of input is: how a batch names it, how raw items are read and collated, how it is checked."""

from . import text, vision
from .reading import DataError, Finder, Padding, Reader, Source, UnreadableError
from .registry import (
    Modality,
    Slot,
    complementary_of,
    find_modality,
    known,
    register_modality,
    slots_of,
    unregister_modality,
)

__all__ = [
    "DataError",
    "Finder",
    "Modality",
    "Padding",
    "Reader",
    "Slot",
    "Source",
    "UnreadableError",
    "complementary_of",
    "find_modality",
    "known",
    "register_modality",
    "slots_of",
    "text",
    "unregister_modality",
    "vision",
]
