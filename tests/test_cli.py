"""The command line, called as by a user."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mope_kernels
from mope import cli
from mope.extras import EXTRAS, install
from mope_kernels import _extension
from mope_kernels.impl import _OPERATIONS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mope.cli", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["predict", "--help"],
        ["info", "--help"],
        ["bench", "--help"],
        ["build", "--help"],
    ],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "usage: mope" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--seeds", "0"], ["demo", "--threads", "many"], ["bench", "--slow"]])
def test_wrong_arguments_exit_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: mope" in capsys.readouterr().err


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line printed by a call that the parser refuses."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


REQUIRED = {
    "train": ["--data", "data", "--out", "out"],
    "evaluate": ["model", "--data", "data"],
    "predict": ["model", "data.csv", "--out", "out.csv"],
    "routes": ["model", "--data", "data"],
    "convert": ["last.ckpt", "last.safetensors"],
}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(rf"mope {re.escape(mope_kernels.__version__)}( \([0-9a-f]+\+?\))?\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["demo", "bench", "train", "evaluate", "routes", "run"])
@pytest.mark.parametrize(
    ("device", "reason"),
    [("gpu", "there is no gpu here"), ("cuda:99", "there is no cuda:99 here"), ("meta", "meta holds shapes and no numbers")],
)
def test_a_device_that_computes_nothing_is_refused(
    command: str, device: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--device", device, *REQUIRED.get(command, ["main.py"] if command == "run" else [])]
    assert f"mope {command}: error: argument --device: {reason}" in refusal(arguments, capsys)


def test_every_option_that_is_misspelt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0
    for command, parser in subcommands().items():
        # Arguments after the name of a script belong to the script.
        required = [] if command == "run" else REQUIRED.get(command, [])
        for option in (option for action in parser._actions for option in action.option_strings if len(option) > 5):
            wrong = option[:4] + option[5:]
            if any(other.startswith(wrong) for other in parser._option_string_actions):
                continue
            said = refusal([command, *required, wrong], capsys)
            assert said.startswith(f"mope {command}: error: ")
            assert option in said.partition("did you mean ")[2], (command, wrong, said)
            tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", *REQUIRED["train"], "--lr", "1e-3"], "did you mean --vision-lr or --text-lr?"),
        (["train", *REQUIRED["train"], "--batch_size=4"], "did you mean --batch-size?"),
        (["train", "--dta", "data", "--out", "out"], "did you mean --data?"),
        (["train", *REQUIRED["train"], "--num-experts=16"], "did you mean --set num_experts=16?"),
        (["train", *REQUIRED["train"], "--bottleneck", "8"], "did you mean --set bottleneck=...?"),
        (["train", *REQUIRED["train"], "--format", "mmimdb"], "did you mean mm-imdb?"),
        (["routes", *REQUIRED["routes"], "--format", "food-101"], "did you mean food101?"),
        (["demo", "--gpu"], "did you mean --device?"),
        (["trian"], "did you mean train?"),
        (["--verison"], "did you mean --version?"),
    ],
)
def test_what_was_meant_is_suggested(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(arguments, capsys).endswith(f"; {hint}")


def test_nothing_is_suggested_where_nothing_is_alike(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(["train", *REQUIRED["train"], "--sunshine"], capsys)
    assert said == "mope train: error: unrecognized arguments: --sunshine"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mope.cli; mope.cli.parser().format_help(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_info_says_what_runs_and_why_the_rest_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from mope.fused import prepack

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    status = _extension.status()
    assert (str(status.path) if status.loaded else status.reason) in text
    for op in _OPERATIONS:
        assert f"{op}: " in text
    assert "mix_prompts: " + ("cpu" if status.loaded else "reference") + " would run" in text
    assert not status.loaded or f"for {status.target}: " in text
    assert ("puts frozen layers of float32" in text) is prepack.available(torch.float32)
    assert "What differs from that on cpu in bfloat16:\n" in text
    assert "Triton" in text


def test_info_examples_are_valid_calls() -> None:
    import torch

    from mope.info import examples

    for dtype in (torch.float32, torch.bfloat16):
        for op, (args, kwargs) in examples(torch.device("cpu"), dtype).items():
            getattr(mope_kernels, op)(*args, **kwargs, impl="reference")


def test_info_without_the_extension_says_why() -> None:
    answer = run("info", MOPE_DISABLE_EXTENSION="1")
    assert answer.returncode == 0, answer.stderr
    assert "switched off by MOPE_DISABLE_EXTENSION" in answer.stdout
    assert "mix_prompts: reference would run" in answer.stdout


def test_build_without_a_compiler_fails_and_says_why(tmp_path: Path) -> None:
    answer = run("build", "--force", PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr.startswith("mope build: ")
    assert "compiler" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("command", "module", "package", "extras"),
    [
        ("demo", "sklearn", "scikit-learn", ("train", "plot")),
        ("train", "accelerate", "accelerate", ("train",)),
        ("evaluate", "PIL", "pillow", ("train",)),
        ("routes", "matplotlib", "matplotlib", ("train", "plot")),
        ("routes", "jinja2", "jinja2", ("train", "plot")),
    ],
)
def test_a_command_without_its_extras_says_what_to_install(
    command: str,
    module: str,
    package: str,
    extras: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main([command, *REQUIRED.get(command, [])]) == 1
    said = capsys.readouterr().err
    assert said == f"mope {command}: {package} is needed: {install(*extras)}\n" and package in said.partition("pip install")[2]


def test_the_packages_that_are_named_are_those_of_the_extras() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {extra: tuple(project["optional-dependencies"][extra]) for extra in EXTRAS} == EXTRAS
