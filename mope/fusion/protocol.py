"""Configuration interface that transformers expects, for classes that do not derive from its own."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mope.hints import did_you_mean

C = TypeVar("C")
# Attributes that transformers writes into a configuration, in addition to those that start with an underscore.
WRITTEN = frozenset(
    {
        *("architectures", "auto_map", "bos_token_id", "custom_pipelines", "decoder_start_token_id", "distributed_config", "dtype"),
        *("eos_token_id", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "quantization_config"),
        *("return_dict", "sep_token_id", "torch_dtype", "transformers_version", "use_cache"),
    }
)
# Attributes that have no effect here, each with the only allowed value.
REFUSED = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


class ModelConfig(ABC):
    """Base class of configurations that work with transformers' Trainer, its callbacks and the Auto classes.

    transformers' own base class accepts any keyword, allows fields to change after a model was built from them, and makes every
    attribute read cost two Python calls. Here, fields are checked once and then immutable: assigning one raises, and `replace`
    returns a modified copy. Attributes that transformers writes (`WRITTEN`) are stored beside the fields, and are neither compared
    nor saved.
    """

    model_type: ClassVar[str]
    # Keywords of the constructor.
    _keywords: ClassVar[tuple[str, ...]] = ()
    # Trainer does not treat these parts of an output as predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["importance_loss", "routing", "features"]
    # transformers reads these from any configuration.
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_model_tp_plan: Any = None
    base_model_pp_plan: Any = None
    base_model_ep_plan: Any = None
    name_or_path = ""
    architectures: Any = None
    distributed_config: Any = None
    dtype: Any = None
    is_encoder_decoder = False
    output_attentions = False
    output_hidden_states = False
    pad_token_id: Any = None
    quantization_config: Any = None
    return_dict = True
    tie_word_embeddings = False
    use_cache = False
    _attn_implementation = "sdpa"

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self._keywords
        if name in REFUSED and value != REFUSED[name]:
            raise ValueError(f"{name}={value!r} would have no effect: these models always return their own output class")
        if not self.__dict__.get("_complete") or name in WRITTEN or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        kind = type(self).__name__
        if name in fields:
            raise dataclasses.FrozenInstanceError(
                f"{name} of a {kind} cannot be changed, because models were built from it: make a copy, replace({name}=...)"
            )
        hint = did_you_mean(name, fields)
        raise AttributeError(f"{kind} has no field {name}{hint and '; ' + hint}")

    def _freeze(self) -> None:
        """Finish construction: fields are immutable from now on."""
        object.__setattr__(self, "_complete", True)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any], **options: Any) -> Any:
        """Return the configuration that `to_dict` serialized; `options` are those of transformers."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """Load the configuration from a folder or from the hub.

        Args:
            name: See `transformers.AutoConfig.from_pretrained`.
            **options: Options of transformers, such as revision and token, and fields to change.

        Raises:
            OSError: There is no configuration.
            TypeError: An option is neither an option of transformers nor a field.
            ValueError: The configuration belongs to another kind of model.
        """
        from transformers import PreTrainedConfig

        values, unused = PreTrainedConfig.get_config_dict(name, **options)
        kind = values.get("model_type", values.get("system", cls.model_type))
        if kind != cls.model_type:
            raise ValueError(f"{name} holds a model of type {kind!r}, and a {cls.__name__} is of type {cls.model_type!r}")
        return cls.from_dict(values, **unused)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict`, including values that equal a default."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as JSON, for loggers."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the configuration itself, because the encoders hold their own configurations."""
        return self

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write config.json to a folder. To write a complete checkpoint, call `save_pretrained` of the model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(self.to_json_string())


def with_fields_named(
    short: Iterable[str] = (), fold: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Callable[[type[C]], type[C]]:
    """Return a class decorator that makes the constructor of a dataclass suggest a field for each unknown keyword.

    Args:
        short: Additional keywords to accept.
        fold: Function that converts keywords, including the additional ones, to fields.
    """

    def decorate(kind: type[C]) -> type[C]:
        made: Callable[..., None] = kind.__init__
        fields = [*kind.__dataclass_fields__, *short]  # type: ignore[attr-defined]

        @wraps(made)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            if unknown := [name for name in values if name not in fields]:
                hint = did_you_mean(unknown[0], fields)
                raise TypeError(f"{kind.__name__} has no field {', '.join(unknown)}{hint and '; ' + hint}")
            made(self, *args, **fold(values))

        kind.__init__ = __init__  # type: ignore[assignment]
        # Names that may not be assigned.
        kind._keywords = tuple(fields)  # type: ignore[attr-defined]
        return kind

    return decorate


def split_unused(options: dict[str, Any], config: Any, fields: Iterable[str]) -> Any:
    """Apply the options of transformers' `from_pretrained` that are fields, and return the resulting configuration.

    With `return_unused_kwargs`, which `AutoModel` passes, the remaining options are returned as well.

    Raises:
        TypeError: There are remaining options, and `return_unused_kwargs` is not set.
    """
    wanted, path = options.pop("return_unused_kwargs", False), options.pop("name_or_path", "")
    if changes := {name: options.pop(name) for name in fields if name in options}:
        config = config.replace(**changes)
    config.name_or_path = path
    if wanted:
        return config, {name: value for name, value in options.items() if name != "_from_auto"}
    if unknown := [name for name in options if not name.startswith("_")]:
        hint = did_you_mean(unknown[0], fields)
        raise TypeError(f"{type(config).__name__} has no field {', '.join(unknown)}{hint and '; ' + hint}")
    return config
