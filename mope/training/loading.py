"""Models from what a command line names: backbones, saved models, checkpoints of the released code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, PreTrainedConfig, ViTModel

# From where it is defined: in transformers 5.17 the top level name asks for torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mope import MoPEConfig, MoPEForClassification
from mope.backbones import architecture_for, fused_class, swin_model_from_checkpoint
from mope.data import Split, published_image_processor
from mope.fusion import PRESETS
from mope.fusion.base import FusionModel
from mope.fusion.checkpoint import CONFIG
from mope.fusion.methods import METHODS
from mope.hints import did_you_mean
from mope.modex import AlbefModel, ModeXConfig, ModeXForClassification
from mope.modex.modeling import SYSTEM

from .evaluation import set_prompt_owner

PUBLISHED = "published"
# Models that hold an encoder of each modality.
_VISION_OF = {"clip": "CLIPVisionModel"}


def make_config(method: str, split: Split, **fields: Any) -> MoPEConfig:
    """The configuration of a published method, or preset, for the classes of a split.

    Raises:
        ValueError: there is no such method or field, or a value is wrong.
    """
    own: dict[str, Any] = {"id2label": split.names, "problem_type": split.problem_type}
    _refuse_unknown(fields, MoPEConfig)
    if method not in (names := dict.fromkeys((*PRESETS, *METHODS))):
        hint = did_you_mean(method, names)
        raise ValueError(f"a method or preset must be one of {', '.join(names)}, got {method!r}{hint and '; ' + hint}")
    if taken := sorted(set(fields) & {*own, "num_labels", "method"}):
        raise ValueError(f"{', '.join(taken)} cannot be set: the data and --method say it")
    return MoPEConfig.preset(method, **fields, **own) if method in PRESETS else MoPEConfig(method=method, **fields, **own)


def _refuse_unknown(fields: Mapping[str, Any], config: type[MoPEConfig | ModeXConfig]) -> None:
    """ValueError if a field is not one of the configuration's, with the one that was meant."""
    known = config.__dataclass_fields__
    if wrong := sorted(set(fields) - set(known)):
        hints = [hint for name in wrong if (hint := did_you_mean(name, known))]
        raise ValueError("; ".join([f"{config.__name__} has no {', '.join(wrong)}", *hints, f"it has {', '.join(known)}"]))


def load_backbone(source: str, modality: str) -> nn.Module:
    """A "vision" or "text" encoder from the hub or a folder; a file is an original Swin checkpoint.

    Raises:
        ValueError: it cannot be loaded, is of the other modality, or of an architecture that is not known here.
    """
    try:
        if modality == "vision" and Path(source).is_file():
            return swin_model_from_checkpoint(source)
        config: Any = AutoConfig.from_pretrained(source)
        if modality == "vision" and config.model_type in _VISION_OF:
            loader, load_options = getattr(transformers, _VISION_OF[config.model_type]), {}
        else:
            architecture = architecture_for(config.model_type)
            if architecture.modality != modality:
                raise ValueError(f"a {config.model_type} model is a {architecture.modality} encoder")
            loader, load_options = AutoModel, architecture.load_options
        with _quiet():
            backbone, found = loader.from_pretrained(source, output_loading_info=True, **load_options)
        # transformers would fill them with random numbers, and frozen they would stay so.
        if found["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(found['missing_keys'])[:5])}")
        return backbone
    except (OSError, ValueError) as error:
        raise ValueError(f"{modality} encoder {source}: {error}") from error


def new_model(
    config: MoPEConfig,
    sources: dict[str, str | None],
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    format: str = "food101",
) -> MoPEForClassification:
    """An untrained model over the encoders that its method needs, with tokenizer and image processor.

    Args:
        config: what to build.
        sources: name or folder of the "vision" and the "text" encoder.
        tokenizer, image_processor: name or folder; default: those of the encoders. `image_processor="published"`: that of the
            published training.
        format: of the data, on which that depends.

    Raises:
        ValueError: something cannot be loaded, or a source is missing.
    """
    if missing := [modality for modality in config.modalities if not sources.get(modality)]:
        raise ValueError(f"method {config.method!r} needs " + " and ".join(f"--{modality} NAME_OR_FOLDER" for modality in missing))
    given = {modality: source for modality in config.modalities if (source := sources[modality])}
    backbones: dict[str, Any] = {modality: load_backbone(source, modality) for modality, source in given.items()}
    for modality in config.finetuned:
        # Many are stored in 16 bits, in which training loses most updates.
        nn.Module.to(backbones[modality], torch.float32)
    model = MoPEForClassification(config, **backbones)
    vision = given.get("vision")
    own = PUBLISHED if vision is not None and Path(vision).is_file() else vision
    set_processors(model, {"text": tokenizer or given.get("text"), "vision": image_processor or own}, format)
    return model


