"""`mope train` and `mope evaluate` with ModeX, for joined encoders and a fused model, on the same data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from mope import cli
from mope.modex import AlbefModel, ModeXConfig, ModeXForClassification
from mope.training import Recipe, TrainingRun, evaluate
from mope.training.loading import load_fused, new_modex_model
from mope.training.trainer import parameters_by_modality
from tests.models.tiny import backbone
from tests.modex.tiny import MODELS
from tests.training.brightness import image_processor, read_splits, tokenizer, write_data, write_encoders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_encoders(write_data(tmp_path_factory.mktemp("data")))
    encoders: Any = backbone("vit", torch.float32), backbone("bert", torch.float32)
    fused = AlbefModel.from_encoders(*encoders, fusion_layer=1)
    for part in (fused.half(), image_processor(), tokenizer()):
        part.save_pretrained(folder / "fused")
    for name, file, content in (("damaged", "model.safetensors", "cut"), ("nameless", "config.json", '{"architectures": 3}')):
        shutil.copytree(folder / "fused", folder / name)
        (folder / name / file).write_text(content)
    return folder


def train(data: Path, out: Path, *options: str) -> int:
    arguments = ["train", "--system", "modex", "--data", str(data), "--out", str(out), "--device", "cpu", "--batch-size", "8"]
    return cli.main([*arguments, "--vision-lr", "1e-2", "--text-lr", "1e-2", *options])


def test_joined_encoders_train_and_are_evaluated(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The new cross-attention trains too, and the model is saved with a copy of the encoders."""
    encoders = ["--vision", str(data / "vision"), "--text", str(data / "text")]
    assert train(data, tmp_path, *encoders, "--epochs", "3", "--set", "bottleneck=4", "temperature=2") == 0
    assert "whose cross-attention is new and trains too" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["adapters"]["bottleneck"] == 4 and results["config"]["adapters"]["temperature"] == 2
    (run,) = results["runs"]
    model = ModeXForClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "no", 1: "yes"} and model.tokenizer is not None and model.image_processor is not None
    assert any(".crossattention.self." in name for name in load_file(tmp_path / "model" / "model.safetensors"))

    out = tmp_path / "test"
    assert cli.main(["evaluate", str(tmp_path / "model"), "--data", str(data), "--out", str(out), "--device", "cpu"]) == 0
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["accuracy"] == run["test"]["accuracy"] and row["loss"] == pytest.approx(run["test"]["loss"])


def test_a_fused_model_stays_frozen(data: Path) -> None:
    split = read_splits(data)["train"]
    model = new_modex_model(split, model=str(data / "fused"), fields={"bottleneck": 4})
    assert model.config.adapters == ModeXConfig.preset("albef", fusion_layer=1, bottleneck=4)
    assert not any("attention.self" in name for name in model.trained_state_dict())
    assert model.tokenizer is not None and model.image_processor is not None
    # It is stored in 16 bits, and LayerNorms train.
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Trained parameters of image layers use --vision-lr, all others --text-lr.
    groups = {modality: {id(p) for p in parameters} for modality, parameters in parameters_by_modality(model).items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) in groups["vision" if name.startswith("encoder.vision.") else "text"], name


def test_blip_trains(data: Path, tmp_path: Path) -> None:
    blip: Any = MODELS["blip_retrieval"]()
    blip.save_pretrained(tmp_path / "blip")
    splits = read_splits(data)
    for part in (tokenizer(), ViTImageProcessorPil(size={"height": 8, "width": 8})):
        part.save_pretrained(tmp_path / "blip")
    model = new_modex_model(splits["train"], model=str(tmp_path / "blip"), fields={"bottleneck": 4})
    assert model.config.adapters == ModeXConfig.preset("blip", bottleneck=4)
    recipe = Recipe(epochs=1, batch_size=11, vision_lr=1e-2, text_lr=1e-2)
    result = TrainingRun(model, splits, recipe, tmp_path / "out", device="cpu", progress=False).train()
    # Loaded again from its folder.
    saved = ModeXForClassification.from_pretrained(tmp_path / "out" / "model")
    assert evaluate(saved, splits["test"])["loss"] == pytest.approx(result["test"]["loss"])


