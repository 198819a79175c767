"""Configurations: every table is complete and names its source, keys do not depend on the batch, and tuning stores the winners."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from mope_kernels import aot, configs
from mope_kernels._triton import compiling_for
from mope_kernels.configs import tuning
from mope_kernels.impl import interpreting
from mope_kernels.prompt_attention_details.spec import HEAD_DIMS
from mope_kernels.spec import SPECS
from tests.environment import setenv

from .launching import launches

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
CPU = torch.device("cpu")
OPS = ("gelu_mlp", "prompt_attention", "window_prompt_attention")


@pytest.mark.parametrize("op", OPS)
def test_tables_say_where_they_come_from(op):
    tables = importlib.import_module(f"mope_kernels.configs.{op}").TABLES
    assert "default" in tables
    for name, table in tables.items():
        assert "compiled" in table.provenance or "timed on" in table.provenance
        assert configs.family(name) == name
        # The entries of a family override default ones.
        assert table.entries.keys() <= tables["default"].entries.keys()


def test_ways_say_that_nobody_measured_them():
    tables = importlib.import_module("mope_kernels.configs.gelu_mlp").WAY_TABLES
    ways = importlib.import_module("mope_kernels.configs.gelu_mlp").WAYS
    for name, table in tables.items():
        assert configs.PREDICTED in table.provenance or "timed on" in table.provenance
        assert configs.family(name) == name and set(table.entries.values()) <= set(ways)
    for arch, dtype, width in product(("sm_80", "sm_90", "gfx942", "sm_120"), ("half", "float"), (1, 767, 768, 1 << 20)):
        with compiling_for(arch):
            wide = (arch, dtype) == ("sm_90", "half") and width >= 768
            assert configs.find_way("gelu_mlp", (dtype, width), CPU) == ("cublas" if wide else "triton")


@pytest.mark.parametrize("arch", aot.DEFAULT_ARCHITECTURES)
def test_every_head_has_a_configuration(arch):
    with compiling_for(arch):
        for dtype, head_dim in product(("half", "float"), HEAD_DIMS):
            for kernel, rows in product(("forward", "gradient"), (16, 64, 256)):
                assert min(configs.find("window_prompt_attention", (dtype, head_dim, kernel, rows), CPU)[:2]) >= 16
            for scores, kernel in product(
                {"half": ("plain", "dropped", "biased"), "float": ("plain", "masked")}[dtype],
                ("forward", "query_gradient", "key_gradient"),
            ):
                assert min(configs.find("prompt_attention", (dtype, scores, head_dim, kernel), CPU)[:2]) >= 16


def test_a_family_comes_before_the_default():
    key = ("half", 32, "gradient", 64)
    with compiling_for("sm_90"):
        on_nvidia = configs.find("gelu_mlp", ("half",), CPU)
        assert configs.find("window_prompt_attention", ("half", 17, "gradient", 33), CPU).queries == 64
    with compiling_for("sm_100"):
        assert configs.find("gelu_mlp", ("half",), CPU) == on_nvidia._replace(maxnreg=255)
    with compiling_for("gfx950"):
        assert configs.find("window_prompt_attention", key, CPU).num_warps == 4
    with pytest.raises(KeyError, match="gelu_mlp has no configuration for"):
        configs.find("gelu_mlp", ("double",), CPU)


# The first variant of each op, and variants that use other kernels.
LAUNCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{op: (op, next(iter(spec.variants(False))).label, {}) for op, spec in SPECS.items()},
    "prompt_attention packed": ("prompt_attention", "bf16 D=64 packed=True", {}),
    "window_prompt_attention trained bias": ("window_prompt_attention", "bf16 D=32 trained_bias=True", {"prompts": 33}),
    "add_norm trained": ("add_norm", "bf16 C=512 trained=True", {"width": 128}),
    "gelu_mlp by cuBLAS": ("gelu_mlp", "bf16 C=1024 way=cublas", {"width": 128}),
}


@needs_triton
@pytest.mark.skipif(interpreting(), reason="interpreted kernels have no specialisations")
@pytest.mark.parametrize("case", LAUNCHES)
def test_another_batch_compiles_nothing_new(case):
    op, label, sizes = LAUNCHES[case]

    def compiled(batch: int) -> dict[str, list[Any]]:
        found = defaultdict(list)
        for launch in launches(op, label, **SPECS[op].of_items(batch), **sizes):
            found[launch[0].__name__].append(vars(aot.Specialization.of(*launch)))
        return found

    of_few = compiled(1)
    assert of_few
    for batch in (3, 16, 64, 1000):
        for kernel, specialisations in compiled(batch).items():
            # Large batches are not split, so the kernel that sums the parts is missing.
            assert all(s in of_few[kernel] for s in specialisations), f"{kernel} for {batch} items"


class Sizes(NamedTuple):
    rows: int
    num_warps: int
    num_stages: int


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Return a launcher that returns its configuration, using a fresh tuner that stores in `tmp_path`, and the timed ones."""
    setenv(monkeypatch, "MOPE_AUTOTUNE", "1")
    setenv(monkeypatch, "MOPE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "_read", set())
    timed: list[Sizes] = []

    def clock(run: Callable[[], Sizes]) -> float:
        timed.append(run())
        # Two configurations are equally fast.
        return 1.0 if timed[-1] in (Sizes(64, 4, 1), Sizes(64, 4, 3)) else 2.0

    monkeypatch.setattr(tuning, "clock", clock)

    def ask(name: str) -> Sizes:
        found = tuning.instead_of(Sizes(64, 4, 2), "op", (name, 32), CPU)
        if found.rows == 128:
            raise RuntimeError("out of resource: shared memory")
        return found

    return tuning.tunable(ask), timed


@needs_triton
def test_tuning_times_once_and_keeps_the_first_of_the_fastest(tuned, monkeypatch, tmp_path):
    launcher, timed = tuned
    assert launcher("a") == Sizes(64, 4, 1)
    # Configurations that fail to run are not timed.
    assert timed == [Sizes(64, 4, 2), Sizes(32, 4, 2), Sizes(64, 2, 2), Sizes(64, 8, 2), Sizes(64, 4, 1), Sizes(64, 4, 3)]
    timed.clear()
    assert launcher("a") == Sizes(64, 4, 1) and not timed
    assert launcher("b") == Sizes(64, 4, 1) and len(timed) == 6
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"op a 32": [64, 4, 1], "op b 32": [64, 4, 1]}

    # As in another process.
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "_read", set())
    timed.clear()
    assert launcher("b") == Sizes(64, 4, 1) and not timed

    setenv(monkeypatch, "MOPE_AUTOTUNE", "0")
    assert launcher("b") == Sizes(64, 4, 2)


@needs_triton
def test_nothing_is_timed_in_a_capture(tuned, monkeypatch, tmp_path):
    launcher, timed = tuned
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert launcher("a") == Sizes(64, 4, 2) and not timed and not list(tmp_path.iterdir())
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    launcher("a")
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert launcher("a") == Sizes(64, 4, 1)


@needs_triton
def test_a_broken_file_is_named(tuned, tmp_path):
    launcher, _ = tuned
    launcher("a")
    (file,) = tmp_path.iterdir()
    file.write_text("[")
    tuning._read.clear()
    with pytest.raises(ValueError, match=f"{file.name} does not hold the configurations"):
        launcher("a")
