"""Models of this library work with plain `Trainer`, the Auto classes and the hub, like those of transformers."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from mope import MoPEConfig, MoPEForClassification
from mope.fusion.base import FusionModel
from mope.fusion.parts import MapperConfig, PromptConfig, RouterConfig
from mope.modex import ModeXConfig, ModeXForClassification
from tests.modex.test_modeling import classifier

from . import tiny

ITEMS, BATCH = 16, 8


def mope_model(**options: Any) -> MoPEForClassification:
    torch.manual_seed(0)
    return without_dropout(tiny.fusion(dtype=torch.float32, noise_std=0.0, importance_weight=0.0, **options))


def modex_model() -> ModeXForClassification:
    torch.manual_seed(0)
    return without_dropout(classifier().float())


def without_dropout(model: Any) -> Any:
    """Turn off dropout, so that the results of two runs can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


MODELS: dict[str, Any] = {"mope": mope_model, "modex": modex_model}


def items_for(model: FusionModel) -> list[dict[str, Any]]:
    """Return items as in a data set, with columns that no model reads."""
    generator = torch.Generator().manual_seed(1)
    vision: Any = model.backbone("vision").config
    pixels = torch.randn(ITEMS, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    ids = torch.randint(2, 20, (ITEMS, 6), generator=generator)
    rows = zip(pixels, ids, strict=True)
    labels = [i % model.config.num_labels for i in range(ITEMS)]
    return [
        {"pixel_values": p, "input_ids": t, "attention_mask": torch.ones_like(t), "labels": labels[i], "comment": i}
        for i, (p, t) in enumerate(rows)
    ]


def trainer_for(model: FusionModel, folder: Path, callbacks: Any = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "save_strategy": "no",
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**given, **options}),
        train_dataset=items_for(model),  # type: ignore[arg-type]
        eval_dataset=items_for(model),  # type: ignore[arg-type]
        compute_metrics=lambda found: {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())},
        callbacks=callbacks,
    )


