"""Attach adapters to a model, and detach them."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mope.backbones.layouts import Layout, layout_of, pre_hook_of
from mope.checks import check_encoder, naming_memory
from mope.fused.adapter import ExpertAdapter
from mope.fusion.checkpoint import read_tensors, write_tensors

from .configuration import ModeXConfig
from .saving import WEIGHTS, check_tensors, gather
from .sites import Plan, Site, find_sites, own_parameters, trained_modules

# Attribute of a model with adapters that holds its `Adapters`.
_OWNER = "_modex_adapters"
_NO_FILE = "give a folder written by save_pretrained of the adapters"
_T = TypeVar("_T")


class _Scope:
    """Identity of the adapters of one model in per-thread state. It is an object, so that copies of the model get their own."""


class _Mode:
    """State that tells a text layer's feed-forward part whether the current call has an image.

    It is stored per thread, for the layer that the thread is in. Hooks on the layer's attention modules set it, not hooks on the
    layer, because recomputation under gradient checkpointing calls only the layer's `forward`.
    """

    # Used by compiled code, which guards reads of thread-local values but loses writes to them at graph breaks.
    traced = False

    def set(self, fused: bool) -> None:
        """Record whether the current call has an image."""
        if torch.compiler.is_compiling():
            self.traced = fused
        else:
            _THREAD.mode = (self, fused)

    def get(self) -> bool:
        """Return whether the current call has an image."""
        if torch.compiler.is_compiling():
            return self.traced
        if _THREAD.mode is None or _THREAD.mode[0] is not self:
            raise RuntimeError(
                "the feed-forward part of a layer with adapters was called without its attention, which determines the adapter to "
                "use: run, or recompute, the whole layer"
            )
        return _THREAD.mode[1]


class _Thread(threading.local):
    """Per-thread state. It is set in `__init__`, because compiled code would not notice changes to class attributes."""

    def __init__(self) -> None:
        self.mode: tuple[_Mode, bool] | None = None
        # One entry per active context, because contexts may be left in any order. Weights are stored by adapter name.
        self.disabled: tuple[_Scope, ...] = ()
        self.routes: tuple[tuple[_Scope, dict[str, list[Tensor]]], ...] = ()


_THREAD = _Thread()


class _Adapt:
    """Callable that runs the adapter found at an attribute, so that wrapped or replaced modules, as with FSDP, are used."""

    def __init__(self, scope: _Scope, name: str, holder: nn.Module, attribute: str) -> None:
        self.scope, self.name, self.holder, self.attribute = scope, name, holder, attribute

    def __call__(self, x: Tensor) -> Tensor:
        if self.scope in _THREAD.disabled:
            return x
        adapter = getattr(self.holder, self.attribute)
        collecting = [found for scope, found in _THREAD.routes if scope is self.scope]
        if not collecting:
            return adapter(x)
        out, weights = adapter(x, return_weights=True)
        for found in collecting:
            found.setdefault(self.name, []).append(weights.detach())
        return out


class _OnOutput:
    """Forward hook that adapts the output, or the first of several outputs, by `fused` if the layer's call has an image."""

    def __init__(self, adapt: _Adapt | None, fused: _Adapt | None = None, mode: _Mode | None = None) -> None:
        self.adapt, self.fused, self.mode = adapt, fused, mode

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        adapt = self.fused if self.mode is not None and self.mode.get() else self.adapt
        if adapt is None:
            return output
        if isinstance(output, Tensor):
            return adapt(output)
        if not (isinstance(output, tuple) and output and isinstance(output[0], Tensor)):
            raise ValueError(
                f"{adapt.name} follows a {type(module).__name__} that does not return a tensor or a tuple starting with one, "
                f"but a {type(output).__name__}: name another module in ModeXConfig"
            )
        adapted = (adapt(output[0]), *output[1:])
        # Keep the type of named tuples.
        return type(output)._make(adapted) if hasattr(output, "_make") else adapted


