"""Load state dicts of the released code of ModeX into models of transformers."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BlipTextModel, BlipVisionModel, ViTModel

from mope.fused import ExpertAdapter
from mope.fusion.checkpoint import LOADABLE
from mope.printing import first_of
from mope.released.checkpoint import read_pickle, refuse_strangers, same

# The adapters of a layer appear in every module that uses them: the image block, the text layer and up to three of its submodules.
_ADAPTER = re.compile(r"(?:visual_encoder\.blocks|text_encoder\.encoder\.layer)\.(\d+)\.(?:\w+\.)*modex\.(\w+)\.(.+)")
# Reason -> names of tensors that are omitted on purpose.
_IGNORED = {
    "momentum copy": re.compile(r"\w+_m\."),
    "queue of training": re.compile(r"(image|text|idx)_queue$|queue_ptr$|ptr_queue$"),
    "counts up from 0": re.compile(r".*\.position_ids$"),
}
_HEADS = re.compile(r"(cls_head|itm_head|vision_proj|text_proj|text_encoder\.cls)\.|temp$")
_POSITIONS = "visual_encoder.pos_embed"
# Patterns of released names below an image encoder -> ours.
_VIT = {
    r"cls_token$": "embeddings.cls_token",
    r"pos_embed$": "embeddings.position_embeddings",
    r"patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"norm\.": "layernorm.",
    r"blocks\.(\d+)\.norm1\.": r"layers.\1.layernorm_before.",
    r"blocks\.(\d+)\.norm2\.": r"layers.\1.layernorm_after.",
    r"blocks\.(\d+)\.attn\.proj\.": r"layers.\1.attention.o_proj.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"layers.\1.attention.qkv.",
    r"blocks\.(\d+)\.mlp\.": r"layers.\1.mlp.",
}
_BLIP_VISION = {
    r"cls_token$": "embeddings.class_embedding",
    r"pos_embed$": "embeddings.position_embedding",
    r"patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"norm\.": "post_layernorm.",
    r"blocks\.(\d+)\.norm1\.": r"encoder.layers.\1.layer_norm1.",
    r"blocks\.(\d+)\.norm2\.": r"encoder.layers.\1.layer_norm2.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
}


@dataclass(frozen=True)
class ReleasedReport:
    """Report on loading a released state dict.

    Attributes:
        loaded: Names of the model's tensors that have new values.
        resized: Those among `loaded` that are position embeddings interpolated to the model's number of patches.
        missing: Names of the model's tensors that are not in the file, and keep their values.
        left_over: Released names of tensors for which the model has no counterpart.
        ignored: Released names of tensors that are omitted on purpose, with the reason.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    ignored: dict[str, str]

    def __str__(self) -> str:
        found = f"{len(self.loaded)} tensors loaded, {len(self.ignored)} left out on purpose"
        lists = {"interpolated": self.resized, "missing in the file": self.missing, "without a place in the model": self.left_over}
        for what, names in lists.items():
            if names:
                found += f"; {len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        return found


