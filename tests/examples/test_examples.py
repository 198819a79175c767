"""The scripts and the notebook in `examples/` run offline and print what they should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
# Patterns of the expected output of each script. The numbers are checked in `check`.
PRINTED = {
    "bring_your_encoder.py": r"largest difference from transformers: (?P<small>[\d.e-]+)\n(.*\n)*step 30: loss (?P<loss>[\d.]+)",
    "many_tasks.py": r"does it hold\?  the digit is a seven  -> yes (.*\n)+is it wrong\?   the digit is even     -> wrong",
    "modex_on_clip.py": r"unchanged at the start: True\n(.*\n)*step 40: loss (?P<loss>[\d.]+)\n(.*\n)*"
    r"unchanged after detaching: True\n.*again: True",
    "plain_loop.py": r"step 60: loss (?P<loss>[\d.]+), accuracy 1.00",
    "released_checkpoint.py": r"released: .* differ by (?P<large>[\d.e-]+)\ninstance: .* differ by (?P<small>[\d.e-]+)\nsaved to",
    "train_your_data.py": r"best accuracy on dev: 0\.\d+\n(.*\n)*predictions for the first four of dev: \[('(yes|no)'(, )?){4}\]",
    "two_processes.py": r"step 20: loss [\d.]+ in 2 processes\nsame weights everywhere: True",
}


def run(script: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A script that hangs fails here instead of blocking the run.
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def check(script: str, printed: str) -> None:
    found = re.search(PRINTED[script], printed)
    assert found, printed
    for name, value in found.groupdict().items():
        if name == "loss":
            assert float(value) < 0.3
        else:
            assert (float(value) < 1e-4) == (name == "small"), printed


def test_every_script_is_short_listed_and_tested() -> None:
    assert [*PRINTED] == SCRIPTS
    table = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f"]({path.name})" in table
        assert len(path.read_text().splitlines()) < 100 or path.suffix == ".ipynb", path.name


@pytest.mark.parametrize("script", ["bring_your_encoder.py", "many_tasks.py", "modex_on_clip.py", "plain_loop.py"])
def test_it_runs(script: str) -> None:
    check(script, run(script))


def test_training_on_data_runs(tmp_path: Path) -> None:
    check("train_your_data.py", run("train_your_data.py", "--epochs", "1", "--out", str(tmp_path)))


def test_two_processes_run() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    check("two_processes.py", run("two_processes.py", launcher=launcher))


def test_a_released_checkpoint_is_opened(
    backbones: tuple[torch.nn.Module, torch.nn.Module], released_checkpoint: Path, tmp_path: Path
) -> None:
    for model, name in zip(backbones, ("vision", "text"), strict=True):
        model.save_pretrained(tmp_path / name)
    arguments = (str(released_checkpoint), "--vision", str(tmp_path / "vision"), "--text", str(tmp_path / "text"))
    check("released_checkpoint.py", run("released_checkpoint.py", *arguments, "--out", str(tmp_path / "out")))
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "routing.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]), (
        "commit the notebook with its outputs, so that readers see them without running it"
    )
    script = tmp_path / "routing.py"
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join("".join(cell["source"]) + "\n" for cell in cells))
    printed = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert printed.returncode == 0, printed.stderr
    assert re.search(r"the digit is a seven +yes +0\.9\d", printed.stdout) and "of 10" in printed.stdout
