"""Models are pushed to and pulled from a hub with huggingface_hub's own client, also through the Auto classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .stand_in_hub import serving_hub

PUSH = """
import sys, mope
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
model.push_to_hub("org/name", backbones="copy", revision="v1", token="hf_secret")
"""
# Run in another process, given only the name.
PULL = """
import sys, mope
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
import torch

def tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items()}

expected = AutoModel.from_pretrained(sys.argv[1])
assert AutoConfig.from_pretrained("org/name", revision="v1") == expected.config
for load in (type(expected), AutoModel, AutoModelForSequenceClassification):
    found = load.from_pretrained("org/name", revision="v1", token="hf_secret")
    assert found.config == expected.config
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensor, tensors(found)[name]), name
again = type(expected).from_pretrained("org/name", revision="v1", local_files_only=True)
assert again.config == expected.config
try:
    type(expected).from_pretrained("org/name", revision="v2")
except OSError as error:
    assert "v2" in str(error), error
else:
    raise AssertionError("a revision that is not there was found")
print("the same")
"""


@pytest.mark.parametrize("kind", ["mope", "modex"])
def test_a_model_goes_to_the_hub_and_comes_back(kind: str, tmp_path: Path) -> None:
    from .test_transformers_protocol import MODELS

    MODELS[kind]().save_pretrained(tmp_path / "model", backbones="copy")
    with serving_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for program, home in ((PUSH, "there"), (PULL, "here")):
            environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / home)}
            command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model")]
            said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
            assert said.returncode == 0, f"{said.stderr[-3000:]}\n{hub.asked}"
        files = hub.files("org/name", "v1")
    assert said.stdout.split("\n")[-2] == "the same" and hub.tokens == {"hf_secret"}
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert not any(name.endswith((".py", ".bin", ".pt", ".pkl")) for name in files)