class _OnInput:
    """Forward pre-hook of a text layer that adapts its hidden states, by `fused` if the call has an image, otherwise by `adapt`."""

    def __init__(self, layout: Layout, adapt: _Adapt | None, fused: _Adapt | None, position: int) -> None:
        self.layout, self.adapt, self.fused, self.position = layout, adapt, fused, position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        image = args[self.position] if len(args) > self.position else kwargs.get("encoder_hidden_states")
        adapt = self.adapt if image is None or not self.layout.has_cross(module) else self.fused
        if adapt is None:
            return args, kwargs
        if args:
            return (adapt(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": adapt(kwargs["hidden_states"])}


class _SetMode:
    """Forward pre-hook of a text layer's attention modules that sets the layer's `_Mode`."""

    def __init__(self, mode: _Mode, fused: bool) -> None:
        self.mode, self.fused = mode, fused

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.mode.set(self.fused)


class _OriginalNorm:
    """Forward hook of a LayerNorm that uses its values from before training while adapters are disabled."""

    def __init__(self, scope: _Scope, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.scope, self.original = scope, copy.copy(module)
        # Only the copy gets these parameters; other attributes are shared.
        self.original._parameters = {
            name: parameter if parameter is None else nn.Parameter(values[name].to(parameter), requires_grad=False)
            for name, parameter in module._parameters.items()
        }

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.original.forward(*args) if self.scope in _THREAD.disabled else output


class Adapters:
    """Adapters attached to a model, as returned by `attach`. The model runs them through hooks."""

    def __init__(self, model: nn.Module, config: ModeXConfig, plan: Plan) -> None:
        # Create the adapters before changing the model, because memory may not suffice.
        with naming_memory(f"adapters with bottleneck={config.bottleneck} and num_experts={config.num_experts}"):
            made = [(site, _make(site, config)) for site in plan.sites()]
        self.model, self.config = model, config
        self._scope = _Scope()
        self._names = [site.name for site in plan.sites()]
        self._trained = trained_modules(model, config)
        self._originals = {name: tensor.detach().clone() for name, tensor in self._trained_parameters().items()}
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._handles: list[RemovableHandle] = []

        # From here on, `detach` undoes all changes.
        setattr(model, _OWNER, self)
        try:
            model.requires_grad_(False)
            for parameter in self._trained_parameters().values():
                parameter.requires_grad_(True)
            adapts = {site.name: self._add(site, adapter) for site, adapter in made}
            for name, sites in plan.layers.items():
                layer = model.get_submodule(name)
                layout = layout_of(layer)
                assert layout is not None
                self._hook_layer(layer, layout, {kind: adapts[site.name] for kind, site in sites.items()})
            for module in model.modules():
                if (hook := pre_hook_of(module)) is not None:
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for name, site in plan.modules.items():
                self._handles.append(model.get_submodule(name).register_forward_hook(_OnOutput(adapts[site.name])))
            _forget_compiled_code()
        except BaseException:
            self.detach()
            raise

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Return the adapters of a model passed to `attach`, or of a copy of it.

        Raises:
            ValueError: If the model has none.
        """
        adapters = getattr(model, _OWNER, None)
        if adapters is None:
            raise ValueError(f"this {type(model).__name__} has no adapters of its own: add them with attach(model, config)")
        return adapters

    @property
    def attached(self) -> bool:
        """Whether the adapters are still in the model."""
        return getattr(self.model, _OWNER, None) is self

    @property
    def modules(self) -> dict[str, ExpertAdapter]:
        """Adapters by qualified name in the model, such as `text_encoder.encoder.layer.0.cross_msa`."""
        self._check_attached()
        found: dict[str, Any] = {name: self.model.get_submodule(name) for name in self._names}
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all trained parameters: those of adapters, then those of LayerNorms and modules in `trained`."""
        for adapter in self.modules.values():
            yield from adapter.parameters()
        yield from self._trained_parameters().values()

    def num_parameters(self) -> int:
        """Return the number of parameters of the adapters, without other trained parameters such as LayerNorms."""
        return sum(p.numel() for adapter in self.modules.values() for p in adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors to save, by their names in the model: the adapters and the other trained parameters."""
        added = {f"{name}.{key}": t for name, adapter in self.modules.items() for key, t in adapter.state_dict().items()}
        return {**added, **{name: p.detach() for name, p in self._trained_parameters().items()}}

    def original_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict that the model would have after `detach`: without adapters, with the original values."""
        self._check_attached()
        added = tuple(f"{name}." for name in self._names)
        originals = self._originals_of_parameters()
        return {
            # A parameter may have several names here.
            name: originals.get(t, t.detach()).to(t.dtype) if isinstance(t, nn.Parameter) else t
            for name, t in self.model.state_dict(keep_vars=True).items()
            if not name.startswith(added)
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the values of a `state_dict`.

        Raises:
            ValueError: If a name or shape differs; nothing is changed then.
        """
        own = self.state_dict()
        check_tensors(tensors, own)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def save_pretrained(self, folder: str | Path, is_main_process: bool = True) -> None:
        """Write `modex_config.json` and `modex.safetensors`, with the adapters and the other trained parameters.

        The rest of the model is not saved. If parameters are sharded, every process must call this; processes with
        `is_main_process=False` write nothing.
        """
        tensors = {name: gather(tensor) for name, tensor in self.state_dict().items()}
        if is_main_process:
            self.config.save_pretrained(folder)
            write_tensors(tensors, Path(folder) / WEIGHTS)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> Adapters:
        """Attach adapters saved by `save_pretrained` to the model they were trained on.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the configuration or the tensors do not fit the model, which is not changed then.
        """
        file = Path(folder) / WEIGHTS
        config, tensors = ModeXConfig.from_pretrained(folder), read_tensors(file, _NO_FILE)
        model = _without_wrapper(model)
        expected = expected_tensors(model, config)
        try:
            check_tensors(tensors, expected)
        except ValueError as error:
            raise ValueError(f"{file} does not fit this {type(model).__name__}: {error}") from error
        adapters = cls(model, config, _plan(model, config))
        try:
            adapters.load_state_dict(tensors)
        except BaseException:
            adapters.detach()
            raise
        return adapters

    @torch.no_grad()
    def detach(self) -> None:
        """Restore the model: remove hooks and adapters, and restore all values and `requires_grad`.

        The adapters are lost, so save them first. A second call does nothing.
        """
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        for name in self._names:
            holder, _, attribute = name.rpartition(".")
            # Missing if attaching failed halfway.
            self.model.get_submodule(holder)._modules.pop(attribute, None)
        for parameter, original in self._originals_of_parameters().items():
            parameter.copy_(original)
            parameter.grad = None
        for name, parameter in self.model.named_parameters():
            # Parameters added in the meantime are left alone.
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        delattr(self.model, _OWNER)
        _forget_compiled_code()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model without adapters and with its original LayerNorms within this context, in this thread only.

        Modules in `trained` keep their trained values. Do not use this for training with gradient checkpointing, which recomputes
        layers outside the context.
        """
        self._check_attached()
        originals, handles = self._originals_of_parameters(), []
        for name in self._trained:
            module = self.model.get_submodule(name)
            if isinstance(module, nn.LayerNorm):
                values = {key: originals[parameter] for key, parameter in module.named_parameters(recurse=False)}
                handles.append(module.register_forward_hook(_OriginalNorm(self._scope, module, values), prepend=True))
        _THREAD.disabled = (*_THREAD.disabled, self._scope)
        try:
            yield
        finally:
            _THREAD.disabled = _without(_THREAD.disabled, self._scope)
            for handle in handles:
                handle.remove()

    @contextmanager
    def routes(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the expert weights of all calls of the model within this context, in this thread.

        The context yields a dict: name of an adapter -> a float32 (float64) tensor (B, T, E) for each run, in order. In a text
        layer with cross-attention, cross_msa runs twice per call, on the layer's input and after cross-attention. Plain adapters
        have weights of 1.
        """
        self._check_attached()
        entry: tuple[_Scope, dict[str, list[Tensor]]] = (self._scope, {})
        _THREAD.routes = (*_THREAD.routes, entry)
        try:
            yield entry[1]
        finally:
            _THREAD.routes = _without(_THREAD.routes, entry)

    def merge(self) -> None:
        """Raise NotImplementedError, because adapters cannot be merged into the weights of the model."""
        raise NotImplementedError(
            "ModeX adapters cannot be merged into the model's weights: their hidden layer is nonlinear, and the router weights the "
            "experts differently for each token. Save them with save_pretrained instead"
        )

    def __repr__(self) -> str:
        if not self.attached:
            return f"Adapters({type(self.model).__name__}: detached)"
        plain = sum(len(adapter.up_weight) == 1 for adapter in self.modules.values())
        beside = sum(p.numel() for p in self._trained_parameters().values())
        own = self.num_parameters()
        share = 100 * (own + beside) / sum(p.numel() for p in self.model.parameters())
        return (
            f"Adapters({type(self.model).__name__}: {plain} plain, {len(self._names) - plain} expert; "
            f"{own:,} parameters in adapters and {beside:,} others train, {share:.2f} % of all)"
        )

    def _check_attached(self) -> None:
        if not self.attached:
            raise ValueError(
                f"these adapters were detached from their {type(self.model).__name__}: add new ones with attach(model, config)"
            )

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return own_parameters(self.model, self._trained)

    def _originals_of_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Return the original values of the trained parameters; current values for parameters that were on the meta device."""
        return {
            parameter: parameter.detach() if self._originals[name].is_meta else self._originals[name]
            for name, parameter in self._trained_parameters().items()
        }

    def _add(self, site: Site, adapter: ExpertAdapter) -> _Adapt:
        """Add an adapter to its holder."""
        holder = self.model.get_submodule(site.holder)
        holder.add_module(site.attribute, adapter.train(holder.training))
        return _Adapt(self._scope, site.name, holder, site.attribute)

    def _hook_layer(self, layer: nn.Module, layout: Layout, adapts: dict[str, _Adapt]) -> None:
        msa, ffn = adapts.get(f"{layout.modality}_msa"), adapts.get(f"{layout.modality}_ffn")
        cross_msa, cross_ffn = adapts.get("cross_msa"), adapts.get("cross_ffn")
        if layout.adapts_input and (msa or cross_msa):
            position = [*inspect.signature(layer.forward).parameters].index("encoder_hidden_states")
            self._handles.append(layer.register_forward_pre_hook(_OnInput(layout, msa, cross_msa, position), with_kwargs=True))
        self._on_output(layer, layout.msa, msa)
        if layout.cross is not None and layout.has_cross(layer):
            self._on_output(layer, layout.cross, cross_msa)
        if not layout.has_cross(layer) or not (ffn or cross_ffn):
            self._on_output(layer, layout.ffn, ffn)
            return
        mode = _Mode()
        for name, fused in ((layout.attention, False), (layout.cross_attention, True)):
            self._handles.append(layer.get_submodule(name).register_forward_pre_hook(_SetMode(mode, fused)))
        self._handles.append(layer.get_submodule(layout.ffn).register_forward_hook(_OnOutput(ffn, cross_ffn, mode)))

    def _on_output(self, layer: nn.Module, path: str, adapt: _Adapt | None) -> None:
        if adapt is not None:
            self._handles.append(layer.get_submodule(path).register_forward_hook(_OnOutput(adapt)))


def attach(model: nn.Module, config: ModeXConfig) -> Adapters:
    """Freeze a model and add trainable adapters; its LayerNorms also train. Initially, the model's output does not change.

    Each adapter is a submodule of its layer, or a sibling of the module selected by a pattern, so that `.to()`, `state_dict`, DDP
    and FSDP handle it. Adapters run in forward hooks; frozen modules are called and never replaced.

    Args:
        model: Any `nn.Module`. The layers of transformers' ViT, DINOv2, BERT, RoBERTa, BLIP, CLIP and SigLIP are supported as
            sites.
        config: Configuration of the adapters.

    Raises:
        TypeError: If `config` is not a ModeXConfig.
        ValueError: If the model already has adapters, or lacks sites or modules in the configuration; nothing is changed then.
    """
    model = _without_wrapper(model)
    check_encoder(model, "model")
    if not isinstance(config, ModeXConfig):
        raise TypeError(
            f"config must be a ModeXConfig, got {config!r}: for saved adapters use Adapters.from_pretrained(model, folder)"
        )
    return Adapters(model, config, _plan(model, config))


def expected_tensors(model: nn.Module, config: ModeXConfig) -> dict[str, Tensor]:
    """Return tensors with the names and shapes of `Adapters.state_dict`.

    Adapter tensors are on the meta device, because a damaged configuration could request any amount of memory.

    Raises:
        ValueError: If the configuration does not fit the model.
    """
    sites = [*_plan(model, config).sites()]
    try:
        with torch.device("meta"):
            added = {f"{site.name}.{key}": t for site in sites for key, t in _adapter(site, config).state_dict().items()}
    # Larger than a tensor can be.
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"adapters with bottleneck={config.bottleneck} and num_experts={config.num_experts} from ModeXConfig are too large"
        ) from error
    return {**added, **own_parameters(model, trained_modules(model, config))}


def _without_wrapper(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of `torch.compile`, which would prefix all names. Both run the adapters."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _plan(model: nn.Module, config: ModeXConfig) -> Plan:
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(isinstance(hook, _OnOutput | _OnInput) for hook in hooks):
            raise ValueError(f"{type(model).__name__} already has adapters attached, at {name}: detach() them first")
    return find_sites(model, config)


def _forget_compiled_code() -> None:
    """Reset torch.compile, because compiled code does not notice that hooks were added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _without(entered: tuple[_T, ...], left: _T) -> tuple[_T, ...]:
    """Return the entries without the last one that is the object `left`."""
    at = max((i for i, entry in enumerate(entered) if entry is left), default=len(entered))
    return (*entered[:at], *entered[at + 1 :])


def _make(site: Site, config: ModeXConfig) -> ExpertAdapter:
    """Create an adapter on its layer's device, in at least float32, because it trains; the op rounds it to its input's dtype."""
    adapter = _adapter(site, config)
    if site.like is not None:
        adapter.to(site.like.device, torch.promote_types(site.like.dtype, torch.float32))
    return adapter


def _adapter(site: Site, config: ModeXConfig) -> ExpertAdapter:
    return ExpertAdapter(
        site.width,
        config.num_experts if site.adapter == "expert" else 1,
        bottleneck=config.bottleneck,
        temperature=config.temperature,
        activation=config.activation,
        dropout=config.dropout,
        impl=config.impl,
    )
