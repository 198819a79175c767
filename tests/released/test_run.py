"""`mope run` on a small checkout, whose script stands in for a released one and does not use this library."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.bert.modeling_bert import BertLayer

from mope.released import transforms
from mope.released.run import add_run, run
from mope.released.stand_ins import DropPath, stand_ins, to_2tuple, trunc_normal_

FILES = {
    "main_classify.py": """
import argparse
import torch
from utils import *
from models import classifier
from pytorch_lightning import Trainer

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fuse_method", default="mope")
    parser.add_argument("--max_epoch", type=int, nargs="+", default=10)
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    loss = torch.nn.NLLLoss(ignore_index=args.ignore_label)
    model = classifier.get_model().double()
    trainer = Trainer(accelerator="gpu", precision=16, max_epochs=args.max_epoch, logger=None)
    images, psi = torch.randn(3, 3, 56, 56).double(), torch.randn(3, 768).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []

    def step(model):
        logits, extra = model(images, psi)
        value = loss(logits.log_softmax(1), torch.tensor([0, 1, 2])) + 0.01 * extra["importance_loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())

    trainer.fit(model, step)
    result = {"losses": losses, "trainer": trainer.given, "seen_by_others": helpers.seen_by_others()}
    torch.save(result | {"args": args}, "result.pt")
    read = torch.load("result.pt", weights_only=True)
    if args.fail:
        raise RuntimeError(f"failed after {len(read['losses'])} steps")
    exit(3)

if __name__ == "__main__":
    main()
""",
    "pytorch_lightning.py": """
class Trainer:
    def __init__(self, **options):
        self.given = options

    # As Lightning does since 2.2, it calls no train() and puts back the modes that it found.
    def fit(self, model, step):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        for module, mode in modes.items():
            module.training = mode
        for _ in range(2):
            step(model)
""",
    "models/__init__.py": "",
    "models/classifier.py": """
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from mmcv.cnn import ConvModule
import torch.nn as nn
from tests.released.stand_in_swin import PromptedSwin, VisionClassifier

class VisionTextClassifiers(nn.Module):
    def __init__(self, vision_model, text_model):
        super(VisionTextClassifiers, self).__init__()
        self.vision_model, self.text_model = vision_model, text_model

    def forward(self, vision_input, text_input):
        return self.vision_model.forward_instruct_multimodal_moe(vision_input, self.text_model(text_input))

class Head(nn.Module):
    def decode(self, x):
        return ConvModule(3, 3)(x)

def get_model():
    encoder = PromptedSwin(16, (2, 2), (1, 2), 4, 2, image_size=56)
    return VisionTextClassifiers(VisionClassifier(encoder), nn.Identity())
""",
    "utils/__init__.py": "from .helpers import *\nfrom . import helpers",
    "utils/helpers.py": """
import cv2
import librosa
import pyarrow as pa
import torchvision as tv
from torchvision import transforms
from transformers.utils import is_librosa_available

def seen_by_others():
    return is_librosa_available()

RESIZE = tv.transforms.Resize(256)
TABLES = pa.ipc.RecordBatchFileReader
""",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(script: str | None = None) -> Path:
        for name, text in FILES.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        if script is not None:
            (tmp_path / "main_classify.py").write_text(script)
        return tmp_path / "main_classify.py"

    monkeypatch.chdir(tmp_path)
    return write


def result(script: Path, *arguments: str, **options: Any) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        run(script, arguments, **options)
    assert stop.value.code == 3
    return torch.load("result.pt", weights_only=False)


def absent(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def test_an_unmodified_script_runs_and_is_told_what_changed(checkout, capsys):
    before = list(sys.argv), list(sys.path), list(sys.meta_path), BertLayer.forward, argparse.ArgumentParser.parse_args
    found = result(checkout(), "--max_epoch", "2")
    assert before == (sys.argv, sys.path, sys.meta_path, BertLayer.forward, argparse.ArgumentParser.parse_args)
    assert not {"models", "utils", "pytorch_lightning"} & sys.modules.keys()
    assert found["args"].ignore_label == -100
    gpu = torch.cuda.is_available()
    device = {"accelerator": "gpu", "precision": 16} if gpu else {"accelerator": "cpu", "precision": 32}
    assert found["trainer"] == device | {"max_epochs": 2, "logger": None}
    said = capsys.readouterr().err
    assert f"torch {torch.__version__.split('+')[0]}" in said and "(written for 3.8)" in said
    for name in ("timm.models.layers: DropPath", "torchvision.transforms: CenterCrop", "cv2", "librosa", "mmcv", "pyarrow"):
        assert (name in said) == absent(name.partition(".")[0].partition(":")[0]), name
    assert "BertLayer returns a tuple" in said and "ignore_label" in said and ("precision=16 as 32" in said) != gpu


def test_on_several_gpus_it_takes_one(checkout, capsys, monkeypatch):
    monkeypatch.setattr("mope.devices.find_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    expected = {"accelerator": "gpu", "precision": 16, "max_epochs": 10, "logger": None, "devices": 1}
    assert result(checkout())["trainer"] == expected
    assert "Trainer uses one GPU" in capsys.readouterr().err
    # Or the GPU named with --device.
    assert result(checkout(), device="cuda:2")["trainer"] == expected | {"devices": [2]}
    assert "Trainer uses GPU 2: --device cuda:2" in capsys.readouterr().err
    assert result(checkout(), device="cpu")["trainer"]["accelerator"] == "cpu"
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.skipif(not absent("librosa"), reason="librosa is installed")
def test_libraries_do_not_take_stand_ins_for_the_real_thing(checkout):
    assert result(checkout())["seen_by_others"] is False
    assert absent("librosa") and "librosa" not in sys.modules


def test_accelerated_it_computes_the_same(checkout, capsys):
    script = checkout()
    plain, reference, instance = (
        result(script, **options) for options in ({}, {"accelerate": True}, {"accelerate": True, "mode": "instance"})
    )
    assert plain["losses"] == pytest.approx(reference["losses"], rel=1e-10)
    assert abs(plain["losses"][1] - instance["losses"][1]) > 1e-5
    said = capsys.readouterr().err
    assert "accelerated=['vision_model.encoder'], unchanged=['vision_model.classifier']" in said
    assert "mode='released'" in said and "mode='instance'" in said
    assert "__init_subclass__" not in vars(torch.nn.Module)


def test_errors_are_those_of_the_script(checkout):
    with pytest.raises(RuntimeError, match="failed after 2 steps") as raised:
        run(checkout(), ["--fail"])
    assert raised.traceback[-1].path.name == "main_classify.py" and raised.traceback[-1].name == "main"
    assert "utils" not in sys.modules


@pytest.mark.skipif(not (absent("mmcv") and absent("cv2")), reason="they are installed")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from models.classifier import Head; Head().decode(1)", "mmcv.cnn.ConvModule is called, but mmcv .*pip install mmcv"),
        ("import cv2; cv2.imread('a.png')", "cv2.imread is called, but cv2 .*pip install opencv-python"),
        ("import pyarrow as pa; pa.ipc.open_file(cv2)", "name 'cv2' is not defined"),
    ],
)
def test_what_is_only_imported_cannot_be_used(checkout, code, message):
    with pytest.raises((ModuleNotFoundError, NameError), match=message):
        run(checkout(code))


def test_it_is_said_that_nothing_was_accelerated(checkout, capsys):
    run(checkout("import torch.nn as nn; nn.Linear(1, 1)"), accelerate=True)
    assert "nothing was accelerated: the script built no VisionTextClassifiers" in capsys.readouterr().err
    without_prompts = """
import torch.nn as nn
from transformers import BertConfig
from tests.released.stand_in_bert import TextClassifier

class VisionTextClassifiers(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        self.text_model = TextClassifier(BertConfig(**sizes), use_prompt=False)

VisionTextClassifiers()
"""
    run(checkout(without_prompts), accelerate=True)
    assert "mope run: nothing was accelerated: without prompts text_model runs unchanged" in capsys.readouterr().err
    other = "import torch.nn as nn\nclass VisionTextClassifiers(nn.Module):\n    pass\nVisionTextClassifiers()"
    with pytest.raises(ValueError, match="holds neither a prompted Swin Transformer"):
        run(checkout(other), accelerate=True)


def test_a_layer_of_bert_returns_a_tuple_where_attentions_are_asked_for(checkout):
    script = """
import torch
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)).eval()
ids = torch.arange(6).reshape(2, 3)
x = model.embeddings(ids)
for layer in model.encoder.layer:
    x = layer(x, torch.zeros(2, 1, 1, 3), output_attentions=True)[0]
