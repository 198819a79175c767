"""Adapter files: their contents, and that a file which does not fit changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mope.modex import Adapters, ModeXConfig, attach

from .tiny import CONFIGS, IMAGE, MODELS, SIZES, attached, inputs, model, output, shake


@pytest.mark.parametrize("name", MODELS)
def test_saved_adapters_come_back_in_another_copy_of_the_model(name, tmp_path):
    made = model(name)
    other = MODELS[name]().double().eval()
    other.load_state_dict(made.state_dict())
    adapters = attach(made, CONFIGS[name])
    shake(adapters.parameters())
    adapters.save_pretrained(tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["modex.safetensors", "modex_config.json"]
    loaded = Adapters.from_pretrained(other, tmp_path / "new")
    given = inputs(name)
    assert torch.equal(output(other, given), output(made, given))
    assert loaded.config == adapters.config
    assert {key for key, p in other.named_parameters() if p.requires_grad} == {
        key for key, p in made.named_parameters() if p.requires_grad
    }


def test_a_file_holds_what_trained_and_nothing_else(tmp_path):
    made, adapters = attached("blip_retrieval")
    adapters.save_pretrained(tmp_path)
    held = load_file(tmp_path / "modex.safetensors")
    assert set(held) == {key for key, p in made.named_parameters() if p.requires_grad}
    assert all(torch.equal(tensor, made.state_dict()[key]) for key, tensor in held.items())

    _, without = attached("blip_retrieval", train_layer_norms=False)
    without.save_pretrained(tmp_path)
    assert not any("norm" in key.lower() for key in load_file(tmp_path / "modex.safetensors"))


def test_a_head_that_trains_is_saved_and_given_back(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGE, num_labels=5)).eval()

    given = inputs("vit", torch.float32)
    made, other = classifier(), classifier()
    before = output(made, given)
    adapters = attach(made, ModeXConfig.preset("vit", trained=["classifier"], train_layer_norms=False))
    assert {key for key, p in made.named_parameters() if p.requires_grad and "visual_" not in key} == {
        "classifier.weight",
        "classifier.bias",
    }
    shake(adapters.parameters())
    adapters.save_pretrained(tmp_path)
    Adapters.from_pretrained(other, tmp_path)
    assert torch.equal(output(other, given), output(made, given))
    adapters.detach()
    assert torch.equal(output(made, given), before)


SITE = "layers.0.visual_msa"


def _renamed(held):
    held["visual_msa.down_weight"] = held.pop(f"{SITE}.down_weight")


def _reshaped(held):
    held[f"{SITE}.up_weight"] = held[f"{SITE}.up_weight"][:, :-1].contiguous()


def _integers(held):
    held[f"{SITE}.up_bias"] = held[f"{SITE}.up_bias"].long()


def _doubled(held):
    held |= {f"again.{key}": tensor.clone() for key, tensor in held.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"layers\.0\.visual_msa\.down_weight is missing; visual_msa\.down_weight is unknown"),
        (_reshaped, r"layers\.0\.visual_msa\.up_weight is \(1, 31, 16\) torch\.float64, expected \(1, 32, 16\)"),
        (_integers, r"layers\.0\.visual_msa\.up_bias is \(1, 32\) torch\.int64"),
        (_doubled, r"(again\.\S+ is unknown; ){10}and [1-9]\d* more$"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tmp_path, change, message):
    _, adapters = attached("vit")
    adapters.save_pretrained(tmp_path)
    file = tmp_path / "modex.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)
    other, given = model("vit"), inputs("vit")
    state, expected = {key: t.clone() for key, t in other.state_dict().items()}, output(other, given)
    with pytest.raises(ValueError, match=message):
        Adapters.from_pretrained(other, tmp_path)
    assert [*other.state_dict()] == [*state]
    assert all(torch.equal(t, state[key]) for key, t in other.state_dict().items())
    assert torch.equal(output(other, given), expected)
    assert all(p.requires_grad for p in other.parameters())
    # The same for a model that already has adapters.
    kept = {key: t.clone() for key, t in adapters.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        adapters.load_state_dict(held)
    assert all(torch.equal(t, kept[key]) for key, t in adapters.state_dict().items())


def test_another_model_is_refused(tmp_path):
    _, adapters = attached("vit")
    adapters.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertModel has no visual_msa, visual_ffn"):
        Adapters.from_pretrained(model("bert"), tmp_path)
    wider = transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "hidden_size": 64}, **IMAGE), add_pooling_layer=False)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "modex.safetensors")) + " does not fit this ViTModel: .*32.*64"):
        Adapters.from_pretrained(wider, tmp_path)


def test_a_damaged_configuration_allocates_nothing(tmp_path):
    made, adapters = attached("vit")
    adapters.save_pretrained(tmp_path)
    adapters.detach()
    ModeXConfig.preset("vit", bottleneck=10**15).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected \(1000000000000000, 32\)"):
        Adapters.from_pretrained(made, tmp_path)
    for size in (10**18, 10**30):
        ModeXConfig.preset("vit", bottleneck=size).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"adapters with bottleneck={size}"):
            Adapters.from_pretrained(made, tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    made, adapters = attached("vit")
    adapters.detach()
    with pytest.raises(FileNotFoundError, match=r"modex_config\.json"):
        Adapters.from_pretrained(made, tmp_path)
    attach(made, CONFIGS["vit"]).save_pretrained(tmp_path)
    Adapters.of(made).detach()
    file = tmp_path / "modex.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"modex\.safetensors is not a readable safetensors file"):
        Adapters.from_pretrained(made, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"modex\.safetensors is missing"):
        Adapters.from_pretrained(made, tmp_path)
    assert not isinstance(getattr(made.layers[0], "visual_msa", None), nn.Module)


def test_the_saved_model_itself_loads_without_adapters(tmp_path):
    """Check that transformers can load a model that was saved with adapters in it, ignoring the adapters."""
    made, adapters = attached("vit", train_layer_norms=False)
    made.save_pretrained(tmp_path)
    plain = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype=torch.float64).eval()
    adapters.detach()
    given = inputs("vit")
    assert torch.equal(output(plain, given), output(made, given))
