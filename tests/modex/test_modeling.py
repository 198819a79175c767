"""ModeX as a classifier: its outputs, trained parameters, saving and loading."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mope.modex import AlbefModel, ModeXConfig, ModeXForClassification
from tests.models.tiny import counted
from tests.modex.tiny import MODELS, shake

CONFIGS = {"albef": ModeXConfig.preset("albef", fusion_layer=1, bottleneck=4), "blip": ModeXConfig.preset("blip", bottleneck=4)}
NAMES = ("no", "yes", "perhaps")


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "blip":
        model = MODELS["blip_retrieval"]()
    else:
        vision: Any = MODELS["vit"]()
        text: Any = MODELS["bert"]()
        model = AlbefModel.from_encoders(vision, text, fusion_layer=1)
    # Far from the initialisation, where the image hardly affects the text.
    shake(model.parameters())
    return model.eval()


def classifier(kind: str = "albef", **options: Any) -> ModeXForClassification:
    model = ModeXForClassification(encoder(kind), CONFIGS[kind], id2label=NAMES, **options).eval()
    # Weights as after training.
    shake(model.trainable_parameters())
    return model


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = torch.randint(3, 50, mask.shape, generator=generator) * mask
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", CONFIGS)
def test_images_of_another_size_are_taken_where_positions_are_interpolated(kind: str) -> None:
    model, given = classifier(kind), inputs() | {"pixel_values": torch.randn(2, 3, 12, 8)}
    with pytest.raises((RuntimeError, ValueError), match=r"size"):
        model(**given)
    found = model(**given, interpolate_pos_encoding=True).logits
    given["pixel_values"] = given["pixel_values"].flip(0)
    assert not torch.allclose(model(**given, interpolate_pos_encoding=True).logits, found)
    native = inputs()
    torch.testing.assert_close(model(**native, interpolate_pos_encoding=True).logits, model(**native).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_head_reads_the_fused_first_token(kind: str) -> None:
    model, given = classifier(kind), inputs()
    found = model(**given, labels=torch.tensor([2, 0]))
    if kind == "albef":
        states = model.encoder(**given).last_hidden_state
    else:
        image = model.encoder.vision_model(given["pixel_values"]).last_hidden_state
        states = model.encoder.text_encoder(
            given["input_ids"], given["attention_mask"], encoder_hidden_states=image
        ).last_hidden_state
    torch.testing.assert_close(found.features, states[:, 0])
    hidden = F.relu(states[:, 0] @ model.head[0].weight.mT + model.head[0].bias)
    logits = hidden @ model.head[2].weight.mT + model.head[2].bias
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, torch.tensor([2, 0])))
    # The result depends on the image, but not on padding.
    other = model(**{**given, "pixel_values": -given["pixel_values"]}).logits
    assert not torch.allclose(other, found.logits, atol=1e-3)
    ids = given["input_ids"] + 7 * (1 - given["attention_mask"])
    torch.testing.assert_close(model(**{**given, "input_ids": ids}).logits, found.logits)


def test_first_token_behind_padding_on_the_left() -> None:
    model, given = classifier(padding_side="left"), inputs()
    rolled = {**given, **{name: given[name].flip(1) for name in ("input_ids", "attention_mask")}}
    states = model.encoder(**rolled).last_hidden_state
    torch.testing.assert_close(model(**rolled).features, torch.stack([states[0, 0], states[1, 2]]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_trains_gets_a_gradient_and_nothing_else_does(kind: str) -> None:
    model = classifier(kind)
    model(**inputs(), labels=torch.tensor([1, 0])).loss.backward()
    norms = {
        f"{name}.{p}" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) for p in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        added = any(f".{kind_of_site}." in name for kind_of_site in CONFIGS[kind].sites) or name.startswith("head.")
        assert parameter.requires_grad == (added or name in norms), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert model.modality_of(name) == ("vision" if name.startswith(("encoder.vision.", "encoder.vision_model.")) else "text")
    assert set(model.trained_state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True])
def test_all_parts_are_in_one_mode(training: bool) -> None:
    model = ModeXForClassification(encoder("albef").train(training), CONFIGS["albef"], 2)
    assert {module.training for module in model.modules()} == {training}


def test_the_decoder_of_vqa_does_not_train(tmp_path: Path) -> None:
    model = ModeXForClassification(MODELS["blip_vqa"](), CONFIGS["blip"], 3).eval()
    shake(model.trainable_parameters())
    loss = model(**inputs(), labels=torch.tensor([0, 1])).loss
    assert loss is not None
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path, backbones="copy")
    with torch.no_grad():
        assert torch.equal(ModeXForClassification.from_pretrained(tmp_path)(**inputs()).logits, model(**inputs()).logits)


def test_without_adapters_only_the_head_trains() -> None:
    model = ModeXForClassification(encoder("albef"), None, num_labels=2)
    assert set(model.trained_state_dict()) == {f"head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(ValueError, match="no adapters"):
        model.routes()


def test_several_labels() -> None:
    model = classifier(problem_type="multi_label")
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    found = model(**inputs(), labels=labels)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(found.logits, labels.float()))
    with pytest.raises(ValueError, match=r"labels must be \(2, 3\)"):
        model(**inputs(), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_detach_gives_the_encoder_back(kind: str) -> None:
    before = encoder(kind)
    model = classifier(kind)
    model.detach()
    after = model.encoder.state_dict()
    assert after.keys() == before.state_dict().keys()
    assert not [name for name, tensor in before.state_dict().items() if not torch.equal(after[name], tensor)]
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    with pytest.raises(RuntimeError, match="detached"):
        model(**inputs())


@pytest.mark.parametrize("kind", CONFIGS)
def test_copies_come_back(kind: str, tmp_path: Path) -> None:
    model = classifier(kind)
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = ModeXForClassification.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    # The copy is the original encoder, with its own LayerNorms.
    loaded.detach()
    state = loaded.encoder.state_dict()
    assert not [name for name, tensor in encoder(kind).state_dict().items() if not torch.equal(state[name], tensor)]


def test_a_reference_wants_the_encoder_that_it_was(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    with pytest.raises(FileNotFoundError, match="was not loaded from a file"):
        ModeXForClassification.from_pretrained(tmp_path)
    loaded = ModeXForClassification.from_pretrained(tmp_path, model=encoder("albef"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)
    assert loaded.fingerprints() == model.fingerprints()
    other = encoder("albef")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    expected = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="another encoder"):
        ModeXForClassification.from_pretrained(tmp_path, model=other)
    # The same weights, but another number of heads.
    heads = encoder("albef")
    config = heads.config.to_dict()
    config["text_config"]["num_attention_heads"] = 4
    heads = AlbefModel(type(heads.config)(**config))
    heads.load_state_dict(encoder("albef").state_dict())
    with pytest.raises(ValueError, match="another encoder"):
        ModeXForClassification.from_pretrained(tmp_path, model=heads)
    # The encoder is returned unchanged.
    assert other.state_dict().keys() == expected.keys()


@pytest.mark.parametrize(
    ("kind", "fingerprint"),
    [("albef", "99993f3a44d0863d"), ("blip_retrieval", "f2d3cf240d7c3a58"), ("blip_vqa", "b47265a0c7e5d175")],
)
def test_fingerprints_are_those_that_checkpoints_have(kind: str, fingerprint: str) -> None:
    """The content of the digest must never change, or checkpoints saved by name would no longer find their encoders."""
    given = encoder(kind) if kind == "albef" else MODELS[kind]()
    assert ModeXForClassification(counted(given), None, 2).fingerprints()["encoder"].startswith(fingerprint)


def test_modules_that_train_beside_the_adapters_come_back(tmp_path: Path) -> None:
    config = CONFIGS["albef"].replace(trained=("text.encoder.layer.*.crossattention",))
    model = ModeXForClassification(encoder("albef"), config, id2label=NAMES).eval()
    assert "encoder.text.encoder.layer.1.crossattention.self.query.weight" in model.trained_state_dict()
    shake(model.trainable_parameters())
    model.save_pretrained(tmp_path, backbones="copy")
    with torch.no_grad():
        assert torch.equal(ModeXForClassification.from_pretrained(tmp_path)(**inputs()).logits, model(**inputs()).logits)


def test_nothing_that_trains_is_lost(tmp_path: Path) -> None:
    model = classifier()
    model.encoder.text.encoder.layer[1].output.dense.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 trained parameters .*layer\.1\.output\.dense\.bias"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        ModeXForClassification.from_pretrained(tmp_path)
    classifier().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    for changes, message in (
        ({"system": "other"}, "not the configuration of a ModeX"),
        ({"encoder": {}}, "record of the encoder"),
        ({"id2label": {"0": "a", "2": "b"}}, "must name the classes"),
        ({"problem_type": "ranking"}, "problem_type must be"),
        ({"adapters": {**good["adapters"], "unheard_of": 1}}, "unheard_of"),
        ({"adapters": {**good["adapters"], "bottleneck": 8}}, "does not fit the encoder"),
        ({"adapters": {**good["adapters"], "bottleneck": 10**15}}, "does not fit the encoder"),
        ({"adapters": {**good["adapters"], "trained": 3}}, "trained must be a list"),
        ({"encoder": {**good["encoder"], "class": "BertModel", "source": "somewhere"}}, "not a known fused encoder"),
    ):
        file.write_text(json.dumps({**good, **changes}))
        given = None if "fused encoder" in message else encoder("albef")
        with pytest.raises(ValueError, match=message):
            ModeXForClassification.from_pretrained(tmp_path, model=given)
    for text in ("{", "[" * 100_000, "9" * 5000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
            ModeXForClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"vision_config": 3}, {"text_config": 3}, {"text_config": {"hidden_size": "a"}}, {"fusion_layer": "a"}]
)
def test_a_damaged_copy_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path, backbones="copy")
    file = tmp_path / "encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"cannot load the encoder, a AlbefModel, from .*encoder"):
        ModeXForClassification.from_pretrained(tmp_path)


def test_what_does_not_fit_leaves_the_encoder_alone(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "head.0.bias": torch.zeros(1)}, file)
    given = encoder("albef")
    expected = copy.deepcopy(given.state_dict())
    with pytest.raises(ValueError, match=r"head\.0\.bias is \(1,\)"):
        ModeXForClassification.from_pretrained(tmp_path, model=given)
    assert all(p.requires_grad for p in given.parameters())
    assert given.state_dict().keys() == expected.keys()
    ModeXForClassification(given, CONFIGS["albef"], 3)
    with pytest.raises(ValueError, match="already has adapters attached"):
        ModeXForClassification.from_pretrained(tmp_path, model=given)


def test_a_model_that_was_made_smaller_comes_back(tmp_path: Path) -> None:
    model = classifier().half()
    model.save_pretrained(tmp_path, backbones="copy")
    saved, loaded = model.trained_state_dict(), ModeXForClassification.from_pretrained(tmp_path).trained_state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name].float(), loaded[name].float()) for name in saved)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="must be AlbefModel"):
        ModeXForClassification(MODELS["bert"](), CONFIGS["albef"], 2)
    with pytest.raises(ValueError, match="give num_labels or id2label"):
        ModeXForClassification(encoder("albef"), None)
    with pytest.raises(ValueError, match="num_labels is 2"):
        ModeXForClassification(encoder("albef"), None, 2, id2label=NAMES)
    with pytest.raises(ValueError, match=r"id2label must be a sequence of names or .*, got 'yes'"):
        ModeXForClassification(encoder("albef"), None, id2label="yes")
    given = inputs()
    with pytest.raises(ValueError, match="same number of items, got 1 in pixel_values, 2 in input_ids"):
        classifier()(**{**given, "pixel_values": given["pixel_values"][:1]})
    with pytest.raises(ValueError, match="pads on the left"):
        classifier().tokenizer = type("Tokenizer", (), {"padding_side": "left"})()


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_signature_lists_the_inputs_and_others_are_refused(again: Callable[[nn.Module], nn.Module]) -> None:
    model, given = classifier(), inputs()
    expected, model = model(**given).logits, again(model)
    names = "pixel_values input_ids token_type_ids attention_mask labels interpolate_pos_encoding"
    assert " ".join(inspect.signature(model.forward).parameters) == names
    assert torch.equal(model(**given, token_type_ids=None).logits, expected)
    # Neither encoder accepts these.
    for name in ("position_ids", "pixels"):
        with pytest.raises(TypeError, match=f"ModeXForClassification: no encoder reads {name}"):
            model(**given, **{name: given["input_ids"]})
    for name in ("pixel_values", "input_ids"):
        with pytest.raises(ValueError, match=f"method 'modex' works on vision and text: {name} must be given"):
            model(**{**given, name: None})
    with pytest.raises(TypeError, match="input_ids must be a tensor of numbers"):
        model(**{**given, "input_ids": ["a text"]})


def test_token_types_reach_albef_and_not_blip() -> None:
    given, types = inputs(), torch.ones(2, 5, dtype=torch.long)
    for kind, reads in (("albef", True), ("blip", False)):
        model = classifier(kind)
        assert torch.equal(model(**given, token_type_ids=types).logits, model(**given).logits) is not reads


def test_16_bits_and_oneDNN_change_little_and_are_undone() -> None:
    model, given = classifier(), inputs()
    with torch.no_grad():
        plain = model(**given).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(**given).logits
        model.cast_frozen(torch.bfloat16)
        assert model.encoder.text.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
        assert torch.equal(model(**given).logits, autocast)
        assert model.fingerprints() == classifier().fingerprints()
        model.cast_frozen(None)
        with model.prepacked():
            torch.testing.assert_close(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)
    with pytest.raises(ValueError, match=r"torch\.float16, torch\.bfloat16"):
        model.cast_frozen(torch.float64)


def test_another_dtype_is_refused_while_weights_are_cast() -> None:
    """The rounded values would not be restored."""
    model = classifier().float()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.cast_frozen(torch.bfloat16)
    with pytest.raises(ValueError, match=r"call cast_frozen\(None\) before changing the dtype"):
        model.double()
    model.to("cpu").cast_frozen(None)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = classifier(kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(), labels=torch.tensor([1, 0])).loss.backward()
        found.append([p.grad for p in model.trainable_parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_smaller_copies_are_cast_back(tmp_path: Path) -> None:
    model = classifier().float()
    model.save_pretrained(tmp_path, backbones="copy", dtype=torch.float16)
    stored = load_file(tmp_path / "encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    loaded = ModeXForClassification.from_pretrained(tmp_path)
    weight = loaded.encoder.text.encoder.layer[0].output.dense.weight
    assert torch.equal(weight, model.encoder.text.encoder.layer[0].output.dense.weight.half().float())
