"""Load the models that a command line names: new models over backbones, saved models, and files of registered types."""

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
from transformers import AutoConfig, AutoModel, BertModel, PreTrainedConfig, ViTModel

from mope import MoPEConfig, MoPEForClassification
from mope.backbones import architecture_for, fused_class, swin_model_from_checkpoint, tower_class
from mope.backbones import known as architectures
from mope.data import Split
from mope.data.formats import slots_to_read
from mope.fusion import PRESETS
from mope.fusion.base import FusionModel
from mope.fusion.checkpoint import CONFIG
from mope.fusion.methods import METHODS
from mope.fusion.saving import read_config
from mope.hints import did_you_mean
from mope.modalities import Slot, known, slots_of
from mope.modalities.vision import PUBLISHED
from mope.modex import AlbefModel, ModeXConfig, ModeXForClassification
from mope.modex.configuration import SYSTEM

from .encoders import encoder_option, processor_options
from .extensions import opener_for, set_mode

# Functions that load a file instead of a folder, by modality.
_FROM_FILE = {"vision": swin_model_from_checkpoint}
_NONE: Mapping[str, Any] = MappingProxyType({})


def make_config(method: str, split: Split | None, **fields: Any) -> MoPEConfig:
    """Make the configuration of a method or preset for the classes of a split. Without a split, use two unnamed classes.

    Raises:
        ValueError: there is no such method or field, or a value is wrong.
    """
    own: dict[str, Any] = {"num_labels": 2} if split is None else {"id2label": split.names, "problem_type": split.problem_type}
    _refuse_unknown(fields, MoPEConfig)
    if method not in (names := dict.fromkeys((*PRESETS, *METHODS))):
        hint = did_you_mean(method, names)
        raise ValueError(f"a method or preset must be one of {', '.join(names)}, got {method!r}{hint and '; ' + hint}")
    if taken := sorted(set(fields) & {*own, "num_labels", "method"}):
        raise ValueError(f"{', '.join(taken)} cannot be set: the data and --method determine it")
    return MoPEConfig.preset(method, **fields, **own) if method in PRESETS else MoPEConfig(method=method, **fields, **own)


def _refuse_unknown(fields: Mapping[str, Any], config: type[MoPEConfig | ModeXConfig]) -> None:
    """Raise ValueError if the configuration lacks a field, and suggest the one that was meant."""
    known = config.options() if issubclass(config, MoPEConfig) else tuple(config.__dataclass_fields__)
    if wrong := sorted(set(fields) - set(known)):
        hints = [hint for name in wrong if (hint := did_you_mean(name, known))]
        raise ValueError("; ".join([f"{config.__name__} has no {', '.join(wrong)}", *hints, f"it has {', '.join(known)}"]))


def load_backbone(source: str, modality: str, name: str | None = None) -> nn.Module:
    """Load an encoder of a modality from the hub or a folder; for images, also from an original Swin checkpoint file.

    Args:
        source: a name on the hub, a folder or a file.
        modality: the modality of the encoder.
        name: the name of the encoder in error messages; the default is the modality.

    Raises:
        ValueError: the encoder cannot be loaded, has another modality, or has an unknown architecture.
    """
    try:
        if modality in _FROM_FILE and Path(source).is_file():
            return _FROM_FILE[modality](source)
        model_type = _model_type(source)
        if (tower := tower_class(model_type, modality)) is not None:
            loader, load_options = tower, {}
        else:
            architecture = architecture_for(model_type)
            if architecture.modality != modality:
                raise ValueError(f"a {model_type} model is a {architecture.modality} encoder")
            loader, load_options = architecture.model_class or AutoModel, architecture.load_options
        with _quiet():
            backbone, found = loader.from_pretrained(source, output_loading_info=True, **load_options)
        # transformers fills missing weights with random numbers, and frozen weights would keep them.
        if found["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(found['missing_keys'])[:5])}")
        return backbone
    except (OSError, ValueError) as error:
        raise ValueError(f"{name or modality} encoder {source}: {error}") from error


def _model_type(source: str) -> str:
    """Read the model type of an encoder. For architectures with their own class here, read only the configuration file."""
    values, _ = PreTrainedConfig.get_config_dict(source)
    found = architectures().get(str(values.get("model_type")))
    if found is not None and found.model_class is not None:
        return str(values["model_type"])
    config: Any = AutoConfig.from_pretrained(source)
    name: str = config.model_type
    return name


