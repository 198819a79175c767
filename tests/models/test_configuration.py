import dataclasses
import json
import warnings
from typing import Any

import pytest

from mope import MoPEConfig
from mope.fusion import PRESETS


def test_json_round_trip() -> None:
    config = MoPEConfig(id2label=["no", "yes"], prompted_layers=(0, -1), eval_top_k=1, main="text")
    text = json.dumps(config.to_dict())
    assert MoPEConfig.from_dict(json.loads(text)) == config
    assert json.loads(text)["mope_version"]
    assert config.num_labels == 2 and config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}


def test_what_follows_from_other_fields_is_filled_in() -> None:
    assert MoPEConfig(num_labels=2).static_length == 4
    assert MoPEConfig(num_labels=2, method="late_concat").static_length == 0
    assert MoPEConfig(num_labels=2, method="text_only").main == "text"
    assert MoPEConfig(num_labels=2, method="image_only", main="text").modalities == ("vision",)
    assert MoPEConfig(num_labels=2, main="text").modalities == ("text", "vision")
    assert MoPEConfig(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_presets() -> None:
    """Check the published hyperparameters."""
    v4 = MoPEConfig.preset("mope-v4", num_labels=23, problem_type="multi_label")
    assert (v4.num_experts, v4.prompt_length, v4.static_length, v4.cross_prompt_length, v4.mapper_hidden) == (4, 6, 6, 4, 384)
    assert (v4.temperature, v4.noise_std, v4.router_self_width, v4.router_cross_width) == (0.1, 1 / 256, 2, 8)
    assert (v4.importance_weight, v4.importance_threshold, v4.prompt_dropout) == (0.01, 0.1, 0.1)
    assert (v4.router_embedding, v4.prompt_owner, v4.train_top_k) == ("frozen", "instance", None)
    assert v4.replace(router_embedding="learned") == MoPEConfig.preset("mope-v1", num_labels=23, problem_type="multi_label")
    assert MoPEConfig.preset("mope-v4", num_labels=2, num_experts=16).num_experts == 16
    with pytest.raises(ValueError, match=r"preset must be one of 'mope-v4', 'mope-v1', .*, got 'mope-v5'"):
        MoPEConfig.preset("mope-v5", num_labels=2)


def test_the_methods_of_the_released_code() -> None:
    """Check the presets under the names of the released code, with the known properties of each."""
    released = ["img_only", "text_only", "ens", "late_concat", "instruct_t2v", "instruct_v2t"]
    released += ["instruct_moe_t2v", "instruct_moe_v2t"]
    released += ["mope", "instruct_mm_moe_t2v", "sequentialfuse", "p_sequential", "promptfuse", "blindprompt"]
    assert {*released, "mope_v2t", "mope-v1", "mope-v4", "cpt"} == set(PRESETS)
    presets = {name: MoPEConfig.preset(name, num_labels=2) for name in PRESETS}
    for name, config in presets.items():
        towards = name.split("_")[-1]
        if towards in ("t2v", "v2t"):
            assert config.main == ("vision" if towards == "t2v" else "text"), name
        assert (config.router.kind == "complementary") == (name in ("cpt", "instruct_moe_t2v", "instruct_moe_v2t")), name
        assert MoPEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert presets["mope"] == presets["mope-v4"] == presets["instruct_mm_moe_t2v"]
    assert (presets["sequentialfuse"].mapper_hidden, presets["sequentialfuse"].finetuned) == (512, ("vision", "text"))
    assert (presets["p_sequential"].mapper_hidden, presets["p_sequential"].finetuned) == (1500, ())
    assert presets["promptfuse"].static_length == 20 and presets["promptfuse"].prompt_depth == "shallow"
    assert presets["blindprompt"] == presets["promptfuse"].replace(blind_prompts=True)
    cpt = presets["cpt"]
    assert (cpt.router_scope, presets["instruct_moe_t2v"].router_scope) == ("layer", "released")
    assert (cpt.num_experts, cpt.prompt_length, cpt.noise_std, cpt.importance_threshold) == (16, 6, 1 / 256, 0.0025)
    assert (presets["instruct_moe_t2v"].noise_std, presets["instruct_moe_t2v"].importance_threshold) == (1 / 16, 0.05)
    assert MoPEConfig.preset("instruct_moe_t2v", num_labels=2, num_experts=8).noise_std == 1 / 64


def test_unknown_keys_are_named() -> None:
    with pytest.warns(UserWarning, match="flavour, colour|colour, flavour"):
        config = MoPEConfig.from_dict({"num_labels": 2, "colour": 1, "flavour": 2})
    assert config == MoPEConfig(num_labels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoPEConfig.from_dict({**config.to_dict(), "backbones": {}})


def test_configs_do_not_change() -> None:
    config = MoPEConfig(num_labels=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 3  # type: ignore[misc]
    assert config.replace(num_experts=3).num_experts == 3 and config.num_experts == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_labels": 0}, "give num_labels or id2label"),
        ({"num_labels": 3, "id2label": ["a"]}, "id2label must name 0..2"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label must name 0..1"),
        ({"method": "cross_attention"}, "method must be one of 'mope'"),
        ({"main": "audio"}, "modality 'audio' is not known; known are 'text', 'vision'"),
        ({"main": []}, r"main must be the name of a modality, got \[\]"),
        ({"method": ["mope"]}, "method must be one of 'mope'"),
        ({"num_labels": "3"}, "num_labels must be an integer of at least 1, got '3'"),
        ({"id2label": "ab"}, "id2label must be a sequence of names or {index: name}, got 'ab'"),
        ({"id2label": {"a", "b"}}, "id2label must be a sequence of names"),
        ({"id2label": [1, 2]}, "id2label must hold names, got 1"),
        ({"id2label": {"first": "a"}}, "id2label must have integers for keys"),
        ({"temperature": float("inf")}, "temperature must be positive, got inf"),
        ({"temperature": 10**400}, "temperature must be positive, got 10000"),
        ({"noise_std": float("nan")}, "noise_std must be 0 or more, got nan"),
        ({"head": "deep"}, "head must be one of"),
        ({"num_experts": 0}, "num_experts must be an integer of at least 1"),
        ({"static_length": 1.5}, "static_length must be an integer"),
        ({"eval_top_k": 17}, "eval_top_k must be None"),
        ({"train_top_k": 0}, "train_top_k must be None"),
        ({"prompted_layers": b"\x01"}, "prompted_layers must be integers"),
        ({"train_top_k": "2"}, "train_top_k must be None .* got '2'"),
        ({"eval_top_k": 1.5}, "eval_top_k must be None"),
        ({"num_experts": "4", "noise_std": None}, "num_experts must be an integer of at least 1, got '4'"),
        ({"noise_std": "none"}, "noise_std must be 0 or more, got 'none'"),
        ({"temperature": "low"}, "temperature must be positive, got 'low'"),
        ({"prompt_dropout": None}, "prompt_dropout must be in"),
        # Any non-empty string is truthy, even "no".
        ({"use_mapped": "no"}, "use_mapped must be true or false, got 'no'"),
        ({"mapper_batchnorm": 0}, "mapper_batchnorm must be true or false, got 0"),
        ({"finetuned": "text"}, r"finetuned must be a sequence, such as \['text'\], got 'text'"),
        ({"prompted_layers": 1}, "prompted_layers must be integers"),
        ({"prompted_layers": ["first"]}, "prompted_layers must be integers"),
        # The mapper would get no gradient.
        ({"prompted_layers": []}, "prompted_layers must be integers, at least one, or None"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"prompt_init_bound": -1.0}, "prompt_init_bound must be positive"),
        ({"noise_std": -1.0}, "noise_std must be 0 or more"),
        ({"prompt_dropout": 1.0}, "prompt_dropout must be in"),
        ({"router_self_width": 0, "router_cross_width": 0}, "would see nothing"),
        ({"method": "static_mapped", "use_mapped": False}, "image_only"),
        ({"prompt_owner": "window"}, "prompt_owner must be one of 'instance', 'released'"),
        ({"padding_side": "both"}, "padding_side must be one of"),
        ({"router": "text"}, "router must be one of 'multimodal', 'complementary'"),
        ({"router_scope": "stage"}, "router_scope must be one of 'layer', 'shared', 'released'"),
        ({"prompt_depth": "input"}, "prompt_depth must be one of 'deep', 'shallow'"),
        ({"prompt_depth": "shallow"}, "experts are routed layer by layer: set prompt_depth='deep', or method='static_mapped'"),
        ({"prompt_depth": "shallow", "method": "image_only", "prompted_layers": [0]}, "prompted_layers selects the layers"),
        ({"blind_prompts": True}, "blind_prompts needs prompt_depth='shallow'"),
        ({"impl": "tritn"}, "impl must be 'auto' or one of triton, cpu, .* got 'tritn'"),
        ({"impl": "cpu,fast"}, "got 'fast'"),
        ({"impl": None}, "impl must be a name, or several"),
        ({"finetuned": ["audio"]}, "finetuned names 'audio', but method 'mope' works on vision and text"),
        ({"finetuned": ["text"], "method": "image_only"}, "finetuned names 'text', but method 'image_only' works on vision"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoPEConfig(**({"num_labels": 2} if "id2label" not in values else {}) | values)


def test_classes_of_a_changed_copy() -> None:
    """Number and names of classes follow from each other, unless the names were given."""
    config = MoPEConfig(num_labels=2)
    assert config.replace(id2label=["a", "b", "c"]).num_labels == 3
    assert config.replace(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    with pytest.raises(ValueError, match=r"id2label must name 0\.\.2"):
        MoPEConfig(id2label=["a", "b"]).replace(num_labels=3)
