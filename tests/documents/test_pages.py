"""Every Python and shell block of README.md and docs/ runs, in order, page by page, with small models in place of large ones."""

from __future__ import annotations

import copy
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import mope.demo.export
import mope.modex
from mope import cli
from mope.benchmark import run as benchmark
from mope.modalities import registry
from tests.bench.small import tiny_cases
from tests.released.stand_in_swin import PromptedSwin, VisionClassifier

from . import page, stand_ins

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [path for path in PAGES if any(block.runs for block in page.blocks(path.read_text()))]
# The slowest blocks outside the README.
SLOW = ("demo.md", "training.md")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    stand_ins.write_hub(cache)
    return cache


@pytest.fixture
def folder(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a folder with only the files that pages assume, and shorten everything that would take minutes."""
    monkeypatch.chdir(tmp_path)
    # Modalities that a page registers are removed after it.
    monkeypatch.setattr(registry, "_MODALITIES", dict(registry.known()))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stand_ins.write_files(tmp_path)
    monkeypatch.setattr(mope.demo.export, "export", functools.partial(mope.demo.export.export, draws=1))
    monkeypatch.setattr(mope.modex, "AlbefConfig", stand_ins.albef_config)
    monkeypatch.setattr(benchmark, "cases", tiny_cases)
    monkeypatch.setattr(benchmark, "ROUNDS_SECONDS", {True: 0.01, False: 0.01})
    monkeypatch.setattr(benchmark, "cold_start", lambda device: [1.0, 2.0, 3.0])
    # Inductor takes minutes and has its own tests.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return tmp_path


def shortened(arguments: list[str]) -> list[str]:
    """Return the same command with only a few training steps."""
    command = arguments[0]
    if command == "demo" and "--export" not in arguments:
        arguments = ["2" if before == "--seeds" else word for before, word in zip(["", *arguments], arguments, strict=False)]
        return [*(word for word in arguments if word != "--fast"), "--fast"]
    return [*arguments, "--max-steps", "2"] if command == "train" else arguments


def call_mope(arguments: list[str]) -> None:
    arguments = shortened(arguments)
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert not status, f"mope {shlex.join(arguments)} exits with {status}"


def call_torchrun(arguments: list[str]) -> None:
    at = arguments.index("mope.cli") + 1
    command = [*arguments[:at], *shortened(arguments[at:]), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def call_make(arguments: list[str]) -> None:
    """Only check that the target exists; `make test` would run this test again."""
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TOOLS: dict[str, page.Tool] = {"mope": call_mope, "torchrun": call_torchrun, "make": call_make}


def of_the_released_code() -> dict[str, Any]:
    """Return the objects that a page takes from the released code: image encoder, classifier, inputs."""
    torch.manual_seed(0)
    encoder = PromptedSwin(32, (2, 2, 2, 2), (4, 8, 16, 32), num_experts=4, prompt_length=2, image_size=224).eval()
    return {
        "encoder": encoder,
        "images": torch.randn(2, 3, 224, 224),
        "psi": torch.randn(2, 768),
        "live_model": VisionClassifier(copy.deepcopy(encoder)),
    }


# Names that each page assumes.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {"README.md": of_the_released_code, "migrate.md": of_the_released_code}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name, marks=pytest.mark.slow if path.name in SLOW else ()) for path in RUN]
)
@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_page_runs(path: Path, folder: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert page.run(path, TOOLS, GIVEN.get(path.name, dict)()) == sum(block.runs for block in page.blocks(path.read_text()))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_what_is_not_run_says_why(path: Path) -> None:
    """Every block has a language, and one that is not run has a known reason or names the test that covers it."""
    for block in page.blocks(path.read_text()):
        where = f"{path.name}:{block.line}: {block.info}"
        assert block.language in page.LANGUAGES, where
        assert bool(block.info) == bool(block.not_run), where
        if block.not_run is None or block.not_run in page.REASONS:
            continue
        before, tested_by, tests = block.not_run.partition("tested by ")
        assert not before and tested_by, where
        for name in tests.split(", "):
            assert (ROOT / name).is_file(), where


GOOD = """
```python
x = 1
```

```sh
A="b  c"
mope $A "d  e" \\
    f  # g
```

```python
print(x)
```

```text
1
```
"""


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    """Names persist between blocks, and the output, exit status and calls of a block are checked against the page."""
    said: list[list[str]] = []
    tools: dict[str, page.Tool] = {"mope": said.append}
    path = tmp_path / "page.md"
    path.write_text(GOOD)
    assert page.run(path, tools, {}) == 3
    assert said == [["b", "c", "d  e", "f"]]
    for old, new in (("x = 1", "y = 1"), ("\n1\n", "\n2\n"), ("mope $A", "other $A"), ("$A", "$B")):
        path.write_text(GOOD.replace(old, new))
        with pytest.raises((NameError, AssertionError)):
            page.run(path, tools, {})
    path.write_text(GOOD.replace("```python\nx", '```python not-run="needs a GPU"\nx'))
    with pytest.raises(NameError) as raised:
        page.run(path, tools, {})
    assert raised.value.__notes__ == ["in the block at page.md:13"]