def new_modex_model(
    split: Split,
    *,
    model: str | None = None,
    vision: str | None = None,
    text: str | None = None,
    preset: str | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: str | None = None,
    image_processor: str | None = None,
    format: str = "food101",
) -> ModeXForClassification:
    """An untrained ModeX model for the classes of a split, with tokenizer and image processor.

    Args:
        split: the data.
        model: name or folder of a fused model, or
        vision, text: of a ViT and a BERT, whose upper half gets cross-attention that is new, and trains with the adapters.
        preset, fields: of `ModeXConfig`. Default: the published placement for the kind of model.
        tokenizer, image_processor: name or folder; default: those of the model or the encoders.
        format: of the data, on which the published image processor depends.

    Raises:
        ValueError: something cannot be loaded, or does not fit.
    """
    if bool(model) == bool(vision or text) or bool(vision) != bool(text):
        raise ValueError("--system modex needs --model NAME_OR_FOLDER of a fused model, or both --vision and --text")
    _refuse_unknown(fields, ModeXConfig)
    # LayerNorms train: in the 16 bits in which many models are stored they would lose most updates.
    fused = (load_fused(model) if model else _join(vision or "", text or "")).float()
    albef = isinstance(fused, AlbefModel)
    layers = {"fusion_layer": fused.config.fusion_layer} if isinstance(fused, AlbefModel) else {}
    new: dict[str, Any] = {} if model else {"trained": ("text.encoder.layer.*.crossattention",)}
    config = ModeXConfig.preset(preset or ("albef" if albef else "blip"), **layers, **{**new, **fields})
    built = ModeXForClassification(fused, config, id2label=split.names, problem_type=split.problem_type)
    set_processors(built, {"text": tokenizer or text or model, "vision": image_processor or vision or model}, format)
    return built