def trained(model: FusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_trains_evaluates_and_predicts_with_the_defaults(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before, seen = trained(model), []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(logs)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            # Serialise the config, as loggers do.
            assert json.loads(model.config.to_json_string())["model_type"] == kind

    trainer = trainer_for(model, tmp_path, [Logger()], logging_steps=1)
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs
    # Launchers check these before they shard a model.
    assert not model.supports_tp_plan and not model.supports_pp_plan
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < loss and 0 <= metrics["eval_accuracy"] <= 1
    assert any("loss" in each for each in seen)
    changed = [name for name, tensor in trained(model).items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) / 2
    found = trainer.predict(items_for(model))  # type: ignore[arg-type]
    assert isinstance(found.predictions, np.ndarray) and found.predictions.shape == (ITEMS, model.config.num_labels)


@pytest.mark.parametrize("kind", MODELS)
def test_parts_of_a_batch_are_the_batch(kind: str, tmp_path: Path) -> None:
    found = []
    for size, parts in ((8, 1), (2, 4)):
        model = MODELS[kind]()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "optim": "sgd", "num_train_epochs": 1}
        trainer_for(model, tmp_path, **options).train()
        found.append(trained(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    found = []
    for how in (None, {}, {"use_reentrant": False}, {"every_n_layers": 2}, {"offload": True}):
        model = MODELS[kind]()
        options = {"gradient_checkpointing": how is not None, "gradient_checkpointing_kwargs": how}
        trainer_for(model, tmp_path, **options, num_train_epochs=1).train()
        assert model.is_gradient_checkpointing == (how is not None)
        found.append(trained(model))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_refuses_what_it_does_not_do(kind: str) -> None:
    model = MODELS[kind]()
    for given, options, message in (
        ({"use_reentrant": True}, {}, "use_reentrant=True is not supported"),
        ({"preserve_rng_state": False}, {}, "got preserve_rng_state"),
        (None, {"every_n_layers": 0}, "every_n_layers must be an integer >= 1, got 0"),
        (None, {"every_n_layers": True}, "every_n_layers must be"),
        (None, {"offload": 1}, "offload must be true or false, got 1"),
    ):
        for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):
            with pytest.raises(ValueError, match=message):
                enable(given, **options)
        assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(("kind", "options"), [("mope", {}), ("mope", {"finetuned": ("text",)}), ("modex", {})], ids=str)
def test_a_run_is_resumed_and_the_best_is_loaded(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    each_epoch = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 3}
    whole = MODELS[kind](**options)
    trainer_for(whole, tmp_path / "whole", **each_epoch).train()
    expected = trained(whole)

    half = MODELS[kind](**options)

    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    trainer_for(half, tmp_path / "half", [Stop()], **{**each_epoch, "load_best_model_at_end": False}).train()
    again = MODELS[kind](**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(again, tmp_path / "half", **each_epoch)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    for name, tensor in trained(again).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    checkpoint = tmp_path / "half" / "checkpoint-2"
    frozen = sum(t.numel() for t in again.state_dict().values()) - sum(t.numel() for t in trained(again).values())
    assert frozen > 0 and (checkpoint / "config.json").is_file()
    from safetensors.torch import load_file

    assert load_file(checkpoint / "model.safetensors").keys() == trained(again).keys()


@pytest.mark.parametrize(("kind", "options"), [("mope", {}), ("mope", {"finetuned": ("text",)}), ("modex", {})], ids=str)
def test_a_checkpoint_of_trainer_is_opened(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Pass the frozen encoders, which the checkpoint lacks; a fine-tuned one is contained and loads without further arguments."""
    model = MODELS[kind](**options)
    batch = {name: torch.stack([item[name] for item in items_for(model)]) for name in ("pixel_values", "input_ids")}
    trainer_for(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    twin = MODELS[kind](**options)
    frozen = {name: given.encoder for name, given in twin.given_encoders().items() if not given.trains}
    twin.detach()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # ModeX has a single encoder, named `model`.
        opened = type(model).from_pretrained(
            tmp_path / "checkpoint-2", **(frozen if kind == "mope" else {"model": frozen["encoder"]})
        )
    unknown = [str(each.message) for each in said if "unknown tensors" in str(each.message)]
    # The pooler is unused, and no copy contains it.
    assert all(text.partition("tensors ")[2] == "text.pooler.dense.bias, text.pooler.dense.weight" for text in unknown)
    assert torch.equal(opened(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind: str, tmp_path: Path) -> None:
    model, plain = MODELS[kind](), MODELS[kind]()
    trainer_for(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", num_train_epochs=1).train()
    trainer_for(plain, tmp_path, num_train_epochs=1).train()
    for name, tensor in trained(plain).items():
        torch.testing.assert_close(trained(model)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_auto_classes(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path, backbones="copy")
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config == model.config
    batch = {
        name: torch.stack([item[name] for item in items_for(model)]) for name in ("pixel_values", "input_ids", "attention_mask")
    }
    expected = model(**batch).logits
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, type(model).__mro__[1] if kind == "mope" else type(model))
        torch.testing.assert_close(loaded(**batch).logits, expected)
    # In a separate process, importing this library before or after transformers.
    for imports in ("import mope; from transformers import AutoModel", "from transformers import AutoModel; import mope"):
        program = f"{imports}; print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
        said = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True).stdout
        assert said.split()[-1] == type(model).__name__
    said = subprocess.run([sys.executable, "-c", "import mope, sys; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert said.stdout == "False\n"


def test_what_only_finds_a_module_leaves_the_registration_alone(tmp_path: Path) -> None:
    mope_model().save_pretrained(tmp_path, backbones="copy")
    program = (
        "import mope, importlib.util, sys\n"
        "for part in ('configuration', 'modeling'):\n"
        "    spec = importlib.util.find_spec(f'transformers.models.auto.{part}_auto')\n"
        "    assert spec.loader.get_source(spec.name)\n"
        "from transformers import AutoModel\n"
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, len(sys.meta_path))"
    )
    plain = "import sys, transformers.models.auto.modeling_auto; print(len(sys.meta_path))"
    arguments = [[sys.executable, "-W", "ignore", "-c", each, str(tmp_path)] for each in (program, plain)]
    said, watched = (subprocess.run(each, capture_output=True, text=True, check=True).stdout.split() for each in arguments)
    assert said == ["MoPEForClassification", *watched]


@pytest.mark.parametrize("option", [{"dtype": torch.float16}, {"device_map": "cpu"}, {"subfolder": "x"}], ids=str)
def test_options_of_transformers_that_are_not_for_these_models_are_named(option: dict[str, Any], tmp_path: Path) -> None:
    mope_model().save_pretrained(tmp_path, backbones="copy")
    with pytest.raises(TypeError, match=rf"from_pretrained has no {next(iter(option))} here: cast or move"):
        MoPEForClassification.from_pretrained(tmp_path, **option)
    assert MoPEForClassification.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


def test_fields_stay_as_they_are_and_transformers_may_write_its_own() -> None:
    config = MoPEConfig(id2label=["no", "yes"])
    with pytest.raises(AttributeError, match=r"num_experts of a MoPEConfig cannot be changed.*replace\(num_experts=\.\.\.\)"):
        config.num_experts = 3
    with pytest.raises(AttributeError, match=r"has no field num_expert; did you mean num_experts"):
        config.num_expert = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"MoPEConfig has no field num_expert; did you mean num_experts"):
        MoPEConfig(num_labels=2, num_expert=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean num_experts"):
        config.replace(num_expert=3)
    config.use_cache = False
    assert config == MoPEConfig(id2label=["no", "yes"]) and "use_cache" not in config.to_dict()
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        with pytest.raises(AttributeError, match="cannot be changed"):
            twin.main = "text"


def test_what_would_change_nothing_is_refused() -> None:
    config = MoPEConfig(num_labels=2)
    for name, value in {"output_attentions": True, "output_hidden_states": True, "return_dict": False}.items():
        setattr(config, name, not value)
        with pytest.raises(ValueError, match=f"{name}={value} would have no effect"):
            setattr(config, name, value)


def test_unknown_keywords_of_parts_and_adapters() -> None:
    for kind, word, meant in (
        (RouterConfig, "temprature", "temperature"),
        (PromptConfig, "num_expert", "num_experts"),
        (MapperConfig, "hiden", "hidden"),
        (ModeXConfig, "bottlneck", "bottleneck"),
    ):
        with pytest.raises(TypeError, match=f"{kind.__name__} has no field {word}; did you mean {meant}"):
            kind(**{word: 1})


@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_is_read_and_changed_on_the_way(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path, backbones="copy")
    names = [f"class {i}" for i in range(model.config.num_labels)]
    for read in (AutoConfig.from_pretrained, type(model.config).from_pretrained):
        assert read(tmp_path) == model.config
        changed = read(tmp_path, id2label=names)
        assert changed == model.config.replace(id2label=names)
        with pytest.raises(TypeError, match=r"has no field padding_sid; did you mean padding_side"):
            read(tmp_path, padding_sid="left")
    assert type(model).from_pretrained(tmp_path, config=changed).config == changed
    assert AutoModel.from_pretrained(tmp_path, id2label=names).config == changed
    assert AutoModel.from_pretrained(tmp_path).config == model.config
    with pytest.raises(TypeError, match="config must be a "):
        type(model).from_pretrained(tmp_path, config=3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a model of type 'bert'"):
        type(model.config).from_pretrained(tmp_path)


def test_unknown_arguments_of_saving(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument backbone; did you mean backbones"):
        mope_model().save_pretrained(tmp_path, backbone="copy")
    assert not list(tmp_path.iterdir())


def test_names_of_problem_types() -> None:
    assert MoPEConfig(num_labels=2, problem_type="multi_label_classification").problem_type == "multi_label"
    assert MoPEConfig(num_labels=2, problem_type="single_label_classification") == MoPEConfig(num_labels=2)
    with pytest.raises(ValueError, match=r"problem_type must be .* got 'regression': numbers \(regression\) are not supported"):
        MoPEConfig(num_labels=2, problem_type="regression")


@pytest.mark.parametrize("kind", MODELS)
def test_the_hub(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a folder for each revision as a stand-in for the hub."""
    hub, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            asked.append(token)

        def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            assert exist_ok

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> str:
            target = hub / repo_id / (revision or "main")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder_path, target)
            return commit_message

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], revision: str | None = None, token: str | None = None) -> str:
        assert "*.safetensors" in allow_patterns and not any(p.endswith((".py", ".bin", "*")) for p in allow_patterns)
        asked.append(token)
        return str(hub / repo_id / (revision or "main"))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = MODELS[kind]().eval()
    assert model.push_to_hub("org/name", backbones="copy", revision="v1", token="secret", commit_message="first") == "first"
    loaded = type(model).from_pretrained("org/name", revision="v1", token="secret")
    assert trained(loaded).keys() == trained(model).keys() and asked == ["secret", "secret"]
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        type(model).from_pretrained("org/name")
    model.save_pretrained(tmp_path / "other", backbones="copy", push_to_hub=True, repo_id="org/other", revision="v2")
    assert trained(type(model).from_pretrained("org/other", revision="v2")).keys() == trained(model).keys()


@pytest.mark.parametrize("kind", MODELS)
def test_a_card_says_what_it_is(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS[kind]()
    model.card_data = {"data": "digits", "test": {"accuracy": 0.9}}
    model.save_pretrained(tmp_path, backbones="copy")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mope\ntags:\n- mope\n") and '"accuracy": 0.9' in card
    assert all(print_[:16] in card for print_ in model.fingerprints().values())
    assert f'{type(model).__name__}.from_pretrained(".")' in card
    # A user's README is kept.
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, backbones="copy")
    assert (tmp_path / "README.md").read_text() == "mine"
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,} || all params: " in capsys.readouterr().out