def test_a_resumed_run_is_the_same(data: Path, tmp_path: Path) -> None:
    splits, recipe = read_splits(data), Recipe(epochs=2, batch_size=8, vision_lr=1e-2, text_lr=1e-2, milestones=())

    def run_of(name: str, **options: Any) -> TrainingRun:
        torch.manual_seed(0)
        model = new_modex_model(splits["train"], model=str(data / "fused"), fields={"dropout": 0.1, "bottleneck": 4})
        return TrainingRun(model, splits, recipe, tmp_path / name, device="cpu", progress=False, **options)

    whole = run_of("whole")
    whole.train()
    run_of("parts", max_steps=4, save_steps=2).train()
    resumed = run_of("parts", resume=True)
    assert resumed.checkpoint is not None and resumed.checkpoint.name == "checkpoint-4"
    resumed.train()
    assert whole.trainer.state.global_step == resumed.trainer.state.global_step == 6
    # Compare checkpoints of the last step, since the models themselves hold the best weights.
    one, other = (load_file(run.out / "checkpoint-6" / "model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_another_encoder_is_not_resumed(data: Path, tmp_path: Path) -> None:
    splits = read_splits(data)
    models = [new_modex_model(splits["train"], model=str(data / "fused")) for _ in range(2)]
    run = TrainingRun(models[0], splits, Recipe(epochs=1), tmp_path, device="cpu", progress=False)
    identity = run.identity()
    assert list(identity["backbones"]) == ["encoder"] and identity["config"]["adapters"]["sites"]["cross_msa"] == "expert"
    (tmp_path / "run.json").write_text(json.dumps(identity))
    other = load_fused(str(data / "fused"))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    wrong = ModeXForClassification(other, models[1].config.adapters, id2label=models[1].config.id2label)
    wrong.tokenizer, wrong.image_processor = models[1].tokenizer, models[1].image_processor
    with pytest.raises(ValueError, match=r"backbones\.encoder was"):
        TrainingRun(wrong, splits, Recipe(epochs=1), tmp_path, resume=True, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "mope"], "--method cannot be used with --system modex"),
        (["--mode", "instance", "--features", "x"], "--mode, --features cannot be used"),
        (["--cache-features", "on"], "--cache-features on cannot be used"),
        ([], "needs --model NAME_OR_FOLDER of a fused model, or both --vision and --text"),
        (["--vision", "{data}/vision"], "or both --vision and --text"),
        (["--model", "{data}/fused", "--text", "{data}/text"], "needs --model"),
        (["--model", "{data}/text"], "a BertModel is not a known fused encoder"),
        (["--model", "{data}/damaged"], "damaged: Error while deserializing header"),
        (["--model", "{data}/nameless"], "a model that does not say its class is not a known fused encoder"),
        (["--model", "{data}/fused", "--set", "num_prompts=3"], "ModeXConfig has no num_prompts"),
        (["--model", "{data}/fused", "--set", "trained=3"], "trained must be a list of patterns, got 3"),
        (["--model", "{data}/fused", "--preset", "mope-v4"], "preset must be one of albef, blip"),
        (["--model", "{data}/fused", "--from-checkpoint", "x"], "--model is for a new model"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "out", *(option.format(data=data) for option in options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mope_takes_no_fused_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "out"), "--model", str(data / "fused")]) == 1
    assert "--model cannot be used with --system mope" in capsys.readouterr().err


def test_what_only_mope_has_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_modex_model(read_splits(data)["train"], model=str(data / "fused"))
    model.save_pretrained(tmp_path / "model", backbones="copy")
    evaluate = ["evaluate", str(tmp_path / "model"), "--data", str(data), "--device", "cpu"]
    for options, message in (
        (["--vision", "x"], "which does not accept --vision"),
        (["--compare-modes"], "which only a Swin Transformer has"),
    ):
        assert cli.main([*evaluate, *options]) == 1
        assert message in capsys.readouterr().err
    routes = ["routes", str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "routes"), "--device", "cpu"]
    assert cli.main(routes) == 1
    assert "is a ModeX model" in capsys.readouterr().err
