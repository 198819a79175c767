"""List what the headline of `make gpu` measures, most informative rows first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from mope.benchmark.cases import BENCHMARKS, WITH_OPTIMIZER, Case, cases, is_compiled

GRAPHS = "released without waiting compiled+graphs"
WINDOW_WAYS = ("ours", "cat+sdpa", "cat+sdpa efficient", "cat+sdpa cudnn")
ATTENTION_WAYS = ("ours", "cat+sdpa", "cat+sdpa flash", "cat+sdpa efficient", "cat+sdpa cudnn")
# For inference and for training. The three additional ways with graphs come last, when the other rows are already stored. Each
# costs a few calls for recording, its own rounds and the alternating rounds of ours. Their time on a GPU is not known yet.
RECORDED_WAYS = ("ours graphed", f"ours graphed{WITH_OPTIMIZER}", "released without waiting graphed")
MODEL_WAYS = {
    False: ("ours", "ours without graphs", "released", "released half"),
    True: ("ours", "released", "released half", *RECORDED_WAYS, f"released without waiting graphed{WITH_OPTIMIZER}"),
}
COMPILED_WAYS = {False: (GRAPHS,), True: (GRAPHS, "ours compiled+graphs", "released without waiting compiled")}
WINDOWS = [f"swin-b-stage{stage}-b64" for stage in ("1", "1-shifted", "2-shifted", "3-shifted", "4")]
WINDOWS += [f"swin-b-stage{stage}-b16" for stage in ("1-shifted", "3-shifted")]
MODEL = "swin-b+bert-base-b{}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Ways of a case to measure in one separate process.

    stage: selects the file of the rows. limit: seconds for all ways. beside: compile them concurrently with earlier steps.
    """

    case: Case
    ways: tuple[str, ...]
    stage: str
    limit: float
    beside: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case}" + (f", {self.ways[0]}" if self.beside else "")


def plan(dry: bool = False) -> list[Rows]:
    """Return the rows in measuring order; with `dry`, only the first of each kind, on a small case."""
    found = []
    for shape in WINDOWS:
        found += [Rows(Case("window_prompt_attention", shape, training), WINDOW_WAYS, "ops", 20) for training in (False, True)]
    for batch, training in ((64, False), (16, False), (16, True), (64, True)):
        found.append(Rows(Case("model", MODEL.format(batch), training), MODEL_WAYS[training], "model", 90 if training else 75))
    for training in (False, True):
        for way in COMPILED_WAYS[training]:
            found.append(Rows(Case("model", MODEL.format(16), training), (way,), "model", 60, beside=True))
    for shape in ("vit-b-b64", "bert-128-b64", "bert-512-b64", "vit-l-b64"):
        found.append(Rows(Case("mope_attention", shape), ATTENTION_WAYS, "ops", 25))
    for shape in ("vit-b-b64", "vit-b-b64-k64"):
        found.append(Rows(Case("mope_attention", shape, top_k=1), ("ours",), "ops", 20))
    for shape in ("swin-b-stage3-b64", "swin-b-stage1-b64", "swin-b-stage3-b16"):
        found.append(Rows(Case("prompted_norm", shape), ("ours", "released", "branchless"), "ops", 20))
    for training in (False, True):
        found.append(Rows(Case("expert_adapter", "modex-t8k", training), ("ours", "released"), "ops", 20))
    # Every way of ours for every shape in the tuning table. There are many, so they come last.
    for case in cases("gelu_mlp", "cuda"):
        found.append(Rows(case, tuple(way for way in case.ways if not is_compiled(way)), "ops", 20))
    return list(_small(found)) if dry else found


def _small(planned: Sequence[Rows]) -> Iterator[Rows]:
    seen = set()
    for rows in planned:
        tiny = [case.shape for case in cases(rows.case.op, "tiny")]
        shape = next((name for name in tiny if ("swin" in name) == ("swin" in rows.case.shape)), tiny[0])
        small = dataclasses.replace(rows, case=dataclasses.replace(rows.case, shape=shape))
        if (small.name, small.ways) not in seen:
            seen.add((small.name, small.ways))
            yield small


def smoke(dry: bool = False) -> dict[str, list[Case]]:
    """Return small cases of each op in both dtypes, forward and backward."""
    return {
        op: [
            dataclasses.replace(small, shape=cases(op, "tiny")[0].shape if dry else small.shape, training=training, dtype=dtype)
            for dtype in ("bfloat16", "float32")
            for training in (False, True)
        ]
        for op, found in BENCHMARKS.items()
        if (small := found.smoke)
    }


def with_dtypes(dry: bool = False) -> list[tuple[Case, str]]:
    """Return every case that runs our kernels on a GPU, with its dtype."""
    found = [rows.case for rows in plan(dry)] + [case for of_op in smoke(dry).values() for case in of_op]
    return list(dict.fromkeys((case, case.dtype or "bfloat16") for case in found))
