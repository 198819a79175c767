"""`mope predict`: classify the rows of a file of any size with a trained model."""

from .command import add_predict

__all__ = ["add_predict"]