def load_released_state_dict(model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, strict: bool = True) -> ReleasedReport:
    """Load a state dict of the released code of ModeX into a model with attached adapters, or only encoders into one without.

    The released code saves the adapters of a layer under every module that uses them; these copies must agree. The text encoders
    of ALBEF and BLIP have no token type embeddings, so those of the model are set to zero. Position embeddings for images of
    another size are interpolated, as in the released code.

    Args:
        model: Model with one image encoder and one text encoder: an `AlbefModel`, transformers' `BlipForImageTextRetrieval`, or a
            model that contains one of these, such as a `ModeXForClassification`.
        source: The state dict, or a file that holds it directly or as "model" (`checkpoint_best.pth`), or as safetensors.
            A `.pth` is a pickle; nothing in it is executed.
        strict: Whether to raise an error if tensors are missing or left over, instead of only reporting them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, only one of file and model has adapters, copies of a tensor differ, or tensors
            do not fit. The model is left unchanged.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = _state(source, where)
    adapters, rest, ignored = _sort(state, where)
    names = ", ".join([*state][:5]) or "nowhere"
    vision, text = _only(model, ViTModel, BlipVisionModel), _only(model, BertModel, BlipTextModel)
    placed = _places(model, vision, text)
    if adapters and not placed:
        raise ValueError(f"{type(model).__name__} has no adapters: attach(model, ModeXConfig.preset('albef')) first, or 'blip'")
    if placed and not adapters:
        raise ValueError(f"{where} holds no adapters of ModeX, its names begin {names}: load only encoders before attach")

    own = model.state_dict()
    tensors: dict[str, Tensor] = {}
    resized, left_over = [], []
    for name, tensor in rest.items():
        found = _rename(name, tensor, model, vision, text)
        if found.keys() <= own.keys():
            fitting = {ours: _interpolated(t, own[ours].shape) if name == _POSITIONS else t for ours, t in found.items()}
            resized += [ours for ours in found if fitting[ours] is not found[ours]]
            tensors |= fitting
        elif _HEADS.match(name):
            ignored[name] = "a head that the model does not have"
        else:
            left_over.append(name)
    if not (tensors or adapters):
        raise ValueError(f"{where} holds neither adapters nor encoders, its names begin {names}")
    token_types = f"{text}.embeddings.token_type_embeddings.weight"
    if token_types in own and f"{text}.embeddings.word_embeddings.weight" in tensors:
        tensors.setdefault(token_types, torch.zeros_like(own[token_types]))
    for site, parts in adapters.items():
        if site in placed:
            tensors |= _adapter(*placed[site], parts, f"{where}: {_describe(site)}")
        else:
            left_over += [f"{_describe(site)}.{part}" for part in parts]

    missing = [name for name in own if name not in tensors]
    report = ReleasedReport(tuple(tensors), tuple(resized), tuple(missing), tuple(left_over), ignored)
    _check_fit(tensors, own, where)
    if strict and (missing or left_over):
        raise ValueError(f"{where}: {report}. Nothing was loaded; strict=False loads what there is")
    if diverged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        warnings.warn(f"{where}: {len(diverged)} tensors hold NaN or infinity: {', '.join(diverged[:8])}", stacklevel=2)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return report


def _state(source: Mapping[str, Any] | str | Path, where: str) -> Mapping[str, Tensor]:
    content = source if isinstance(source, Mapping) else _read(Path(source))
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: expected a state dict, by itself or as 'model', found {type(state).__name__}")
    if strangers := [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"{where}: these are not tensors: {', '.join(map(str, strangers[:5]))}")
    if not isinstance(source, Mapping):
        refuse_strangers(state, f"{where}:")
    return state


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        return read_pickle(path, "{'model': model.state_dict()}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable file of tensors ({error})") from error


def _sort(
    state: Mapping[str, Tensor], where: str
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], dict[str, Tensor], dict[str, str]]:
    """Return adapters by (layer, site) and part without copies, all other tensors to load, and reasons of ignored ones by name."""
    adapters: dict[tuple[int, str], dict[str, Tensor]] = {}
    first: dict[tuple[str, ...], str] = {}
    rest, ignored = {}, {}
    for name, tensor in state.items():
        if reason := next((reason for reason, pattern in _IGNORED.items() if pattern.match(name)), None):
            ignored[name] = reason
        elif found := _ADAPTER.fullmatch(name):
            layer, site, part = found.groups()
            parts = adapters.setdefault((int(layer), site), {})
            alias = first.setdefault((layer, site, part), name)
            if not same(parts.setdefault(part, tensor), tensor):
                raise ValueError(f"{where}: {alias} and {name} are copies of one tensor but differ, so one is not what was trained")
        else:
            rest[name] = tensor
    return adapters, rest, ignored


def _only(model: nn.Module, *kinds: type[nn.Module]) -> str:
    """Return the name of the only module of these classes. ValueError if there is not exactly one."""
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if len(names) != 1:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{type(model).__name__} must hold one {wanted}, it holds {', '.join(names) or 'none'}")
    return names[0]


def _rename(name: str, tensor: Tensor, model: nn.Module, vision: str, text: str) -> dict[str, Tensor]:
    """Return a released tensor, possibly split, under the names that it may have in the model."""
    encoder, _, below = name.partition(".")
    if encoder == "text_encoder":
        # A pre-trained text encoder with its own head has an additional level, "bert.".
        return {f"{text}.{below.removeprefix('bert.')}": tensor}
    if encoder == "cls_head":
        return {f"head.{below}": tensor}
    if encoder != "visual_encoder":
        holder = vision.rpartition(".")[0]
        return {f"{holder}.{name}" if holder else name: tensor}
    for pattern, ours in (_VIT if isinstance(model.get_submodule(vision), ViTModel) else _BLIP_VISION).items():
        below, changed = re.subn(f"^{pattern}", ours, below)
        if changed:
            break
    own = f"{vision}.{below}"
    if ".attention.qkv." not in own or tensor.dim() == 0 or len(tensor) % 3:
        return {own: tensor}
    # The released code fuses the three projections of the model into one.
    return {own.replace(".qkv.", f".{part}_proj."): piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}


def _interpolated(embeddings: Tensor, shape: torch.Size) -> Tensor:
    """Resize position embeddings (1, 1 + n^2, C) of a class token and a square of patches; return others unchanged."""
    if embeddings.shape == shape or embeddings.dim() != 3 or not embeddings.is_floating_point():
        return embeddings
    before, after = (math.isqrt(max(tokens - 1, 0)) for tokens in (embeddings.shape[1], shape[1]))
    if not before or (before**2 + 1, after**2 + 1) != (embeddings.shape[1], shape[1]):
        return embeddings
    grid = embeddings[:, 1:].unflatten(1, (before, before)).movedim(-1, 1)
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([embeddings[:, :1].to(grid.dtype), grid.movedim(1, -1).flatten(1, 2)], 1)


def _places(model: nn.Module, vision: str, text: str) -> dict[tuple[int, str], tuple[str, ExpertAdapter]]:
    """Return name and module of the adapters in the two encoders, by (layer, site)."""
    found = {}
    for name, module in model.named_modules():
        holder, _, site = name.rpartition(".")
        layer = holder.rpartition(".")[2]
        encoder = vision if site.startswith("visual_") else text
        if isinstance(module, ExpertAdapter) and name.startswith(f"{encoder}.") and layer.isdecimal():
            found[int(layer), site] = name, module
    return found


def _adapter(name: str, module: ExpertAdapter, parts: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter under their names in the model; `ExpertAdapter` converts the released names."""
    scratch: Any = copy.deepcopy(module)
    # Check dtypes first, because load_state_dict would cast silently.
    if strange := [f"{part} is {tensor.dtype}" for part, tensor in parts.items() if tensor.dtype not in LOADABLE]:
        raise ValueError(f"{what} does not fit {name}: {', '.join(strange)}, expected floating point")
    try:
        scratch.load_state_dict(parts)
    except RuntimeError as error:
        raise ValueError(f"{what} does not fit {name}, {module}: {error}") from error
    return {f"{name}.{key}": tensor for key, tensor in scratch.state_dict().items()}


def _check_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    wrong = [
        f"{name} is {tuple(tensor.shape)} {tensor.dtype} there and {tuple(own[name].shape)} {own[name].dtype} in the model"
        for name, tensor in tensors.items()
        if tensor.shape != own[name].shape or tensor.dtype not in LOADABLE
    ]
    if wrong:
        raise ValueError(f"{where} is of another model: {first_of(wrong, 5)}")


def _describe(site: tuple[int, str]) -> str:
    return f"modex.{site[0]}.{site[1]}"
