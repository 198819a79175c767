"""Random combinations of options, drawn by hypothesis: the same on every run of `make test`, new ones in `make test-all`."""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from mope import MoPEConfig, MoPEForClassification

from .test_methods import build, check_gradients, inputs

EVERYTHING = os.environ.get("MOPE_TEST_EVERYTHING", "") not in ("", "0")
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("mope", "mope", "mope", "static_mapped", "late_concat", "ensemble", "image_only", "text_only"),
    "main": ("vision", "text"),
    "num_experts": (1, 2, 16),
    "prompt_length": (1, 3),
    "static_length": (0, 3),
    "use_mapped": (True, False),
    "prompt_depth": ("deep", "deep", "shallow"),
    "blind_prompts": (False, False, True),
    "cross_prompt_length": (0, 2),
    "prompt_first_blocks": (False, True),
    "finetuned": ((), (), ("vision",), ("text",), ("vision", "text")),
    "top_k": (None, 2),
    "renormalize": (False, True),
    "router": ("multimodal", "complementary"),
    "router_scope": ("layer", "shared", "released"),
    "router_self_width": (0, 2),
    "router_embedding": ("frozen", "learned"),
    "noise_std": (None, 0.0, 0.01),
    "mapper_hidden": (0, 5),
    "mapper_batchnorm": (None, True, False),
    "mapper_last_gelu": (None, True, False),
    "head": ("linear", "mlp"),
    "prompt_dropout": (0.0, 0.1),
    "drop_block_prompts": (False, True),
    "prompt_owner": ("instance", "instance", "released"),
    "importance_noise": (True, False),
}
# Combinations that are refused with one of these messages.
REFUSED = (
    "prompt_owner='released' is an order of windows, which only a SwinModel has",
    "prompt_depth='shallow' has static and mapped prompts only",
    "blind_prompts needs prompt_depth='shallow'",
    "blind_prompts is not supported with a SwinModel as the main encoder",
    "a router shared by all blocks of a Swin Transformer cannot see their tokens",
    "finetuned names ",
    "static_mapped without the mapped prompt",
)


@pytest.mark.parametrize("vision", ["swin", "vit"])
@settings(
    max_examples=200 if EVERYTHING else 12,
    derandomize=not EVERYTHING,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}))
def test_any_combination_trains_or_says_why_not(drawn: dict[str, Any], vision: str) -> None:
    """Check that exactly the right parameters train, and that saving, cached features and banks leave the logits unchanged."""
    top_k = drawn.pop("top_k")
    selected = None if top_k is None else min(top_k, drawn["num_experts"])
    options = {"num_labels": 3, "importance_threshold": 0.0, "train_top_k": selected, "eval_top_k": selected, **drawn}
    try:
        model = build(MoPEConfig(**options), vision)
    except ValueError as error:
        assert any(re.search(re.escape(reason), str(error)) for reason in REFUSED), error
        event("refused")
        return
    # With a single expert the router has nothing to choose, and psi may have no other effect.
    check_gradients(model, idle=() if model.config.num_experts > 1 else ("router.", "cross_blocks.", *psi_alone(model)))
    model.eval()
    batch = inputs(model)
    expected = model(**batch)
    assert len(model.routed_blocks()) == len(expected.routing or ())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, backbones="copy")
        loaded = MoPEForClassification.from_pretrained(folder)
    torch.testing.assert_close(loaded(**batch).logits, expected.logits, rtol=1e-9, atol=1e-10)
    if model.config.complementary:
        psi = model.encode_complementary(**batch)
        torch.testing.assert_close(model(**batch, cross_features=psi).logits, expected.logits, rtol=1e-9, atol=1e-10)
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, expected.logits, rtol=1e-8, atol=1e-9)


def psi_alone(model: MoPEForClassification) -> tuple[str, ...]:
    """Return the complementary encoders, by prefix, if routing is the only use of psi."""
    unmapped = model.config.method == "mope" and not model.config.use_mapped
    return tuple(f"{name}." for name in model.config.complementary) if unmapped else ()
