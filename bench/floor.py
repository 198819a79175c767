"""Measure where a whole model spends its time on the CPU, and its lower bound (floor): `python -m bench.floor --out FOLDER`.

Every operation below autograd, except views, is timed separately, in the released way and in ours, and compared with its floor.
The floor is the larger of two times: its FLOPs at the speed of a large matrix product (with the weight in oneDNN's order or not),
and the bytes of its inputs and outputs at the speed of a copy within the processor's caches, which usually hold the rows of a
layer. Products recomputed in backward do not count toward the floor. The rest of a call, in Python and between operations, has its
own line. Writes floor-<device>.json, which `bench.report` turns into a table; `--tiny` uses a small model.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mope.benchmark import problems, rows, show
from mope.benchmark.cases import Case
from mope.benchmark.measure import Ceilings, Clock, name_of, sample
from mope.fused import prepack

MODEL = "swin-b+bert-base-t32-b4"
# The fastest way to run the released model in each dtype.
RELEASED = {"float32": "released", "bfloat16": "released half"}
CALLS = 3
# Kinds of operations. The first pattern that matches a name determines its kind.
KINDS = {
    "attention": r"attention|bmm|softmax",
    "frozen layers and other products": r"linear|mm\b|convolution",
    "LayerNorm with what is around it": r"norm",
    "copies and concatenations": r"cop(y|ies)|cat|clone|roll|index|fill|zero|contiguous",
    "element by element": r"",
}
REST = "between operations"
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh")


@dataclass
class Share:
    """Count, seconds and floor (least possible seconds) of one kind of operations."""

    count: int = 0
    seconds: float = 0.0
    floor: float = 0.0


class Ledger(TorchDispatchMode):
    """Mode that measures the share of each kind in everything computed while it is active, including backward."""

    def __init__(self, floor: Callable[[float, float, torch.dtype], float]) -> None:
        super().__init__()
        self.floor = floor
        self.shares = {kind: Share() for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and name not in FREE:
            share = self.shares[next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))]
            share.count += 1
            share.seconds += seconds
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            # Tensors written in place are both inputs and outputs.
            moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
            share.floor += self.floor(moved, flops(func, args, kwargs, out), dtype)
        return out


def flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """Return the FLOPs of the products in an operation, two per multiplication."""
    name = func.overloadpacket.__name__
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    if name == "_linear_pointwise":
        return 2.0 * args[0].numel() * out.shape[-1]
    backward = name.endswith("_backward")
    # Scores and outputs; in backward, the gradients of both factors of each.
    products = 4 if backward else 2
    if name.startswith("window_prompt_attention"):
        qkv, _, prompts, _, resolution, window, *_ = args[backward:]
        windows, of_window = max(resolution // window, 1) ** 2, prompts + min(resolution, window) ** 2
        return products * 2.0 * len(qkv) * windows * of_window**2 * qkv.shape[-1] / 3
    if name.startswith(("prompt_attention", "_scaled_dot_product")):
        # In torch's backward, the inputs follow the gradient of the output; in ours, the output and its statistics come between.
        query, key, *rest = args[backward * (1 if name.startswith("_") else 3) :]
        keys = key.shape[-2] + (rest[1].shape[-2] if name.startswith("prompt") else 0)
        return products * 2.0 * query.numel() * keys
    return 0.0


def copy_in_cache(clock: Clock) -> float:
    """Return the bytes read and written per second by a copy of 4 MiB, about the size of the rows of a layer."""
    source = torch.zeros(2**22, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(sample(clock, lambda: target.copy_(source), 0.3)[0])


def products(clock: Clock, plain: dict[str, float]) -> dict[str, float]:
    """Return the FLOPs per second of a large product by dtype: the faster of a plain weight and one in oneDNN's order."""
    found = dict(plain)
    for dtype in filter(prepack.available, prepack.DTYPES):
        layer, x = nn.Linear(1024, 1024, dtype=dtype).requires_grad_(False), torch.randn(1024, 1024).to(dtype)
        rate = 2 * 1024**3 / min(sample(clock, functools.partial(prepack.Prepacked(layer), x), 0.5)[0])
        found[name_of(dtype)] = max(rate, plain[name_of(dtype)])
    return found


