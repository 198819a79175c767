"""The interface of a configuration to transformers, for classes that are not its own."""

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
# Attributes that transformers writes into a configuration, besides those with an underscore.
WRITTEN = frozenset(
    {
        *("architectures", "auto_map", "bos_token_id", "custom_pipelines", "decoder_start_token_id", "distributed_config", "dtype"),
        *("eos_token_id", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "quantization_config"),
        *("return_dict", "sep_token_id", "torch_dtype", "transformers_version", "use_cache"),
    }
)
# Attributes that have no effect here, with the only value that is allowed.
REFUSED = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


class ModelConfig(ABC):
    """Base of configurations that transformers' Trainer, its callbacks and the Auto classes take.

    transformers' own base class takes any keyword, lets any field be changed after a model was built from it, and turns every read
    of an attribute into two calls of Python. Here a field is checked once and stays: assigning one raises, `replace` makes a
    changed copy. What transformers writes (`WRITTEN`) is kept beside the fields, and is no part of what is compared or saved.
    """

    model_type: ClassVar[str]
    # Keywords of the constructor.
    _keywords: ClassVar[tuple[str, ...]] = ()
    # Trainer takes these parts of an output for no predictions.
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
            raise ValueError(f"{name}={value!r} would change nothing: these models return what their output class says")
        if not self.__dict__.get("_complete") or name in WRITTEN or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        kind = type(self).__name__
        if name in fields:
            raise dataclasses.FrozenInstanceError(
                f"{name} of a {kind} cannot be changed, since models were built from it: make another one, replace({name}=...)"
            )
        hint = did_you_mean(name, fields)
        raise AttributeError(f"{kind} has no field {name}{hint and '; ' + hint}")

    def _freeze(self) -> None:
        """End the construction: from here on fields stay as they are."""
        object.__setattr__(self, "_complete", True)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any], **options: Any) -> Any:
        """Return the configuration that `to_dict` gave; `options` are those of transformers."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """Return the configuration in a folder, or of a name on the hub.

        Args:
            name: see `transformers.AutoConfig.from_pretrained`.
            options: those of transformers, such as revision and token, and fields to change.

        Raises:
            OSError: there is none.
            TypeError: an option is neither.
            ValueError: it is that of another kind of model.
        """
        from transformers import PreTrainedConfig

        values, unused = PreTrainedConfig.get_config_dict(name, **options)
        kind = values.get("model_type", values.get("system", cls.model_type))
        if kind != cls.model_type:
            raise ValueError(f"{name} holds a model of type {kind!r}, and a {cls.__name__} is of type {cls.model_type!r}")
        return cls.from_dict(values, **unused)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict`: what equals a default is said as well."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as JSON, as loggers ask for it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the configuration itself: the encoders have theirs."""
        return self

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write config.json into a folder. A checkpoint of a model has more in it: `model.save_pretrained`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(self.to_json_string())


def with_fields_named(
    short: Iterable[str] = (), fold: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Callable[[type[C]], type[C]]:
    """Let the constructor of a dataclass say which field an unknown keyword may have meant.

    Args:
        short: further keywords.
        fold: keywords, those among them -> the fields.
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
        # Names that raise if they are assigned.
        kind._keywords = tuple(fields)  # type: ignore[attr-defined]
        return kind

    return decorate


def split_unused(options: dict[str, Any], config: Any, fields: Iterable[str]) -> Any:
    """Return the configuration, changed by those options of transformers' `from_pretrained` that are fields.

    With `return_unused_kwargs`, as `AutoModel` asks, also the other options.

    Raises:
        TypeError: there are others, and `return_unused_kwargs` is not set.
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