def test_no_card_costs_a_checkpoint(tmp_path: Path) -> None:
    """Check that a card which cannot be written does not fail the checkpoint: odd characters, lone surrogates, a folder, a link."""
    model = mope_model(id2label=["café", "\ud800", "<script>|![x](http://t)"])
    model.save_pretrained(tmp_path / "names", backbones="copy")
    card = (tmp_path / "names" / "README.md").read_text(encoding="utf-8")
    assert "café" in card and "<script>" not in card and "![x]" not in card
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    with pytest.warns(UserWarning, match="its card could not be written"):
        model.save_pretrained(tmp_path / "folder", backbones="copy")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "README.md").symlink_to(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "link", backbones="copy")
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    model.save_pretrained(tmp_path / "empty", backbones="copy")
    assert (tmp_path / "empty" / "README.md").read_text(encoding="utf-8") == card
    for name in ("names", "folder", "link", "empty"):
        assert MoPEForClassification.from_pretrained(tmp_path / name).config == model.config
    program = (
        "import sys; from mope import MoPEForClassification as M; "
        "M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], backbones='copy')"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "names"), str(tmp_path / "ascii")]
    subprocess.run(arguments, env=ascii_only, check=True)
    assert (tmp_path / "ascii" / "README.md").read_text(encoding="utf-8") == card


