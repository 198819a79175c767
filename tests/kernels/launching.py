"""Launch the variants that are compiled ahead of time, with other sizes where a test gives them."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from mope_kernels import aot
from mope_kernels._triton import record_launches
from mope_kernels.spec import SPECS


def launch(op: str, label: str, wanted: tuple[str, ...] | None = None, **sizes: Any) -> None:
    """Launch the variant of an op with this label. `wanted` overrides which tensors get gradients."""
    spec = SPECS[op]
    # If any variant with this label has gradients, the last one does.
    variant = [variant for variant in spec.variants(False) if variant.label == label][-1]
    if "lengths" in variant.sizes:
        batch, keys = (sizes.get(name, variant.sizes[name]) for name in ("batch", "keys"))
        sizes["lengths"] = [keys] * batch
    aot.launch(spec, variant._replace(sizes=variant.sizes | sizes, wanted=variant.wanted if wanted is None else wanted))


def launches(op: str, label: str, **changes: Any) -> list[Any]:
    """Run `launch` and return its launches as (kernel, arguments, constants and options)."""
    with FakeTensorMode(), record_launches() as found:
        launch(op, label, **changes)
    return found
