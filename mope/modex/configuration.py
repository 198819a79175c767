"""Configuration of ModeX adapters and classifiers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import mope
from mope.checks import PROBLEMS_OF_TRANSFORMERS, check_labels_of, is_index, is_number, names_of, problem_type_of
from mope.fusion.protocol import ModelConfig, split_unused, with_fields_named
from mope_kernels.expert_adapter import ACTIVATIONS
from mope_kernels.impl import names_in

CONFIG = "modex_config.json"
# Value of "system" in the config.json of a classifier.
SYSTEM = "modex"
SIDES = ("right", "left")
# The kinds of site by their published names: after the attention and after the feed-forward part of image layers, text layers, and
# text layers that also attend to an image.
KINDS = ("visual_msa", "visual_ffn", "textual_msa", "textual_ffn", "cross_msa", "cross_ffn")
ADAPTERS = ("plain", "expert")
_VISUAL = dict.fromkeys(KINDS[:2], "plain")
_TEXTUAL = dict.fromkeys(KINDS[2:4], "plain")
PRESETS: dict[str, dict[str, str]] = {
    "albef": {**_VISUAL, **_TEXTUAL, "cross_msa": "expert", "cross_ffn": "expert"},
    "blip": {**_VISUAL, "cross_msa": "expert"},
    "vit": _VISUAL,
    "bert": _TEXTUAL,
    "clip": {**_VISUAL, **_TEXTUAL},
}
# The first text layer of the published ALBEF that attends to the image.
FUSION_LAYER = 6


@with_fields_named()
@dataclass(frozen=True)
class ModeXConfig:
    """Configuration of the adapters of a model. It is immutable; `replace` makes a changed copy.

    Args:
        sites: Kind of site -> "plain" (a bottleneck) or "expert" (a bottleneck whose up-projections are mixed per token). The kinds
            are visual_msa, visual_ffn, textual_msa, textual_ffn, cross_msa and cross_ffn. In text layers, cross_* act in calls with
            an image, textual_ffn in calls without one, and textual_msa in both.
        layers: Kind of site -> layers that have it, if not all do. Layers are counted from 0 in each encoder.
        modules: Pattern (`fnmatch`, on qualified names) -> "plain" or "expert", for modules of any model. Their output is adapted,
            or the first one if they have several.
        trained: Patterns of modules that are trained themselves and saved with the adapters, such as "classifier".
        bottleneck: Width r of the hidden layer.
        num_experts: Number of experts E of "expert" adapters.
        temperature: Temperature of their router.
        activation: Activation of the hidden layer, "relu" or "gelu" (exact).
        dropout: Dropout probability on the hidden layer in training.
        train_layer_norms: Whether to train every `nn.LayerNorm` of the model too.
        impl: Implementation of the op, see `mope_kernels.expert_adapter`.

    Raises:
        ValueError: If a value is invalid; the message names the value and what is allowed.
    """

    sites: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    trained: Sequence[str] = ()
    bottleneck: int = 16
    num_experts: int = 3
    temperature: float = 10.0
    activation: str = "relu"
    dropout: float = 0.0
    train_layer_norms: bool = True
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sites", "layers", "modules"):
            if not isinstance(value := getattr(self, name), Mapping) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"ModeXConfig: {name} must map names, got {value!r}")
            object.__setattr__(self, name, dict(value))
        if not (self.sites or self.modules):
            raise ValueError("ModeXConfig: give sites or modules, because without either there is nothing to adapt")
        for name in ("sites", "layers"):
            if strangers := [kind for kind in getattr(self, name) if kind not in KINDS]:
                raise ValueError(f"ModeXConfig: {name} may name {', '.join(KINDS)}, got {', '.join(strangers)}")
        for where, adapter in [*self.sites.items(), *self.modules.items()]:
            if adapter not in ADAPTERS:
                raise ValueError(f"ModeXConfig: the adapter of {where} must be 'plain' or 'expert', got {adapter!r}")
        if useless := [kind for kind in self.layers if kind not in self.sites]:
            raise ValueError(f"ModeXConfig: layers has {', '.join(useless)}, but sites does not")
        for kind, layers in self.layers.items():
            if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers or not all(map(is_index, layers)):
                raise ValueError(f"ModeXConfig: layers of {kind} must be one or more integers >= 0, got {layers!r}")
        object.__setattr__(self, "layers", {kind: tuple(layers) for kind, layers in self.layers.items()})
        patterns: Any = self.trained
        if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
            raise ValueError(f"ModeXConfig: trained must be a list of patterns, got {self.trained!r}")
        object.__setattr__(self, "trained", tuple(self.trained))
        for name, lowest in {"bottleneck": 1, "num_experts": 2}.items():
            if not is_index(value := getattr(self, name)) or value < lowest:
                raise ValueError(f"ModeXConfig: {name} must be an integer of at least {lowest}, got {value!r}")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"ModeXConfig: temperature must be positive, got {self.temperature!r}")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"ModeXConfig: dropout must be in [0, 1), got {self.dropout!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"ModeXConfig: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not isinstance(self.train_layer_norms, bool):
            raise ValueError(f"ModeXConfig: train_layer_norms must be true or false, got {self.train_layer_norms!r}")
        if not isinstance(self.impl, str):
            raise ValueError(f"ModeXConfig: impl must be a name, or several names separated by commas, got {self.impl!r}")
        names_in(self.impl, "ModeXConfig")

    @classmethod
    def preset(cls, name: str, *, fusion_layer: int = FUSION_LAYER, **changes: Any) -> ModeXConfig:
        """Return the published placement for "albef" or "blip", or plain adapters everywhere for "vit", "bert" or "clip".

        In "albef", layers below `fusion_layer`, which have no cross-attention, have textual_ffn; the others have cross_msa and
        cross_ffn. `changes` are other fields of the configuration.

        Raises:
            ValueError: If there is no such preset, or `fusion_layer` or `changes` are invalid.
        """
        if name not in PRESETS:
            raise ValueError(f"ModeXConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        if not is_index(fusion_layer):
            raise ValueError(f"ModeXConfig: fusion_layer must be an integer >= 0, got {fusion_layer!r}")
        sites = dict(PRESETS[name])
        if name == "albef" and not fusion_layer:
            # Every layer attends to the image.
            del sites["textual_ffn"]
        values: dict[str, Any] = {"sites": sites, **changes}
        if name == "albef" and isinstance(values["sites"], Mapping) and "textual_ffn" in values["sites"]:
            values.setdefault("layers", {"textual_ffn": range(fusion_layer)})
        return cls(**values)

    def replace(self, **changes: Any) -> ModeXConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values, including the version of this library, for `from_dict`."""
        return {"mope_version": mope.__version__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModeXConfig:
        """Build a configuration from the result of `to_dict`.

        Raises:
            ValueError: If a key is unknown, because it would otherwise be ignored silently.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields - {"mope_version"}):
            version = values.get("mope_version", "unknown")
            raise ValueError(
                f"ModeXConfig: unknown keys {', '.join(unknown)} (saved by version {version}, this is {mope.__version__})"
            )
        return cls(**{name: value for name, value in values.items() if name in fields})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `modex_config.json` into a folder, which is created if it does not exist."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModeXConfig:
        """Read a configuration written by `save_pretrained`.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file is not a valid configuration.
        """
        file = Path(folder) / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG}: give a folder written by save_pretrained of the adapters")
        try:
            values = json.loads(file.read_text())
        # Also raised for numbers with too many digits and brackets nested too deeply.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} is not a ModeXConfig")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error


@with_fields_named()
@dataclass
class ClassifierConfig(ModelConfig):
    """Configuration of a `ModeXForClassification`, without its encoder.

    Args:
        adapters: Configuration of the encoder's adapters, None for none.
        id2label: Names of the classes, by index.
        problem_type: "single_label" (integer labels (B,)) or "multi_label" (labels (B,num_labels) of 0 and 1).
        padding_side: Padding side of the tokenizer.
        threshold: With problem_type "multi_label", a class is predicted if its probability is above this, between 0 and 1.

    Raises:
        ValueError: If a value is invalid.
    """

    adapters: ModeXConfig | None
    id2label: Mapping[int, str]
    problem_type: str = "single_label"
    padding_side: str = "right"
    threshold: float = 0.5

    model_type: ClassVar[str] = SYSTEM
    # The training code reads these from the configuration of any fusion model.
    method: ClassVar[str] = SYSTEM
    modalities: ClassVar[tuple[str, ...]] = ("vision", "text")
    main: ClassVar[str] = "text"
    complementary: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.adapters, ModeXConfig | None):
            raise ValueError(f"adapters must be a ModeXConfig or None, got {self.adapters!r}")
        self.id2label = names = names_of(self.id2label, "ModeXForClassification")
        if not names or sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label must name the classes 0, 1, ..., got {names!r}")
        self.problem_type = problem_type_of(self.problem_type, "ModeXForClassification")
        if self.padding_side not in SIDES:
            raise ValueError(f"padding_side must be {' or '.join(map(repr, SIDES))}, got {self.padding_side!r}")
        if not (is_number(self.threshold) and 0 < self.threshold < 1):
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold!r}")
        check_labels_of(self, "ModeXForClassification")
        self._freeze()

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def replace(self, **changes: Any) -> ClassifierConfig:
        """Return a copy with some fields changed; `id2label` may also be a sequence of names."""
        if not isinstance(names := changes.get("id2label", {}), Mapping):
            changes["id2label"] = dict(enumerate(names))
        return dataclasses.replace(self, **changes)

    @property
    def label2id(self) -> dict[str, int]:
        """Indices of the classes by name."""
        return {name: i for i, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values for `from_dict`."""
        names = {str(i): name for i, name in self.id2label.items()}
        kind = {"model_type": self.model_type, "architectures": ["ModeXForClassification"], "system": SYSTEM}
        problem = PROBLEMS_OF_TRANSFORMERS[self.problem_type]
        values = {**dataclasses.asdict(self), "id2label": names, "problem_type": problem}
        return {"mope_version": mope.__version__, **kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **options: Any) -> Any:
        """Build a configuration from the result of `to_dict`; `options` are those of transformers' `AutoConfig`.

        Raises:
            ValueError: If a value is missing or invalid.
        """
        try:
            adapters = values["adapters"]
            found = cls(
                None if adapters is None else ModeXConfig.from_dict(adapters),
                {int(i): name for i, name in values["id2label"].items()},
                values["problem_type"],
                values["padding_side"],
                # Earlier versions had none.
                values.get("threshold", 0.5),
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (AttributeError, TypeError) as error:
            raise ValueError(f"values of the wrong kind ({error})") from error
        return split_unused(options, found, cls._keywords)
