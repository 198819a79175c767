"""Configuration of a fusion model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import mope
from mope import modalities
from mope.checks import PROBLEMS_OF_TRANSFORMERS, check_labels_of, is_integer, is_number, names_of, problem_type_of
from mope.fused.router import ROUTERS
from mope.fusion.methods import METHODS, Method
from mope.fusion.parts import PARTS, SHORT, MapperConfig, PromptConfig, RouterConfig
from mope.fusion.presets import PRESETS
from mope.fusion.protocol import ModelConfig, split_unused, with_fields_named
from mope.modalities import Slot
from mope_kernels.impl import names_in

COMBINE = ("concat", "sum")
FEATURES = ("first", "mean", "attention")
# Keys of a saved file that are not fields of `MoPEConfig`.
EXTRA_KEYS = ("mope_version", "backbones", "model_type", "architectures", "transformers_version")
# Values that had another name in earlier versions.
RENAMED = {("prompt_owner", "reference"): "released", ("owner", "reference"): "released"}


@with_fields_named(SHORT, lambda values: _folded(values))
@dataclass
class MoPEConfig(ModelConfig):
    """Configuration of a `MoPEForClassification`. Immutable; `replace` returns a modified copy.

    Args:
        method: "mope" (static, mapped and dynamic prompts), "static_mapped" (no experts), "late_concat" (features concatenated),
            "ensemble" (a head on each feature, logits averaged), "main_only", "image_only" or "text_only".
        main: Modality that is prompted and classified: "vision", "text" or another registered modality, see `mope.modalities`.
            Determined by the method for image_only and text_only.
        complementary: Other modalities, any number; their encoders run first. The default is "vision" if `main` is "text" and
            "text" otherwise; none for main_only, image_only and text_only.
        combine: How psi is formed from the features of several complementary encoders: "concat" or "sum".
        named: Additional names of modalities, such as {"hypothesis": "text"}, for use in `main` and `complementary`. Each has its
            own encoder under that name, and the names of its inputs are prefixed with the name and an underscore.
        num_labels: Number of classes. Inferred from `id2label` if that is given.
        id2label: Names of the classes, as a sequence or {index: name}. The default is LABEL_0, LABEL_1, ...
        problem_type: "single_label" (integer labels (B,), cross-entropy) or "multi_label" (labels (B,num_labels) of 0 and 1,
            a sigmoid for each class). Also accepts transformers' "single_label_classification" and "multi_label_classification".
        router: A `RouterConfig`, or its `kind`. The fields of `router`, `prompts` and `mapper` are also keywords and attributes
            here, under short names (`mope.fusion.parts.SHORT`): `num_experts=4` means `prompts=PromptConfig(num_experts=4)`, and
            `config.num_experts` is `config.prompts.num_experts`.
        prompts: A `PromptConfig`.
        mapper: A `MapperConfig`.
        finetuned: Encoders in `modalities` whose weights train as well.
        feature: What the head reads of the main encoder: "first", the encoder's own summary, which is the class token if there is
            one; "mean", the mean of its tokens; or "attention", trained attention over its tokens with as many heads as the encoder
            and psi as the query (a trained query for ensemble and without psi).
        head: "linear" or "mlp" (one hidden layer of width `head_hidden`, GELU).
        head_hidden: Width of the hidden layer of an "mlp" head.
        importance_weight: Weight of the importance loss in the total loss.
        importance_threshold: CV^2 up to which the importance loss is 0.
        importance_noise: Whether the importance loss uses routing weights with the router's noise.
        padding_side: Padding side of the tokenizer. Both sides accept any attention mask. "right" is fast because it uses sequence
            lengths; it first moves tokens in front of padding if the mask is not right-padded. "left" masks padding out.
        impl: Implementation of the ops: "auto", a name, or several names separated by commas, tried in that order.
        threshold: With problem_type "multi_label", a class is predicted if its probability is above this, between 0 and 1.

    Raises:
        ValueError: A value is not allowed; the message names it and the allowed values.
    """

    model_type: ClassVar[str] = "mope"

    method: str = "mope"
    main: str = "vision"
    complementary: Sequence[str] | None = None
    combine: str = "concat"
    named: Mapping[str, str] | None = None
    num_labels: int = 0
    id2label: Mapping[int, str] | Sequence[str] | None = None
    problem_type: str = "single_label"
    router: RouterConfig | str = field(default_factory=RouterConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    finetuned: Sequence[str] = ()
    feature: str = "first"
    head: str = "linear"
    head_hidden: int = 256
    importance_weight: float = 0.01
    importance_threshold: float = 0.1
    importance_noise: bool = True
    padding_side: str = "right"
    impl: str = "auto"
    threshold: float = 0.5

    if TYPE_CHECKING:
        # Shorthands (`mope.fusion.parts.SHORT`), which are keywords of the constructor and properties.
        router_scope: str = "layer"
        temperature: float = 0.1
        noise_std: float | None = 1 / 256
        router_self_width: int = 2
        router_cross_width: int = 8
        router_embedding: str = "frozen"
        renormalize: bool = False
        train_top_k: int | None = None
        eval_top_k: int | None = None
        num_experts: int = 16
        prompt_length: int = 6
        static_length: int | None = None
        prompt_depth: str = "deep"
        blind_prompts: bool = False
        cross_prompt_length: int = 0
        prompted_layers: Sequence[int] | None = None
        prompt_first_blocks: bool = False
        prompt_init_bound: float | None = None
        prompt_dropout: float = 0.0
        drop_block_prompts: bool = False
        prompt_owner: str = "instance"
        use_mapped: bool = True
        mapper_each: bool = False
        mapper_hidden: int = 128
        mapper_batchnorm: bool | None = None
        mapper_last_gelu: bool | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._resolve()
        for name, allowed in {
            "combine": COMBINE,
            "feature": FEATURES,
            "prompt_depth": ("deep", "shallow"),
            "router_scope": ("layer", "shared", "released"),
            "router_embedding": ("frozen", "learned"),
            "head": ("linear", "mlp"),
            "prompt_owner": ("instance", "released"),
            "padding_side": ("right", "left"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"MoPEConfig: {name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if not isinstance(self.impl, str):
            raise ValueError(f"MoPEConfig: impl must be a name, or several separated by commas, got {self.impl!r}")
        names_in(self.impl, "MoPEConfig")
        for name, lowest in {
            "num_labels": 1,
            "num_experts": 1,
            "prompt_length": 1,
            "static_length": 0,
            "cross_prompt_length": 0,
            "router_self_width": 0,
            "router_cross_width": 0,
            "mapper_hidden": 0,
            "head_hidden": 1,
        }.items():
            value = getattr(self, name)
            if not is_integer(value) or value < lowest:
                raise ValueError(f"MoPEConfig: {name} must be an integer of at least {lowest}, got {value!r}")
        for name in ("train_top_k", "eval_top_k"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and 1 <= value <= self.num_experts):
                raise ValueError(
                    f"MoPEConfig: {name} must be None (all) or between 1 and num_experts={self.num_experts}, got {value!r}"
                )
        for name in ("noise_std", "importance_weight", "importance_threshold"):
            if not (is_number(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"MoPEConfig: {name} must be 0 or more, got {value!r}")
        for name in ("temperature", "prompt_init_bound"):
            value = getattr(self, name)
            if not (value is None and name == "prompt_init_bound") and not (is_number(value) and value > 0):
                raise ValueError(f"MoPEConfig: {name} must be positive, got {value!r}")
        if not (is_number(self.threshold) and 0 < self.threshold < 1):
            raise ValueError(f"MoPEConfig: threshold must be between 0 and 1, got {self.threshold!r}")
        if not (is_number(self.prompt_dropout) and 0 <= self.prompt_dropout < 1):
            raise ValueError(f"MoPEConfig: prompt_dropout must be in [0, 1), got {self.prompt_dropout!r}")
        assert isinstance(self.router, RouterConfig)
        if self.router.kind not in ROUTERS:
            raise ValueError(f"MoPEConfig: router must be one of {', '.join(map(repr, ROUTERS))}, got {self.router.kind!r}")
        if self.router.kind == "multimodal" and self.router_self_width + self.router_cross_width == 0:
            raise ValueError("MoPEConfig: router_self_width and router_cross_width are both 0: the router would see nothing")
        if self.mapper_each and self.combine != "concat":
            raise ValueError(
                "MoPEConfig: mapper_each maps each feature separately, but combine='sum' adds them up: set combine='concat'"
            )
        if self.fusion.maps == "always" and not self.use_mapped:
            raise ValueError(
                f"MoPEConfig: {self.method} without the mapped prompt would not use the other modality; "
                "for static prompts alone use method='image_only' or 'text_only' with static_length"
            )
        check_labels_of(self, "MoPEConfig")
        self._check_depth()
        if strangers := [m for m in self.finetuned if m not in self.modalities]:
            raise ValueError(
                f"MoPEConfig: finetuned names {', '.join(map(repr, strangers))}, "
                f"but method {self.method!r} works on {' and '.join(self.modalities)}"
            )
        self._freeze()

    @property
    def fusion(self) -> Method:
        """Properties of the method."""
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"MoPEConfig: method must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        return METHODS[self.method]

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the keywords of the constructor: its fields, and the shorthands for fields of its parts."""
        return (*(field.name for field in dataclasses.fields(cls)), *SHORT)

    @classmethod
    def _types(cls) -> dict[str, Any]:
        """Return the annotation of each option except the parts themselves."""
        own = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in PARTS}
        of_parts = {kind: {field.name: field.type for field in dataclasses.fields(PARTS[kind])} for kind in PARTS}
        return own | {name: of_parts[part][there] for name, (part, there) in SHORT.items()}

    def flat(self) -> dict[str, Any]:
        """Return all options by their short names, without the parts; "router" is its kind."""
        assert isinstance(self.router, RouterConfig)
        return {"router": self.router.kind, **{name: getattr(self, name) for name in self._types()}}

    def _check_types(self) -> None:
        """Reject values whose type would change their meaning: "no" would count as true, and "text" as a list of letters."""
        for name, kind in self._types().items():
            value = getattr(self, name)
            if kind in ("bool", "bool | None") and not (isinstance(value, bool) or (value is None and kind != "bool")):
                raise ValueError(f"MoPEConfig: {name} must be true or false, got {value!r}")
        finetuned: Any = () if self.finetuned is None else self.finetuned
        if isinstance(finetuned, str) or not isinstance(finetuned, Sequence):
            raise ValueError(f"MoPEConfig: finetuned must be a sequence, such as ['text'], got {finetuned!r}")
        layers = self.prompted_layers
        # bytes is a sequence of integers too, so it has to be excluded.
        is_list = isinstance(layers, Sequence) and not isinstance(layers, bytes)
        if layers is not None and not (is_list and layers and all(map(is_integer, layers))):
            raise ValueError(f"MoPEConfig: prompted_layers must be integers, at least one, or None for all layers, got {layers!r}")

    def _check_depth(self) -> None:
        """Reject options that do not apply to the prompt depth."""
        if self.prompt_depth == "shallow":
            if self.fusion.routes:
                raise ValueError(
                    "MoPEConfig: prompt_depth='shallow' has static and mapped prompts only, because experts are routed layer by "
                    "layer: set prompt_depth='deep', or method='static_mapped'"
                )
            if self.prompted_layers is not None:
                raise ValueError(
                    "MoPEConfig: prompted_layers selects the layers that have their own prompts, and with prompt_depth='shallow' "
                    "no layer does: leave it None"
                )
        elif self.blind_prompts:
            raise ValueError(
                "MoPEConfig: blind_prompts needs prompt_depth='shallow': deep prompts have no queries, so they see nothing anyway"
            )

    def _resolve(self) -> None:
        """Fill in the values that follow from other fields, so that a saved config is complete."""

        def put(name: str, value: object) -> None:
            if name in SHORT:
                part, name_there = SHORT[name]
                name, value = part, dataclasses.replace(getattr(self, part), **{name_there: value})
            object.__setattr__(self, name, value)

        put("main", self.fusion.main or self.main)
        if not isinstance(self.main, str):
            raise ValueError(f"MoPEConfig: main must be the name of a modality, got {self.main!r}")
        if not is_integer(self.num_labels) or self.num_labels < 0:
            raise ValueError(f"MoPEConfig: num_labels must be an integer of at least 1, got {self.num_labels!r}")
        self._resolve_modalities(put)
        if self.static_length is None:
            put("static_length", self.fusion.static_length)
        if self.noise_std is None:
            put("noise_std", 1 / self.num_experts**2 if is_integer(self.num_experts) and self.num_experts > 0 else 0.0)
        put("finetuned", tuple(self.finetuned or ()))
        put("problem_type", problem_type_of(self.problem_type, "MoPEConfig"))
        if self.prompted_layers is not None:
            put("prompted_layers", tuple(self.prompted_layers))
        names = self.id2label
        if names is not None:
            names = names_of(names, "MoPEConfig")
            if not self.num_labels:
                put("num_labels", len(names))
            if len(names) != self.num_labels or sorted(names) != list(range(self.num_labels)):
                raise ValueError(f"MoPEConfig: id2label must name 0..{self.num_labels - 1}, its keys are {sorted(names)}")
        elif not self.num_labels:
            raise ValueError("MoPEConfig: give num_labels or id2label")
        else:
            names = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        put("id2label", names)

    def _resolve_modalities(self, put: Callable[[str, object], None]) -> None:
        """Fill in defaults of main, complementary and named, and check that they are consistent."""
        named = {} if self.named is None else self.named
        if not isinstance(named, Mapping) or not all(map(modalities.is_argument, named)):
            raise ValueError(f"MoPEConfig: named must map identifiers to modalities, got {named!r}")
        put("named", dict(named))
        if taken := sorted(name for name in named if name in modalities.known() or hasattr(torch.nn.Module, name)):
            raise ValueError(f"MoPEConfig: named cannot redefine {', '.join(taken)}: choose other names")
        others: Any = self.complementary
        if not self.fusion.complementary:
            if others:
                raise ValueError(f"MoPEConfig: method {self.method!r} has no complementary encoder, got {list(others)}")
            others = ()
        elif others is None:
            others = ("vision",) if self.main == "text" else ("text",)
        if isinstance(others, str) or not isinstance(others, Sequence):
            raise ValueError(f"MoPEConfig: complementary must be a sequence, such as ['text'], got {others!r}")
        if wrong := [name for name in (self.main, *others, *named.values()) if not isinstance(name, str)]:
            raise ValueError(f"MoPEConfig: main, complementary and named must hold names of modalities, got {wrong[0]!r}")
        put("complementary", tuple(others))
        if not others and self.fusion.complementary:
            raise ValueError(f"MoPEConfig: method {self.method!r} needs a complementary modality; 'main_only' needs none")
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(
                f"MoPEConfig: main and complementary name {', '.join(self.modalities)}, one of them twice: "
                "give the second one its own name, such as named={'second': 'vision'}"
            )
        if unused := sorted(set(named) - set(self.modalities)):
            raise ValueError(f"MoPEConfig: named defines {', '.join(unused)}, which main and complementary do not use")
        try:
            batches = [name for slot in self.slots.values() for name in (*slot.names, *slot.flags)]
        except ValueError as error:
            raise ValueError(f"MoPEConfig: {error}") from error
        if len(set(batches)) < len(batches):
            raise ValueError(f"MoPEConfig: two inputs of {', '.join(batches)} would share a name in a batch: choose other names")

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Modalities by their names in the model, the main one first."""
        assert self.named is not None
        return {name: Slot(name, modalities.find_modality(self.named.get(name, name))) for name in self.modalities}

    @property
    def label2id(self) -> dict[str, int]:
        assert isinstance(self.id2label, Mapping)
        return {name: i for i, name in self.id2label.items()}

    @property
    def experts(self) -> int:
        """`num_experts` if the method routes experts, else 0."""
        return self.num_experts if self.fusion.routes else 0

    @property
    def router_kind(self) -> str:
        """`router.kind`."""
        assert isinstance(self.router, RouterConfig)
        return self.router.kind

    @property
    def maps(self) -> bool:
        """Return whether there is a mapped prompt."""
        return self.fusion.maps != "never" and self.use_mapped

    @property
    def prompts_main(self) -> bool:
        """Return whether the main encoder has any prompts."""
        return self.fusion.prompts or bool(self.static_length)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the encoders that the model needs, the main one first."""
        return (self.main, *(self.complementary or ()))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoPEConfig:
        """Return a published configuration, or a fusion method of the released code; see `mope.fusion.presets.PRESETS`.

        >>> MoPEConfig.preset("mope-v4", num_labels=23, problem_type="multi_label", num_experts=16)

        Raises:
            ValueError: There is no such preset, or `changes` are invalid.
        """
        if name not in PRESETS:
            raise ValueError(f"MoPEConfig: preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> MoPEConfig:
        """Return a modified copy. Complementary modalities that were defaults are derived again if method or main changes."""
        if changes.keys() & {"method", "main"} and "complementary" not in changes:
            method = METHODS.get(changes.get("method", self.method), self.fusion)
            if not method.complementary or self.complementary in ((), ("text",), ("vision",)):
                changes["complementary"] = None
            if not method.complementary:
                main = method.main or changes.get("main", self.main)
                changes.setdefault("named", {name: kind for name, kind in (self.named or {}).items() if name == main})
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if "id2label" in changes:
            known["num_labels"] = 0
        elif "num_labels" in changes and list(known["id2label"].values()) == [f"LABEL_{i}" for i in range(self.num_labels)]:
            known["id2label"] = None
        if isinstance(changes.get("router"), str):
            known["router"] = dataclasses.replace(known["router"], kind=changes.pop("router"))
        for name in [name for name in changes if name in SHORT]:
            part, there = SHORT[name]
            # If the part is given too, the constructor checks that the two do not contradict each other.
            if part not in changes:
                known[part] = dataclasses.replace(known[part], **{there: changes.pop(name)})
        return type(self)(**{**known, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values, with the version of this library; `from_dict` reads them back."""
        kind = {"model_type": self.model_type, "architectures": ["MoPEForClassification"]}
        problem = {"problem_type": PROBLEMS_OF_TRANSFORMERS[self.problem_type]}
        return {"mope_version": mope.__version__, **kind, **dataclasses.asdict(self), **problem}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **options: Any) -> Any:
        """Return the configuration that a dictionary holds. Unknown keys are ignored with a warning that names them.

        `options` are those of transformers' `AutoConfig`.
        """
        fields, values = set(cls.options()), dict(values)
        # Files of earlier versions are flat: they hold the router's kind under "router", and the shorthands.
        for part, kind in PARTS.items():
            if isinstance(held := values.get(part), Mapping):
                of_part = {field.name for field in dataclasses.fields(kind)}
                values |= {f"{part}.{name}": value for name, value in held.items() if name not in of_part}
                values[part] = kind(**{name: _renamed(name, value) for name, value in held.items() if name in of_part})
        unknown = sorted(name for name in set(values) - fields - set(EXTRA_KEYS) if not name.startswith("_"))
        if unknown:
            version = values.get("mope_version", "unknown")
            warnings.warn(
                f"MoPEConfig: ignoring unknown keys {', '.join(unknown)} (saved by version {version}, this is {mope.__version__})",
                stacklevel=2,
            )
        known = {name: _renamed(name, value) for name, value in values.items() if name in fields}
        return split_unused(options, cls(**known), cls.options())


def _folded(values: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a `MoPEConfig` with shorthands moved into their parts. ValueError if the two contradict each other."""
    values = dict(values)
    if isinstance(kind := values.get("router"), str):
        values["router"] = RouterConfig(kind)
    for name in [name for name in values if name in SHORT]:
        (part, there), value = SHORT[name], values.pop(name)
        base: Any = values.get(part, PARTS[part]())
        if type(base) is not PARTS[part]:
            raise ValueError(f"MoPEConfig: {part} must be a {PARTS[part].__name__}, got {base!r}")
        before = getattr(base, there)
        if before not in (value, getattr(PARTS[part](), there)):
            raise ValueError(f"MoPEConfig: {name}={value!r} contradicts {part}.{there}={before!r}: give one of them")
        values[part] = PARTS[part](**{**vars(base), there: value})
    for part, wanted in PARTS.items():
        if part in values and not isinstance(values[part], wanted):
            raise ValueError(f"MoPEConfig: {part} must be a {wanted.__name__}, got {values[part]!r}")
    return values


def _short(part: str, there: str) -> property:
    return property(lambda config: getattr(getattr(config, part), there), doc=f"`{part}.{there}`.")


for _name, _place in SHORT.items():
    setattr(MoPEConfig, _name, _short(*_place))


def _renamed(name: str, value: Any) -> Any:
    return RENAMED.get((name, value), value) if isinstance(value, str) else value
