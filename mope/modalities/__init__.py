"""Modalities: how a batch names their inputs, and how raw items are read, collated and checked."""

from . import text, vision
from .reading import DataError, Finder, Padding, Reader, Source, UnreadableError
from .registry import (
    Modality,
    Slot,
    complementary_of,
    find_modality,
    is_argument,
    known,
    register_modality,
    slots_of,
    unregister_modality,
)
from .text import Text
from .vision import Vision

__all__ = [
    "DataError",
    "Finder",
    "Modality",
    "Padding",
    "Reader",
    "Slot",
    "Source",
    "Text",
    "UnreadableError",
    "Vision",
    "complementary_of",
    "find_modality",
    "is_argument",
    "known",
    "register_modality",
    "slots_of",
    "text",
    "unregister_modality",
    "vision",
]
