"""`mope train` with missing or unsuitable input: one line names the problem, and no partial output remains."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessorPil

from mope import cli
from mope.data import DataError, read_split
from mope.data.formats import NoLabelsError
from mope.files import write_text
from mope.training import Recipe, TrainingRun
from mope.training.trainer import last_checkpoint
from tests.training.brightness import make_model, read_splits, write_data, write_encoders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(write_data(tmp_path_factory.mktemp("data")))


def command(data: Path, out: Path, *more: str) -> list[str]:
    encoders = ["--vision", str(data / "vision"), "--text", str(data / "text"), "--device", "cpu", "--epochs", "2"]
    return ["train", "--data", str(data), "--out", str(out), "--batch-size", "8", *encoders, *more]


class Usage(NamedTuple):
    """Disk usage of a full disk."""

    free: int = 0


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.files.shutil.disk_usage", lambda _: Usage())


def test_experts_that_fit_nowhere(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, tmp_path / "out", "--set", "num_experts=100000000000")) == 1
    said = capsys.readouterr().err
    assert (
        "mope train: no memory for what MoPEConfig adds to the encoders" in said and "num_experts=100000000000; reduce them" in said
    )


def test_memory_that_ends_in_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("mope.training.trainer.FusionTrainer.compute_loss", fails)
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")
    assert cli.main(command(data, tmp_path / "a")) == 1
    said = capsys.readouterr().err
    assert "mope train: out of memory: CUDA out of memory. Tried to allocate 2 GiB.; use a smaller --batch-size" in said
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(command(data, tmp_path / "b"))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 12, "width": 8}),
        ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ],
    ids=["another size", "other channels"],
)
def test_an_image_processor_of_another_encoder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processor: Any
) -> None:
    """The error comes before training."""
    processor.save_pretrained(tmp_path / "processor")
    out = tmp_path / "out"
    assert cli.main(command(data, out, "--image-processor", str(tmp_path / "processor"))) == 1
    said = capsys.readouterr()
    assert "mope train: the first training example, 'train-0'" in said.err and "does not go through the model: " in said.err
    assert (
        "(--image-processor, --tokenizer)" in said.err and "trained parameters" not in said.out and not (out / "run.json").exists()
    )


def test_the_first_example_changes_no_random_number(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(out: Path) -> dict[str, Any]:
        splits = read_splits(data)
        model = make_model(splits, noise_std=0.1, prompt_dropout=0.2)
        run = TrainingRun(model, splits, Recipe(epochs=1, batch_size=8), out, device="cpu", progress=False)
        assert model.training
        return run.train()["test"]

    expected = result(tmp_path / "a")
    monkeypatch.setattr(TrainingRun, "_check_first_example", lambda _: None)
    assert result(tmp_path / "b") == expected


@pytest.mark.parametrize("label", [None, {"label": None}, {"label": ""}], ids=str)
def test_a_test_split_without_labels_is_skipped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: dict[str, Any] | None
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)

    def without(name: str) -> None:
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for line in lines:
            del line["label"]
            line |= label or {}
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    without("test")
    assert cli.main(command(folder, tmp_path / "out")) == 0
    assert f"{folder}: the test split is skipped because none of its examples has a label" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert "dev" in run and "test" not in run
    with pytest.raises(NoLabelsError, match=r"test\.jsonl:1: "):
        read_split(folder, "jsonl", "test")
    # All other splits need labels.
    without("dev")
    assert cli.main(command(folder, tmp_path / "again")) == 1
    assert "dev.jsonl:1: " in capsys.readouterr().err


def test_one_line_without_a_label_is_a_mistake(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    del lines[1]["label"]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(DataError, match=r"test\.jsonl:2: lacks the key") as error:
        read_split(folder, "jsonl", "test")
    assert not isinstance(error.value, NoLabelsError)


@pytest.mark.parametrize("writer", ["torch.save", "mope.training.trainer.save_file"])
def test_a_disk_that_is_full_at_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writer: str, full: None
) -> None:
    """The error of torch does not mention the disk; the partial file is deleted."""

    def fails(tensors: Any, file: Any, *_: Any, **__: Any) -> None:
        if not hasattr(file, "write"):
            Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 148096 vs 147988")

    with monkeypatch.context() as patch:
        patch.setattr(writer, fails)
        assert cli.main(command(data, tmp_path)) == 1
    assert "the checkpoint of step 3 cannot be written: no space left on the disk ([enforce fail" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoint-*")) and last_checkpoint(tmp_path) is None
    assert cli.main(command(data, tmp_path, "--resume")) == 0


def test_a_disk_that_is_full_at_features(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: None
) -> None:
    def fails(stream: Any, array: Any) -> None:
        stream.write(b"half")
        raise OSError("704 requested and 352 written")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fails)
        assert cli.main(command(data, tmp_path, "--cache-features", "on", "--set", "cross_prompt_length=0")) == 1
    said = capsys.readouterr().err
    assert "mope train: features cannot be kept in" in said and "no space left on the disk (704 requested and 352 written)" in said
    assert not [path for path in (tmp_path / "features").rglob("*") if path.is_file()]


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "before")
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"results\.json cannot be written: .*No space left on"),
    ):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        write_text(file, "after")
    assert file.read_text() == "before" and [*tmp_path.iterdir()] == [file]
    # If there is space left, the error is a different one.
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"results\.json cannot be written: \[Errno 5\]"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        write_text(file, "after")
    write_text(file, "after")
    assert file.read_text() == "after"
