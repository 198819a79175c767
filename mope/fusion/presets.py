"""Published configurations, and the fusion methods of the released code under their original names.

They are intended for a Swin Transformer as vision (prompt length 6) and a BERT as text (prompt length 4), but run with any known
encoder. The complementary encoder is frozen and prompted, as with `--train_instructor` in the released code;
`cross_prompt_length=0` removes its prompts.
"""

from __future__ import annotations

from typing import Any

_VISION_FIRST = {"main": "vision", "static_length": 6, "prompt_length": 6, "cross_prompt_length": 4}
_TEXT_FIRST = {"main": "text", "static_length": 4, "prompt_length": 4, "cross_prompt_length": 6}
# All methods except mope prompt every block of a Swin Transformer, and apply dropout to all prompts.
_EVERY_BLOCK = {"prompt_first_blocks": True, "drop_block_prompts": True, "prompt_dropout": 0.1}

# MoPE, arXiv 2403.10568 v4: three kinds of prompts, and a router that sees both modalities.
_MOPE = {
    "method": "mope",
    **_VISION_FIRST,
    "num_experts": 4,
    "use_mapped": True,
    "router": "multimodal",
    "temperature": 0.1,
    "noise_std": 1 / 256,
    "router_self_width": 2,
    "router_cross_width": 8,
    "router_embedding": "frozen",
    "mapper_hidden": 384,
    "prompt_dropout": 0.1,
    "importance_weight": 0.01,
    "importance_threshold": 0.1,
}
# The router sees only the complementary modality. The released code adds noise of 1 / K^2, and treats a CV^2 up to 0.05 as even.
_COMPLEMENTARY = {
    "method": "mope",
    **_EVERY_BLOCK,
    "num_experts": 4,
    "router": "complementary",
    "temperature": 0.1,
    "noise_std": None,
    "importance_weight": 0.01,
    "importance_threshold": 0.05,
}
# One mapped prompt and static prompts. The mapper of the released code ends in a GELU.
_INSTRUCT = {"method": "static_mapped", **_EVERY_BLOCK, "mapper_batchnorm": True, "mapper_last_gelu": True}
_INSTRUCT_V2T = {**_INSTRUCT, **_TEXT_FIRST, "mapper_hidden": 1500}
# "Modular and Parameter-Efficient Multimodal Fusion with Prompting" (arXiv 2203.08055): the feature of a frozen vision encoder and
# 20 prompt vectors in front of the text.
_PROMPTFUSE = {
    "method": "static_mapped",
    "main": "text",
    "prompt_depth": "shallow",
    "static_length": 20,
    "cross_prompt_length": 0,
    "mapper_hidden": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "mope-v4": _MOPE,
    # v1 of the paper learns the routing embedding.
    "mope-v1": {**_MOPE, "router_embedding": "learned"},
    # Conditional Prompt Tuning, arXiv 2312.03734: a CV up to 0.05 (CV^2 of 0.0025) is even, and loads are computed without noise.
    "cpt": {
        **_COMPLEMENTARY,
        **_VISION_FIRST,
        "num_experts": 16,
        "mapper_hidden": 384,
        "mapper_batchnorm": False,
        "importance_threshold": 0.0025,
        "importance_noise": False,
    },
    "mope": _MOPE,
    "instruct_mm_moe_t2v": _MOPE,
    # There is no counterpart in the released code.
    "mope_v2t": {**_MOPE, **_TEXT_FIRST},
    "instruct_moe_t2v": {
        **_COMPLEMENTARY,
        **_VISION_FIRST,
        "router_scope": "released",
        "mapper_hidden": 384,
        "mapper_batchnorm": False,
    },
    "instruct_moe_v2t": {
        **_COMPLEMENTARY,
        **_TEXT_FIRST,
        "mapper_hidden": 512,
        "mapper_batchnorm": True,
        "mapper_last_gelu": True,
    },
    "instruct_t2v": {**_INSTRUCT, **_VISION_FIRST, "mapper_hidden": 384},
    "instruct_v2t": _INSTRUCT_V2T,
    # In the released code, this is another name of instruct_v2t.
    "p_sequential": _INSTRUCT_V2T,
    "sequentialfuse": {
        **_INSTRUCT_V2T,
        "static_length": 0,
        "cross_prompt_length": 0,
        "mapper_hidden": 512,
        "finetuned": ("vision", "text"),
    },
    "promptfuse": _PROMPTFUSE,
    "blindprompt": {**_PROMPTFUSE, "blind_prompts": True},
    "late_concat": {"method": "late_concat", **_VISION_FIRST, **_EVERY_BLOCK},
    "ens": {"method": "ensemble", **_VISION_FIRST, **_EVERY_BLOCK},
    # Static prompts in every block: VPT-deep.
    "img_only": {"method": "image_only", "static_length": 6, **_EVERY_BLOCK},
    "text_only": {"method": "text_only", "static_length": 4, **_EVERY_BLOCK},
}