def test_a_folder_of_an_earlier_version_opens(tmp_path: Path) -> None:
    model = mope_model().eval()
    model.save_pretrained(tmp_path, backbones="copy")
    records = json.loads((tmp_path / "config.json").read_text())["backbones"]
    # A flat config without the fields added later.
    values = {**model.config.flat(), "mope_version": "0.0", "backbones": records}
    for added in ("complementary", "combine", "named", "mapper_each"):
        del values[added]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MoPEForClassification.from_pretrained(tmp_path).config == model.config
    values["prompt_owner"] = "reference"
    assert MoPEConfig.from_dict(values).prompt_owner == "released"


def test_parts_and_their_short_names() -> None:
    config = MoPEConfig(
        num_labels=2, router=RouterConfig(temperature=0.5), prompts=PromptConfig(num_experts=4), mapper=MapperConfig(hidden=8)
    )
    assert config == MoPEConfig(num_labels=2, temperature=0.5, num_experts=4, mapper_hidden=8)
    assert MoPEConfig(num_labels=2, router="complementary").router == RouterConfig("complementary")
    assert (config.num_experts, config.temperature, config.mapper_hidden) == (4, 0.5, 8)
    changed = config.replace(num_experts=2, router="complementary")
    assert (changed.prompts.num_experts, changed.router.kind, changed.router.temperature) == (2, "complementary", 0.5)
    assert config.replace(router=RouterConfig()).temperature == 0.1
    assert MoPEConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert set(config.flat()) == set(MoPEConfig.options()) - {"prompts", "mapper"}
    assert config.replace(router="complementary", temperature=0.2).router == RouterConfig("complementary", temperature=0.2)
    for make in (MoPEConfig, config.replace):
        with pytest.raises(ValueError, match=r"num_experts=3 contradicts prompts.num_experts=4"):
            make(num_labels=2, num_experts=3, prompts=PromptConfig(num_experts=4))
    with pytest.raises(ValueError, match="prompts must be a PromptConfig, got 3"):
        MoPEConfig(num_labels=2, prompts=3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="temperature of a MoPEConfig cannot be changed"):
        config.temperature = 1.0
    with pytest.warns(UserWarning, match="ignoring unknown keys router.temprature"):
        MoPEConfig.from_dict({"num_labels": 2, "router": {"temprature": 1.0}})