def load_fused(source: str) -> nn.Module:
    """A fused model from the hub or a folder. ValueError where it cannot be loaded, or is of another kind."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
        names = values.get("architectures")
        name = str(names[0]) if isinstance(names, list) and names else "model that does not say its class"
        with _quiet():
            loaded: tuple[nn.Module, Any] = fused_class(name).from_pretrained(source, output_loading_info=True)
        if missing := loaded[1]["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(missing)[:5])}")
        return loaded[0]
    # A damaged folder makes transformers raise almost anything.
    except Exception as error:
        raise ValueError(f"fused model {source}: {error}") from error


def _join(vision: str, text: str) -> AlbefModel:
    encoders = load_backbone(vision, "vision"), load_backbone(text, "text")
    for encoder, wanted, source in zip(encoders, (ViTModel, BertModel), (vision, text), strict=True):
        if not isinstance(encoder, wanted):
            raise ValueError(f"{source} is a {type(encoder).__name__}: --system modex joins a ViTModel and a BertModel")
    return AlbefModel.from_encoders(*encoders)  # type: ignore[arg-type]


def open_model(
    path: str | Path,
    sources: dict[str, str | None],
    *,
    mode: str | None = None,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    format: str = "food101",
) -> FusionModel:
    """A trained model: a folder of `save_pretrained`, or a checkpoint of the released code.

    Args:
        path: a folder, a `.ckpt`, or the `.safetensors` that `mope convert` made of one. The folder of a run has its model in
            `model`.
        sources: names or folders of the "vision" and "text" encoders. A folder knows its own, a checkpoint needs them.
        mode: "released" or "instance"; None: that of training.
        tokenizer, image_processor: as in `new_model`; default: those in the folder. A checkpoint was trained with the published
            image processor and the tokenizer of its text encoder.
        format: of the data, on which the published image processor depends.

    Raises:
        ValueError: it cannot be loaded.
    """
    path = _model_of(Path(path))
    if is_modex(path):
        return _open_modex(path, sources, mode, tokenizer, image_processor, format)
    backbones: dict[str, Any] = {m: load_backbone(source, m) for m, source in sources.items() if source}
    if path.suffix in (".ckpt", ".safetensors"):
        if missing := [modality for modality in ("vision", "text") if modality not in backbones]:
            raise ValueError(
                f"{path} holds no encoders: give those that it was trained with, "
                + " and ".join(f"--{modality} NAME_OR_FOLDER" for modality in missing)
            )
        from mope import load_released_checkpoint

        model = load_released_checkpoint(path, **backbones, mode=mode or "released")
        set_processors(model, {"text": tokenizer or sources["text"], "vision": image_processor or PUBLISHED}, format)
        return model
    try:
        model = MoPEForClassification.from_pretrained(path, **backbones)
    except (FileNotFoundError, ValueError) as error:
        hint = " (on the command line --vision and --text)" if "from_pretrained(..." in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    set_processors(model, {"text": tokenizer, "vision": image_processor}, format)
    if mode is not None and mode != model.config.prompt_owner:
        set_prompt_owner(model, mode)
    return model


def _model_of(path: Path) -> Path:
    """The folder of the model: `path` itself, or the one in the folder of a run. ValueError if there are several."""
    if not path.is_dir() or (path / CONFIG).exists():
        return path
    models = sorted(config.parent for pattern in ("model", "*/model") for config in path.glob(f"{pattern}/{CONFIG}"))
    if len(models) > 1:
        raise ValueError(f"{path} holds {len(models)} models: name one of {', '.join(map(str, models))}")
    return models[0] if models else path


def is_modex(path: Path) -> bool:
    """Whether a folder holds a ModeX model."""
    try:
        return json.loads((path / CONFIG).read_text()).get("system") == SYSTEM
    # What is wrong with it is said where it is loaded.
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _open_modex(
    path: Path, sources: dict[str, str | None], mode: str | None, tokenizer: str | None, image_processor: str | None, format: str
) -> ModeXForClassification:
    if given := [f"--{name}" for name, value in {**sources, "mode": mode}.items() if value]:
        raise ValueError(f"{path} is a ModeX model, which takes no {', '.join(given)}")
    try:
        model = ModeXForClassification.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(str(error)) from error
    set_processors(model, {"text": tokenizer, "vision": image_processor}, format)
    return model


def adopt_classes(model: FusionModel, split: Split) -> None:
    """Name the classes of a model that knows only how many they are; checkpoints of the released code are such.

    Raises:
        ValueError: there are more or fewer.
    """
    config = model.config
    if config.id2label == {i: f"LABEL_{i}" for i in range(config.num_labels)}:
        if len(split.names) != config.num_labels:
            raise ValueError(f"the model has {config.num_labels} classes, the data {len(split.names)}: {', '.join(split.names)}")
        model.config = config.replace(id2label=split.names, problem_type=split.problem_type)


def set_processors(model: FusionModel, sources: dict[str, str | None], format: str) -> None:
    """Give a model tokenizer ("text") and image processor ("vision") from the hub or a folder; None changes nothing.

    `format` is that of the data, on which the published image processor depends.
    """
    loaders: dict[str, Any] = {"text": AutoTokenizer, "vision": AutoImageProcessor}
    for modality, source in sources.items():
        if source is None or modality not in model.config.modalities:
            continue
        kind = "tokenizer" if modality == "text" else "image processor"
        try:
            # transformers warns of model types that it does not know, such as that of a fused model.
            with _quiet():
                if modality == "vision" and source == PUBLISHED:
                    model.image_processor = published_image_processor(_image_size(model), format=format)
                elif modality == "vision":
                    model.image_processor = loaders[modality].from_pretrained(source)
                else:
                    model.tokenizer = loaders[modality].from_pretrained(source, padding_side=model.config.padding_side)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no {kind} could be loaded from {source}: {error}. Name another one, --{kind.replace(' ', '-')}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of transformers, such as its table of weights that are not used: most checkpoints have some."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _image_size(model: FusionModel) -> int:
    config: Any = model.backbone("vision").config
    size = config.image_size
    return size if isinstance(size, int) else size[0]
