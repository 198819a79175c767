"""Data of the user: files on disk, examples, batches and cached features."""

from mope.modalities import DataError
from mope.modalities.vision import published_image_processor

from .augment import RandAugment
from .examples import Collator, Examples, check_classes
from .features import FeatureCache, cached_features
from .formats import FORMATS, Example, Split, read_split
from .holding_out import hold_out

__all__ = [
    "FORMATS",
    "Collator",
    "DataError",
    "Example",
    "Examples",
    "FeatureCache",
    "RandAugment",
    "Split",
    "cached_features",
    "check_classes",
    "hold_out",
    "published_image_processor",
    "read_split",
]
