"""Valid adapter configurations, and reading them back from a file."""

from __future__ import annotations

import json

import pytest

from mope.modex import ModeXConfig


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = ModeXConfig.preset("albef", fusion_layer=2, modules={"head.*": "plain"}, trained=["classifier"], dropout=0.1)
    config.save_pretrained(tmp_path / "new")
    assert ModeXConfig.from_pretrained(tmp_path / "new") == config
    assert config.layers == {"textual_ffn": (0, 1)}


def test_unknown_keys_are_refused_by_name(tmp_path):
    ModeXConfig.preset("vit").save_pretrained(tmp_path)
    file = tmp_path / "modex_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank": 8, "alpha": 16}))
    with pytest.raises(ValueError, match=r"modex_config\.json: ModeXConfig: unknown keys alpha, rank"):
        ModeXConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"sites": 3}', '{"sites": {"visual_msa": null}}', "[" * 100_000, '{"bottleneck": ' + "9" * 5000 + "}"],
    ids=["cut", "list", "sites", "adapter", "deep", "long"],
)
def test_damaged_files_are_refused(tmp_path, text):
    (tmp_path / "modex_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"modex_config\.json"):
        ModeXConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"modex_config\.json"):
        ModeXConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give sites or modules"),
        ({"sites": {"visual": "plain"}}, "sites may name visual_msa.* got visual"),
        ({"sites": {"visual_msa": "lora"}}, "visual_msa must be 'plain' or 'expert', got 'lora'"),
        ({"modules": {"mlp": "mec"}}, "mlp must be 'plain' or 'expert', got 'mec'"),
        ({"sites": ["visual_msa"]}, "sites must map names"),
        ({"sites": {"visual_msa": "plain"}, "layers": {"visual_ffn": [0]}}, "layers has visual_ffn, but sites does not"),
        ({"sites": {"visual_msa": "plain"}, "layers": {"visual_msa": []}}, "layers of visual_msa must be one or more integers"),
        ({"sites": {"visual_msa": "plain"}, "layers": {"visual_msa": [-1]}}, "layers of visual_msa must be one or more integers"),
        ({"sites": {"visual_msa": "plain"}, "trained": "classifier"}, "trained must be a list"),
        ({"sites": {"visual_msa": "plain"}, "trained": 3}, "trained must be a list of patterns, got 3"),
        ({"sites": {"visual_msa": "plain"}, "bottleneck": 0}, "bottleneck must be an integer of at least 1, got 0"),
        ({"sites": {"visual_msa": "plain"}, "num_experts": 1}, "num_experts must be an integer of at least 2, got 1"),
        ({"sites": {"visual_msa": "plain"}, "temperature": 0}, "temperature must be positive, got 0"),
        ({"sites": {"visual_msa": "plain"}, "temperature": float("inf")}, "temperature must be positive, got inf"),
        ({"sites": {"visual_msa": "plain"}, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"sites": {"visual_msa": "plain"}, "activation": "tanh"}, "activation must be one of relu, gelu, got 'tanh'"),
        ({"sites": {"visual_msa": "plain"}, "train_layer_norms": "no"}, "train_layer_norms must be true or false"),
        ({"sites": {"visual_msa": "plain"}, "impl": "cuda"}, "impl"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ModeXConfig(**values)


def test_presets_are_those_that_were_published():
    albef, blip = ModeXConfig.preset("albef"), ModeXConfig.preset("blip")
    plain = {"visual_msa": "plain", "visual_ffn": "plain"}
    assert albef.sites == {
        **plain,
        "textual_msa": "plain",
        "textual_ffn": "plain",
        "cross_msa": "expert",
        "cross_ffn": "expert",
    }
    assert albef.layers == {"textual_ffn": tuple(range(6))}
    assert ModeXConfig.preset("albef", sites=plain) == ModeXConfig(sites=plain)
    fused = ModeXConfig.preset("albef", fusion_layer=0)
    assert "textual_ffn" not in fused.sites
    assert fused.layers == {}
    with pytest.raises(ValueError, match="fusion_layer must be an integer >= 0, got '2'"):
        ModeXConfig.preset("albef", fusion_layer="2")  # type: ignore[arg-type]
    assert blip.sites == {**plain, "cross_msa": "expert"}
    assert (albef.bottleneck, albef.num_experts, albef.temperature, albef.activation) == (16, 3, 10.0, "relu")
    with pytest.raises(ValueError, match="preset must be one of albef, blip, vit, bert, clip, got 'flava'"):
        ModeXConfig.preset("flava")
