"""`mope predict`: a trained model and a file of any size -> a file of predictions."""

from .command import add_predict

__all__ = ["add_predict"]
