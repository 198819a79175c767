"""Checkpoints of the released code are read completely or refused with a reason, and never execute code."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mope.released import read_released_checkpoint

ARGS = {"fuse_method": "mope", "moe_n_experts": 4, "prompt_length": 6, "data": Path("food101")}


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    vision = {"encoder.prompt_embeddings": torch.randn(1, 13, 8), "classifier.weight": torch.randn(3, 8)}
    text = {"prompt_vector": torch.randn(2, 4, 8), "bert_encoder.embeddings.position_ids": torch.arange(9)[None]}
    both = {f"vision_classifier.{n}": t for n, t in vision.items()} | {f"text_classifier.{n}": t for n, t in text.items()}
    both |= {n.replace("vision_classifier.", "classifier.vision_model."): t for n, t in both.items()}
    return both | {n.replace("text_classifier.", "classifier.text_model."): t for n, t in both.items()}


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {"state_dict": tensors(), "hyper_parameters": {"args": argparse.Namespace(**ARGS)}, "epoch": 3} | changes


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


PLAIN = {**ARGS, "data": "food101"}


# Lightning writes the first form.
@pytest.mark.parametrize("options", [PLAIN, argparse.Namespace(**PLAIN), {"args": PLAIN}, {"args": argparse.Namespace(**PLAIN)}])
def test_reads_each_tensor_once(tmp_path, options):
    found = read_released_checkpoint(write(tmp_path / "a.ckpt", checkpoint(hyper_parameters=options)))
    expected = {n: t for n, t in tensors().items() if n.startswith(("vision_classifier.", "text_classifier."))}
    del expected["text_classifier.bert_encoder.embeddings.position_ids"]
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in expected.items())
    assert found.options == PLAIN
    assert found.part("vision_classifier.encoder.").keys() == {"prompt_embeddings"}


def test_reads_what_was_saved_under_the_other_names_only(tmp_path):
    state = {n: t for n, t in tensors().items() if n.startswith("classifier.")}
    found = read_released_checkpoint(write(tmp_path / "a.ckpt", {"state_dict": state}))
    assert found.options == {} and "vision_classifier.classifier.weight" in found.tensors


def test_converts_to_safetensors(tmp_path):
    options = {"args": {**ARGS, "data": "food101"}}
    found = read_released_checkpoint(write(tmp_path / "a.ckpt", checkpoint(hyper_parameters=options)))
    found.save(tmp_path / "a.safetensors")
    again = read_released_checkpoint(tmp_path / "a.safetensors")
    assert again.options == found.options and again.tensors.keys() == found.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in found.tensors.items())


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_file_is_refused_and_nothing_runs(tmp_path):
    hostile = checkpoint(hyper_parameters={"args": Hostile(tmp_path / "executed")})
    with pytest.raises(ValueError, match=r"a\.ckpt: it requires (posix|nt)\.mkdir.*Nothing was executed"):
        read_released_checkpoint(write(tmp_path / "a.ckpt", hostile))
    plain = tmp_path / "b.ckpt"
    plain.write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match=r"b\.ckpt: "):
        read_released_checkpoint(plain)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_a_truncated_file_is_named(tmp_path, kept):
    whole = write(tmp_path / "a.ckpt", checkpoint(hyper_parameters={})).read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"cut\.ckpt: "):
        read_released_checkpoint(cut)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: no such checkpoint"):
        read_released_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a dict with a 'state_dict', this is list"),
        ({"model": {}}, "a dict with a 'state_dict', this is dict"),
        ({"state_dict": {"vision_classifier.x": 3}}, r"these are not tensors: vision_classifier\.x"),
        ({"state_dict": {"model.weight": torch.zeros(1)}}, r"not a checkpoint of the released code; it holds model\.weight"),
        # Tensors that claim to be larger than the file; a model of their size would use up all memory.
        ({"state_dict": {"vision_classifier.x": torch.zeros(1).expand(10**12)}}, r"these are not tensors: vision_classifier\.x"),
        ({"state_dict": {"vision_classifier.x": torch.eye(2).to_sparse()}}, r"these are not tensors: vision_classifier\.x"),
        ({"state_dict": {7: torch.zeros(1)}}, "these are not tensors: 7"),
        (checkpoint(hyper_parameters=5), "hyper_parameters must hold options by name, got int"),
        (checkpoint(hyper_parameters={"args": ["mope"]}), "hyper_parameters must hold options by name, got list"),
        (checkpoint(hyper_parameters={(1, 2): 3}), "hyper_parameters must hold options by name, got dict"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_released_checkpoint(write(tmp_path / "a.ckpt", content))


def test_copies_that_differ_are_refused(tmp_path):
    state = tensors()
    state["classifier.vision_model.classifier.weight"] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"the two copies of vision_classifier\.classifier\.weight differ"):
        read_released_checkpoint(write(tmp_path / "a.ckpt", {"state_dict": state}))


def test_tensors_that_diverged_are_named(tmp_path):
    state = tensors()
    state["vision_classifier.classifier.weight"][0, 0] = torch.nan
    # The same tensor under both of its names.
    state["classifier.vision_model.classifier.weight"] = state["vision_classifier.classifier.weight"].clone()
    with pytest.warns(UserWarning, match=r"1 tensors hold NaN or infinity: vision_classifier\.classifier\.weight"):
        read_released_checkpoint(write(tmp_path / "a.ckpt", {"state_dict": state}))


def test_damaged_files_are_named(tmp_path):
    """Change single bytes: the file is either read or refused by name."""
    path = write(tmp_path / "a.ckpt", checkpoint(hyper_parameters=PLAIN))
    whole = path.read_bytes()
    start, refused = whole.index(b"state_dict"), 0
    for place in range(start, start + 600, 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x85]) + whole[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_released_checkpoint(path)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 100


def test_tensors_that_share_memory_are_converted(tmp_path):
    state = tensors()
    state["vision_classifier.extra"] = state["vision_classifier.classifier.weight"]
    found = read_released_checkpoint(write(tmp_path / "a.ckpt", {"state_dict": state}))
    found.save(tmp_path / "a.safetensors")
    assert read_released_checkpoint(tmp_path / "a.safetensors").tensors.keys() == found.tensors.keys()


def test_unknown_tensors_are_named(tmp_path):
    state = tensors() | {"audio_classifier.weight": torch.zeros(1)}
    with pytest.warns(UserWarning, match=r"ignoring 1 unknown tensors: audio_classifier\.weight"):
        found = read_released_checkpoint(write(tmp_path / "a.ckpt", {"state_dict": state}))
    assert "audio_classifier.weight" not in found.tensors


def test_a_broken_safetensors_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable checkpoint"):
        read_released_checkpoint(path)
