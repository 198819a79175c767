"""Load a checkpoint of the released code as a fusion model of this library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mope.backbones import base_model
from mope.backbones.swin_weights import swin_state_dict
from mope.fusion import MoPEConfig, MoPEForClassification
from mope.printing import first_of

from .checkpoint import read_released_checkpoint
from .encoder import MODES, prompt_tensors

# Tensors of the released text classifier and of first blocks that are never used. The pooler is not used either.
_DEAD = re.compile(r"^(prompt_vectors\.|heads\.|bert_encoder\.pooler\.)|^head\.|\.blocks\.0\.mm_")
# The other released methods do not run, or train weights that the checkpoint does not hold.
_METHODS = ("mope", "instruct_mm_moe_t2v", "instruct_moe_t2v")
_ENCODER = "vision_classifier.encoder."


def load_released_checkpoint(
    path: str | Path, *, vision: nn.Module, text: nn.Module, mode: str = "released"
) -> MoPEForClassification:
    """Load a `.ckpt` of the released code, or the result of `mope convert`, as a `MoPEForClassification`.

    The checkpoint must have been trained with `--use_vpt --use_pbert` and `--fuse_method mope`, `instruct_mm_moe_t2v` (the same)
    or `instruct_moe_t2v` (routers that see only the text).

    The checkpoint holds prompts, routers, mapper and head, but only some tensors of the frozen encoders, so the encoders have to be
    passed. The tensors of the encoders that the checkpoint does hold must match.

    Args:
        path: See `read_released_checkpoint`.
        vision: The transformers `SwinModel` used in training.
        text: The transformers `BertModel` used in training.
        mode: "released", the released order of windows, or "instance"; see `load_released_encoder`.

    Returns:
        The model in eval mode, without the router noise that the released code also adds in evaluation.

    Raises:
        ValueError: The file cannot be read or was trained with another method, tensors are missing, unknown or of another shape, or
            an encoder is not the one used in training.
    """
    if mode not in MODES:
        raise ValueError(f"load_released_checkpoint: mode must be one of {', '.join(MODES)}, got {mode!r}")
    checkpoint = read_released_checkpoint(path)
    method = checkpoint.options.get("fuse_method", "mope")
    if method not in _METHODS:
        raise ValueError(f"{path}: was trained with --fuse_method {method}; only {', '.join(_METHODS)} can be loaded")
    sees_text_only = method == "instruct_moe_t2v"
    vision_part, text_part = checkpoint.part("vision_classifier."), checkpoint.part("text_classifier.")
    encoder = {name.removeprefix("encoder."): t for name, t in vision_part.items() if name.startswith("encoder.")}
    # With the text-only router, the mapper is not part of the vision encoder.
    mapper = "classifier.instruct_proj.0.weight" if sees_text_only else f"{_ENCODER}mm_prompt_instruction_proj.0.weight"
    parts = ["vision_classifier.classifier.weight", f"{_ENCODER}deep_prompt_embeddings_0", mapper, "text_classifier.prompt_vector"]
    if missing := [name for name in parts if name not in checkpoint.tensors]:
        raise ValueError(f"{path}: {', '.join(missing)} missing: this is not a checkpoint of --fuse_method {method}")
    dimensions = dict(zip(parts, (2, 4, 2, 3), strict=True)) | {f"{_ENCODER}prompt_embeddings": 3}
    for name, tensor in checkpoint.tensors.items():
        wanted = 4 if name.startswith(f"{_ENCODER}deep_prompt_embeddings_") else dimensions.get(name)
        if wanted is not None and (tensor.ndim != wanted or not tensor.numel()):
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, expected {wanted} dimensions, none of them 0")
    head, experts, hidden, text_prompts = (checkpoint.tensors[name] for name in parts)
    try:
        config = MoPEConfig.preset(
            method,
            num_labels=len(head),
            num_experts=experts.shape[0] - 1,
            prompt_length=experts.shape[2],
            static_length=experts.shape[2],
            mapper_hidden=len(hidden),
            cross_prompt_length=text_prompts.shape[1],
            prompt_owner=mode,
            problem_type="multi_label" if checkpoint.options.get("dataset") == "imdb" else "single_label",
            importance_weight=checkpoint.options.get("w_imp", 0.01),
        )
    except ValueError as error:
        raise ValueError(f"{path}: its sizes and options are not a valid configuration ({error})") from error
    known = {name for name in encoder if _DEAD.search(name) or _is_prompt(name)}
    _check_backbone(path, "vision", {n: t for n, t in encoder.items() if n not in known}, swin_state_dict(base_model(vision)))
    known = {"prompt_vector"} | {name for name in text_part if _DEAD.search(name)}
    bert = {name.removeprefix("bert_encoder."): t for name, t in text_part.items() if name not in known}
    _check_backbone(path, "text", bert, base_model(text).state_dict())

    state = {f"head.0.{name.removeprefix('classifier.')}": t for name, t in vision_part.items() if name.startswith("classifier.")}
    state |= {f"cross_blocks.{i}.static": prompt for i, prompt in enumerate(text_prompts)}
    prompts = prompt_tensors(encoder)
    if sees_text_only:
        prompts = {n: t for n, t in prompts.items() if not re.match(r"input_prompts|mapper\.|.*\.router\.", n)}
        prompts |= _text_only_tensors(checkpoint.part("classifier."), encoder)
    else:
        # First blocks have neither routers nor prompts.
        prompts = {n: t for n, t in prompts.items() if not re.match(r"stages\.\d+\.0\.", n)}
    state |= {f"vision.{name}": t for name, t in prompts.items()}
    model = MoPEForClassification(config, vision=vision, text=text)
    try:
        _check_shapes(path, state, model.trained_state_dict())
        model.load_state_dict(state, strict=False)
        return model.eval()
    except BaseException:
        # Restore the encoders.
        model.detach()
        raise


def _is_prompt(name: str) -> bool:
    return bool(prompt_tensors({name: torch.empty(1, 0)})) or name.startswith("deep_prompt_embeddings_")


def _text_only_tensors(fusion: Mapping[str, Tensor], encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the mapper and routers of `--fuse_method instruct_moe_t2v` to their names in `MoPESwinEncoder`."""
    found = {f"mapper.{n.removeprefix('instruct_proj.')}": t for n, t in fusion.items() if n.startswith("instruct_proj.")}
    depths = [len(encoder[name][0]) for name in sorted(encoder) if name.startswith("deep_prompt_embeddings_")]
    blocks = [f"stages.{stage}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]
    # The first row is for the first two blocks, which share a router in this library too.
    for i, block in enumerate(blocks[1:]):
        row = f"moe_proj.{i}."
        found |= {f"{block}.router.projection.{n.removeprefix(row)}": t for n, t in fusion.items() if n.startswith(row)}
    return found


def _check_shapes(path: str | Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - state.keys())]
    wrong += [f"{name} is unknown" for name in sorted(state.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & state.keys()):
        if state[name].shape != wanted[name].shape:
            wrong.append(f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}")
        elif state[name].is_floating_point() != wanted[name].is_floating_point():
            wrong.append(f"{name} is {state[name].dtype}, expected {wanted[name].dtype}")
    if wrong:
        raise ValueError(f"{path}: {first_of(wrong, 8)}")


def _check_backbone(path: str | Path, modality: str, found: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Check that a given encoder matches the tensors of the frozen encoder in a checkpoint."""
    unknown = sorted(found.keys() - given.keys())
    if unknown:
        raise ValueError(f"{path}: the {modality} encoder has no {', '.join(unknown[:5])}")
    for name, tensor in found.items():
        if tensor.shape != given[name].shape or not torch.equal(tensor.float(), given[name].float().cpu()):
            raise ValueError(f"{path}: was trained on another {modality} encoder than the one given: {name} differs")