def new_model(
    config: MoPEConfig,
    sources: Mapping[str, str | None],
    *,
    processors: Mapping[str, str | None] = _NONE,
    format: str = "food101",
) -> MoPEForClassification:
    """Build an untrained model over the encoders that its method needs, with its tokenizer, image processor and so on.

    Args:
        config: the configuration of the model.
        sources: the name or folder of each encoder, by its name in the model, such as "vision" and "text".
        processors: the names or folders of processors, by their own names ("tokenizer", "image_processor") or by the names of
            encoders in the model. The default is the encoders' own processors. An image processor "published" is the one of the
            published training.
        format: the format of the data, which the published image processor depends on.

    Raises:
        ValueError: something cannot be loaded, or a source is missing.
    """
    if missing := [name for name in config.modalities if not sources.get(name)]:
        raise ValueError(f"method {config.method!r} needs " + " and ".join(_wanted(name) for name in missing))
    _refuse_strangers(config.slots, sources)
    given = {name: source for name in config.modalities if (source := sources[name])}
    backbones = _load_all(config.slots, given)
    for name in config.finetuned:
        # Many checkpoints have 16 bits, with which training would lose most updates.
        nn.Module.to(backbones[name], torch.float32)
    model = MoPEForClassification(config, **backbones)
    # A file contains no processor.
    own = {name: PUBLISHED if Path(source).is_file() else source for name, source in given.items()}
    set_processors(model, own, processors, format)
    return model


def _wanted(name: str) -> str:
    option = encoder_option(name)
    return f"{option}NAME_OR_FOLDER" if option.endswith("=") else f"{option} NAME_OR_FOLDER"


def _load_all(slots: Mapping[str, Slot], sources: Mapping[str, str | None]) -> dict[str, Any]:
    """Load the encoders that have a source, even those that the model lacks, because the model raises the error."""
    _refuse_strangers(slots, sources)
    kinds = {name: modality.name for name, modality in known().items()} | {name: s.modality.name for name, s in slots.items()}
    return {name: load_backbone(source, kinds[name], name) for name, source in sources.items() if source}


def _refuse_strangers(slots: Mapping[str, Slot], sources: Mapping[str, str | None]) -> None:
    """Raise ValueError if a source's name is neither an encoder of the model nor a modality."""
    if strangers := sorted(name for name, source in sources.items() if source and name not in {*slots, *known()}):
        wrong = ", ".join(f"{encoder_option(name)}..." for name in strangers)
        raise ValueError(f"{wrong}: the encoders of the model are {', '.join(slots)}")


def new_modex_model(
    split: Split,
    *,
    model: str | None = None,
    sources: Mapping[str, str | None] = _NONE,
    preset: str | None = None,
    fields: Mapping[str, Any] = _NONE,
    processors: Mapping[str, str | None] = _NONE,
    format: str = "food101",
) -> ModeXForClassification:
    """Build an untrained ModeX model for the classes of a split, with tokenizer and image processor.

    Args:
        split: the data.
        model: the name or folder of a fused model. Give either this or `sources`.
        sources: the names or folders of a ViT, "vision", and a BERT, "text". The upper half of the BERT gets new cross-attention,
            which is trained with the adapters.
        preset: a preset of `ModeXConfig`. The default is the published placement for the kind of model.
        fields: fields of `ModeXConfig`, in addition to the preset.
        processors: as in `new_model`; the default is those of the model or the encoders.
        format: the format of the data, which the published image processor depends on.

    Raises:
        ValueError: something cannot be loaded, or does not fit.
    """
    vision, text = sources.get("vision"), sources.get("text")
    if bool(model) == bool(vision or text) or bool(vision) != bool(text):
        raise ValueError("--system modex needs --model NAME_OR_FOLDER of a fused model, or both --vision and --text")
    _refuse_unknown(fields, ModeXConfig)
    # LayerNorms are trained. In 16 bits, which many checkpoints have, they would lose most updates.
    fused = (load_fused(model) if model else _join(vision or "", text or "")).float()
    albef = isinstance(fused, AlbefModel)
    layers = {"fusion_layer": fused.config.fusion_layer} if isinstance(fused, AlbefModel) else {}
    new: dict[str, Any] = {} if model else {"trained": ("text.encoder.layer.*.crossattention",)}
    config = ModeXConfig.preset(preset or ("albef" if albef else "blip"), **layers, **{**new, **fields})
    built = ModeXForClassification(fused, config, id2label=split.names, problem_type=split.problem_type)
    set_processors(built, {"text": text or model, "vision": vision or model}, processors, format)
    return built


