"""Provide a small checkpoint in the format of the released code, and its encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.released.test_loading import backbones, released

__all__ = ["backbones", "released"]


@pytest.fixture
def released_checkpoint(released, tmp_path: Path) -> Path:
    import torch

    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": released[2], "hyper_parameters": {"args": {"fuse_method": "mope"}}}, path)
    return path
