"""Models from what a command line names: backbones, saved models, checkpoints of the released code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

# From where it is defined: in transformers 5.17 the top level name asks for torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mope import MoPEConfig, MoPEForClassification
from mope.data import Split, published_image_processor
from mope.models import PRESETS, swin_model_from_checkpoint
from mope.models.backbones import architecture_for
from mope.models.configuration import METHODS

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
    if wrong := sorted(set(fields) - set(MoPEConfig.__dataclass_fields__)):
        raise ValueError(f"MoPEConfig has no {', '.join(wrong)}; it has {', '.join(MoPEConfig.__dataclass_fields__)}")
    if method not in (names := dict.fromkeys((*PRESETS, *METHODS))):
        raise ValueError(f"a method or preset must be one of {', '.join(names)}, got {method!r}")
    if taken := sorted(set(fields) & {*own, "num_labels", "method"}):
        raise ValueError(f"{', '.join(taken)} cannot be set: the data and --method say it")
    return MoPEConfig.preset(method, **fields, **own) if method in PRESETS else MoPEConfig(method=method, **fields, **own)


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


def open_model(
    path: str | Path,
    sources: dict[str, str | None],
    *,
    mode: str | None = None,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    format: str = "food101",
) -> MoPEForClassification:
    """A trained model: a folder of `save_pretrained`, or a checkpoint of the released code.

    Args:
        path: a folder, a `.ckpt`, or the `.safetensors` that `mope convert` made of one.
        sources: names or folders of the "vision" and "text" encoders. A folder knows its own, a checkpoint needs them.
        mode: "reference" or "instance"; None: that of training.
        tokenizer, image_processor: as in `new_model`; default: those in the folder. A checkpoint was trained with the published
            image processor and the tokenizer of its text encoder.
        format: of the data, on which the published image processor depends.

    Raises:
        ValueError: it cannot be loaded.
    """
    path = Path(path)
    backbones: dict[str, Any] = {m: load_backbone(source, m) for m, source in sources.items() if source}
    if path.suffix in (".ckpt", ".safetensors"):
        if missing := [modality for modality in ("vision", "text") if modality not in backbones]:
            raise ValueError(
                f"{path} holds no encoders: give those that it was trained with, "
                + " and ".join(f"--{modality} NAME_OR_FOLDER" for modality in missing)
            )
        from mope import load_reference_checkpoint

        model = load_reference_checkpoint(path, **backbones, mode=mode or "reference")
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


def adopt_classes(model: MoPEForClassification, split: Split) -> None:
    """Name the classes of a model that knows only how many they are; checkpoints of the released code are such.

    Raises:
        ValueError: there are more or fewer.
    """
    config = model.config
    if config.id2label == {i: f"LABEL_{i}" for i in range(config.num_labels)}:
        if len(split.names) != config.num_labels:
            raise ValueError(f"the model has {config.num_labels} classes, the data {len(split.names)}: {', '.join(split.names)}")
        model.config = config.replace(id2label=split.names, problem_type=split.problem_type)


def set_processors(model: MoPEForClassification, sources: dict[str, str | None], format: str) -> None:
    """Give a model tokenizer ("text") and image processor ("vision") from the hub or a folder; None changes nothing.

    `format` is that of the data, on which the published image processor depends.
    """
    loaders: dict[str, Any] = {"text": AutoTokenizer, "vision": AutoImageProcessor}
    for modality, source in sources.items():
        if source is None or modality not in model.config.modalities:
            continue
        kind = "tokenizer" if modality == "text" else "image processor"
        try:
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
    """Without the table of weights that are not used, such as the pooler's: most checkpoints have some."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _image_size(model: MoPEForClassification) -> int:
    config: Any = model.backbone("vision").config
    size = config.image_size
    return size if isinstance(size, int) else size[0]