def profile(once: Callable[[], Any], clock: Clock, floor: Callable[[float, float, torch.dtype], float]) -> dict[str, Any]:
    """Return "ms", the fastest of a few calls, and "kinds", the shares in the fastest of CALLS calls under a `Ledger`."""
    seconds = min(sample(clock, once, 0.0)[0])
    ledgers = []
    for _ in range(CALLS):
        with Ledger(floor) as ledger:
            once()
        ledgers.append(ledger.shares)
    shares = min(ledgers, key=lambda found: sum(share.seconds for share in found.values()))
    # The ledger slows down Python, but not the operations.
    shares[REST] = Share(0, max(seconds - sum(share.seconds for share in shares.values()), 0.0))
    return {"ms": 1e3 * seconds, "kinds": {kind: asdict(share) for kind, share in shares.items()}}


def measure(cases: Sequence[Case]) -> dict[str, Any]:
    """Return the content of the file: a header with the ceilings, and each case in both ways."""
    device = torch.device("cpu")
    clock, dtypes = Clock.of(device), [torch.bfloat16, torch.float32]
    ceilings, copies = Ceilings.measure(device, dtypes), copy_in_cache(clock)
    matmul = products(clock, ceilings.matmul)

    def floor(moved: float, operations: float, dtype: torch.dtype) -> float:
        return max(moved / max(copies, ceilings.copy), operations / matmul.get(name_of(dtype), math.inf))

    found: dict[str, Any] = {"header": {"stage": "floor"} | rows.header(device), "cases": []}
    found["header"] |= {"date": time.strftime("%Y-%m-%d"), "matmul": matmul, "copy_in_cache": copies}
    for case in cases:
        problem = problems.build(case, device, torch.float32)
        dtype = name_of(problem.dtype)
        ways = {way: profile(problem.prepare(way), clock, floor) for way in (RELEASED[dtype], "ours")}
        found["cases"].append({"case": str(case), "dtype": dtype, "training": case.training, "ways": ways})
        print(table(found["cases"][-1]), flush=True)
    return found


def table(case: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each kind, and the conclusions from it."""
    (released_way, released), (_, ours) = case["ways"].items()
    lines = [("", f"{released_way}, ms", "ours, ms", "operations", "floor of ours, ms"), (":--", *("--:",) * 4)]
    for kind, share in ours["kinds"].items():
        times = (1e3 * way["kinds"][kind]["seconds"] for way in (released, ours))
        least = show.digits(1e3 * share["floor"], 3) if share["floor"] else ""
        lines.append((kind, *(show.digits(t, 3) for t in times), str(share["count"] or ""), least))
    total = sum(share["floor"] for share in ours["kinds"].values())
    lines.append(("all", *(show.digits(way["ms"], 3) for way in (released, ours)), "", show.digits(1e3 * total, 3)))
    products = ours["kinds"]["frozen layers and other products"]["floor"]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\nOurs is {show.digits(released['ms'] / ours['ms'], 3)} times as fast as {released_way}; at the floor it would be "
        f"{show.digits(released['ms'] / (1e3 * total), 3)} times as fast, or {show.digits(released['ms'] / (1e3 * products), 3)} "
        "times if everything except frozen layers and other products took no time.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to check that it works")
    options = parser.parse_args(arguments)
    shape = "tiny-swin" if options.tiny else MODEL
    cases = [Case("model", shape, graphs=False), Case("model", shape, dtype="bfloat16", graphs=False)]
    found = measure([*cases, Case("model", shape, training=True, graphs=False)])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"floor-{'dry' if options.tiny else rows.slug(torch.device('cpu'))}.json"
    path.write_text(json.dumps(found) + "\n")
    print(path)


if __name__ == "__main__":
    main()