torch.testing.assert_close(x, model(ids).last_hidden_state)
torch.testing.assert_close(x, model(ids, output_attentions=True).last_hidden_state)
"""
    run(checkout(script))


def test_the_command(checkout, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_run(parser.add_subparsers())
    (tmp_path / "say.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)")
    options = parser.parse_args(["run", "--accelerate", str(tmp_path / "say.py"), "--accelerate", "--mode", "x", "y"])
    with pytest.raises(SystemExit) as stop:
        options.command(options)
    assert stop.value.code == 5
    printed = capsys.readouterr()
    assert printed.out == "['--accelerate', '--mode', 'x', 'y']\n" and "nothing was accelerated" in printed.err
    for arguments, message in ((["none.py"], "no such script"), (["--mode", "instance", str(checkout())], "with --accelerate")):
        options = parser.parse_args(["run", *arguments])
        assert options.command(options) == 2
        assert message in capsys.readouterr().err


def test_packages_installed_in_the_checkout_are_no_part_of_it(checkout, tmp_path, monkeypatch):
    packages = tmp_path / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "library.py").write_text("try:\n    import librosa\nexcept ImportError:\n    librosa = None")
    monkeypatch.syspath_prepend(packages)
    run(checkout("import library\nassert library.librosa is None\nimport utils, xxsubtype"))
    # The last module is built in and has no file.
    assert "utils" not in sys.modules and sys.modules.pop("library") and sys.modules.pop("xxsubtype")


def test_what_is_installed_comes_first(tmp_path, monkeypatch):
    layers = tmp_path / "timm" / "models" / "layers"
    layers.mkdir(parents=True)
    # Like timm 0.3, which imports a module that torch no longer has.
    for folder in (layers.parents[1], layers.parent, layers):
        (folder / "__init__.py").write_text("from torch._six import container_abcs\nDropPath = 'real'")
    (tmp_path / "cv2.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    with stand_ins(tmp_path) as finder:
        assert not {"cv2", "timm", "timm.models.layers"} & set(finder.absent)
        assert importlib.import_module("timm.models.layers").DropPath == "real"
    for name in ("timm", "timm.models", "timm.models.layers"):
        del sys.modules[name]
    (layers / "__init__.py").unlink()
    layers.rmdir()
    with stand_ins(tmp_path) as finder:
        assert "timm" not in finder.absent and "timm.models.layers" in finder.absent


def test_images_are_transformed_as_by_torchvision():
    """Compare with results of torchvision 0.28.0."""
    golden = load_file(Path(__file__).parents[1] / "data" / "reference_transforms.safetensors")
    image = Image.fromarray(golden["image"].numpy())
    for seed, expected in enumerate(golden["rand_augment"]):
        torch.manual_seed(seed)
        assert np.array_equal(transforms.RandAugment(2, 7)(image), expected), seed
    for name, size in (("shorter", 12), ("both", (12, 12))):
        steps = [transforms.Resize(size), transforms.CenterCrop(10), transforms.ToTensor()]
        steps.append(transforms.Normalize(mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3]))
        torch.testing.assert_close(transforms.Compose(steps)(image), golden[name], rtol=1e-6, atol=1e-6)


def test_layers_of_timm():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    out = drop(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / 0.75)) and not out[~kept].any()
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert drop.eval()(x) is x
    assert to_2tuple(7) == (7, 7) and to_2tuple((3, 4)) == (3, 4)
    drawn = trunc_normal_(torch.empty(20000), mean=0.5, std=2.0, a=-0.5, b=1.5)
    assert drawn.min() >= -0.5 and drawn.max() <= 1.5
    # With a quarter of a deviation on both sides of the mean, the distribution is nearly uniform.
    assert abs(drawn.mean().item() - 0.5) < 0.02 and abs(drawn.std().item() - 1 / 3**0.5) < 0.02
