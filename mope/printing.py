"""Describe tensors and long lists in one line. The command line uses this too, so torch is imported only when needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def short(value: Any) -> str:
    """Describe a value: a scalar tensor by its value, other tensors by shape, `Routing`s by the number of blocks and experts."""
    from torch import Tensor

    if isinstance(value, Tensor):
        # Fake and meta tensors have no values.
        return (
            f"{value.item():.4g}" if value.dim() == 0 and type(value) is Tensor and not value.is_meta else str(tuple(value.shape))
        )
    if isinstance(value, Sequence) and value and hasattr(value[0], "probs"):
        taken, experts = value[0].weights.shape[-1], value[0].probs.shape[-1]
        selected = f"{taken} of {experts}" if taken < experts else f"all {experts}"
        return f"{len(value)} block{'s' if len(value) > 1 else ''}, {selected} experts"
    return str(value)


def describe_output(output: Any) -> str:
    """Describe a model output for `__repr__`: class, fields that are not None, dtype and device of the logits."""
    fields = [f"{name}: {short(value)}" for name, value in output.items()]
    logits = output.logits
    where = [] if logits is None else [f"{str(logits.dtype).removeprefix('torch.')} on {logits.device}"]
    return f"{type(output).__name__}({'; '.join([*fields, *where])})"


def first_of(items: Sequence[str], limit: int, separator: str = "; ") -> str:
    """Join the first items, and say how many more there are."""
    rest = len(items) - limit
    return separator.join(items[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


def ranked(names: Sequence[str], probabilities: Tensor, limit: int = 5) -> str:
    """Return the most probable names with their probabilities, and the number of other names."""
    values, order = probabilities.topk(min(limit, len(names)))
    found = [f"{names[i]} {value:.2f}" for i, value in zip(order.tolist(), values.tolist(), strict=True)]
    return ", ".join([*found, *([f"{rest} more"] if (rest := len(names) - limit) > 0 else [])])