def load_fused(source: str) -> nn.Module:
    """Load a fused model from the hub or a folder.

    Raises:
        ValueError: it cannot be loaded, or is not a fused model.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
        names = values.get("architectures")
        name = str(names[0]) if isinstance(names, list) and names else "model that does not say its class"
        with _quiet():
            loaded: tuple[nn.Module, Any] = fused_class(name).from_pretrained(source, output_loading_info=True)
        if missing := loaded[1]["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(missing)[:5])}")
        return loaded[0]
    # With a damaged folder, transformers may raise any kind of error.
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
    sources: Mapping[str, str | None],
    *,
    mode: str | None = None,
    processors: Mapping[str, str | None] = _NONE,
    format: str = "food101",
) -> FusionModel:
    """Load a trained model from a folder of `save_pretrained`, or from a file of a registered type (`mope.training.extensions`).

    Args:
        path: a folder or a file. It may be the folder of a run, whose model is in `model`.
        sources: the names or folders of encoders, by their names in the model. A folder records its own encoders. A `.ckpt` of
            the released code, or the `.safetensors` that `mope convert` makes of it, needs them.
        mode: a registered mode, such as "released" or "instance"; None for the mode of training.
        processors: as in `new_model`; the default is those in the folder. A checkpoint of the released code was trained with the
            published image processor and the tokenizer of its text encoder.
        format: the format of the data, which the published image processor depends on.

    Raises:
        ValueError: the model cannot be loaded.
    """
    path = _model_of(Path(path))
    if is_modex(path):
        return _open_modex(path, sources, mode, processors, format)
    if (opener := opener_for(path.suffix)) is not None:
        return opener(path, sources, mode=mode, processors=processors, format=format)
    slots: Mapping[str, Slot] = {}
    try:
        slots = read_config(path)[0].slots
        model = MoPEForClassification.from_pretrained(path, **_load_all(slots, sources))
    except (FileNotFoundError, ValueError) as error:
        options = " and ".join(map(encoder_option, slots))
        hint = f" (on the command line {options})" if "from_pretrained(..." in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    set_processors(model, {}, processors, format)
    if mode is not None and mode != model.config.prompt_owner:
        set_mode(model, mode)
    return model


def slots_in(path: str | Path) -> tuple[Slot, ...] | None:
    """Return the modalities of a trained model for `read_split`; None for text and image. ValueError if one is unknown."""
    path = _model_of(Path(path))
    return slots_to_read(read_config(path)[0]) if path.is_dir() and not is_modex(path) else None


def _model_of(path: Path) -> Path:
    """Find the folder of the model: `path` itself, or the one in the folder of a run. Raise ValueError if there are several."""
    if not path.is_dir() or (path / CONFIG).exists():
        return path
    models = sorted(config.parent for pattern in ("model", "*/model") for config in path.glob(f"{pattern}/{CONFIG}"))
    if len(models) > 1:
        raise ValueError(f"{path} holds {len(models)} models: name one of {', '.join(map(str, models))}")
    return models[0] if models else path


def is_modex(path: Path) -> bool:
    """Return whether a folder holds a ModeX model."""
    try:
        return json.loads((path / CONFIG).read_text()).get("system") == SYSTEM
    # Loading the model reports the error.
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _open_modex(
    path: Path, sources: Mapping[str, str | None], mode: str | None, processors: Mapping[str, str | None], format: str
) -> ModeXForClassification:
    if given := [f"--{name}" for name, value in {**sources, "mode": mode}.items() if value]:
        raise ValueError(f"{path} is a ModeX model, which does not accept {', '.join(given)}")
    try:
        model = ModeXForClassification.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(str(error)) from error
    set_processors(model, {}, processors, format)
    return model


def adopt_classes(model: FusionModel, split: Split) -> None:
    """Name the classes of a model that has only their number, such as one from a checkpoint of the released code.

    Raises:
        ValueError: the split has another number of classes.
    """
    config = model.config
    if config.id2label == {i: f"LABEL_{i}" for i in range(config.num_labels)}:
        if len(split.names) != config.num_labels:
            raise ValueError(f"the model has {config.num_labels} classes, the data {len(split.names)}: {', '.join(split.names)}")
        model.config = config.replace(id2label=split.names, problem_type=split.problem_type)


def set_processors(
    model: FusionModel, sources: Mapping[str, str | None], processors: Mapping[str, str | None] = _NONE, format: str = ""
) -> None:
    """Load a model's tokenizer, image processor and so on from the hub or from folders.

    Args:
        model: the model that gets them.
        sources: the names or folders from which processors are loaded by default, by the names of encoders. Without a source,
            the model's processor stays.
        processors: names or folders that take precedence over `sources`, by the names of processors ("tokenizer") or of encoders.
        format: the format of the data, which the published image processor depends on.

    Raises:
        ValueError: a processor cannot be loaded, or does not fit.
    """
    for name, slot in slots_of(model.config).items():
        kind = slot.modality.processor
        if kind is None:
            continue
        source = processors.get(name) or processors.get(kind) or sources.get(name)
        if source is None:
            continue
        try:
            # transformers warns about unknown model types, such as that of a fused model.
            with _quiet():
                processor = slot.modality.load_processor(source, model.backbone(name), model.config, format)
            model.set_processor(name, processor)
        except (OSError, ValueError) as error:
            ((_, option),) = processor_options([slot]).items()
            raise ValueError(
                f"no {kind.replace('_', ' ')} could be loaded from {source}: {error}. Name another one with {option}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings, such as its table of unused weights, which most checkpoints have."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
