"""Putting adapters into a model, and taking them out again."""

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

# Of the model that was attached to: its `Adapters`.
_OWNER = "_modex_adapters"
_NO_FILE = "give a folder that save_pretrained of the adapters wrote"
_T = TypeVar("_T")


class _Scope:
    """Stands for the adapters of one model, in what a thread keeps. Copied and pickled with the model, hence no number."""


class _Mode:
    """Whether the running call of a text layer was given an image: what its feed-forward part has to know.

    Kept by thread, for the layer that the thread is in. The layer's own calls say it rather than hooks on the layer: recomputation
    under gradient checkpointing runs its `forward` alone.
    """

    # What compiled code keeps: of a thread's own values it guards reads, but forgets writes at a break of its graph.
    traced = False

    def set(self, fused: bool) -> None:
        if torch.compiler.is_compiling():
            self.traced = fused
        else:
            _THREAD.mode = (self, fused)

    def get(self) -> bool:
        if torch.compiler.is_compiling():
            return self.traced
        if _THREAD.mode is None or _THREAD.mode[0] is not self:
            raise RuntimeError(
                "the feed-forward part of a layer with adapters was called without its attention, which says which adapter acts: "
                "run, or recompute, the whole layer"
            )
        return _THREAD.mode[1]


class _Thread(threading.local):
    """What holds for one thread. Set here and not in the class, where compiled code would not see that it changes."""

    def __init__(self) -> None:
        self.mode: tuple[_Mode, bool] | None = None
        # One for each context that was entered, since they may be left in any order. Weights are kept by the name of the adapter.
        self.disabled: tuple[_Scope, ...] = ()
        self.routes: tuple[tuple[_Scope, dict[str, list[Tensor]]], ...] = ()


_THREAD = _Thread()


class _Adapt:
    """Runs an adapter, found by its place: what wraps or replaces modules, as FSDP does, is respected."""

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
    """Forward hook: adapts the output, or the first of several. `fused` instead where the layer's call was given an image."""

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
                f"{adapt.name} is behind a {type(module).__name__} that gives no tensor, nor a tuple that begins with one, "
                f"but {type(output).__name__}: name another module in ModeXConfig"
            )
        adapted = (adapt(output[0]), *output[1:])
        # Named tuples stay such.
        return type(output)._make(adapted) if hasattr(output, "_make") else adapted


class _OnInput:
    """Forward pre-hook of a text layer: adapts its hidden states by `fused` if the call was given an image, else by `adapt`."""

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
    """Forward pre-hook of the attentions of a text layer."""

    def __init__(self, mode: _Mode, fused: bool) -> None:
        self.mode, self.fused = mode, fused

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.mode.set(self.fused)


class _OriginalNorm:
    """Forward hook of a LayerNorm: its output with the values that it had before it trained, while adapters are disabled."""

    def __init__(self, scope: _Scope, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.scope, self.original = scope, copy.copy(module)
        # Of the copy alone; whatever else a subclass holds it shares.
        self.original._parameters = {
            name: parameter if parameter is None else nn.Parameter(values[name].to(parameter), requires_grad=False)
            for name, parameter in module._parameters.items()
        }

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.original.forward(*args) if self.scope in _THREAD.disabled else output


class Adapters:
    """The adapters of a model: what `attach` gives. The model runs them by itself."""

    def __init__(self, model: nn.Module, config: ModeXConfig, plan: Plan) -> None:
        # Before anything changes: there may be no memory for them.
        with naming_memory(f"adapters with bottleneck={config.bottleneck} and num_experts={config.num_experts}"):
            made = [(site, _make(site, config)) for site in plan.sites()]
        self.model, self.config = model, config
        self._scope = _Scope()
        self._names = [site.name for site in plan.sites()]
        self._trained = trained_modules(model, config)
        self._originals = {name: tensor.detach().clone() for name, tensor in self._trained_parameters().items()}
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._handles: list[RemovableHandle] = []

        # From here on `detach` undoes what was done.
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
        """Those of a model that `attach` was called with, or of a copy of it."""
        adapters = getattr(model, _OWNER, None)
        if adapters is None:
            raise ValueError(f"this {type(model).__name__} has no adapters of its own: attach(model, config) makes them")
        return adapters

    @property
    def attached(self) -> bool:
        """Whether they are in the model still."""
        return getattr(self.model, _OWNER, None) is self

    @property
    def modules(self) -> dict[str, ExpertAdapter]:
        """The adapters by name, which says where they are: `text_encoder.encoder.layer.0.cross_msa`."""
        self._check_attached()
        found: dict[str, Any] = {name: self.model.get_submodule(name) for name in self._names}
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that trains: the adapters, then LayerNorms and what else the configuration says."""
        for adapter in self.modules.values():
            yield from adapter.parameters()
        yield from self._trained_parameters().values()

    def num_parameters(self) -> int:
        """Of the adapters alone, without the LayerNorms."""
        return sum(p.numel() for adapter in self.modules.values() for p in adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """What is saved: the adapters, and what trains beside them, by the names that these have in the model."""
        added = {f"{name}.{key}": t for name, adapter in self.modules.items() for key, t in adapter.state_dict().items()}
        return {**added, **{name: p.detach() for name, p in self._trained_parameters().items()}}

    def original_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the model without adapters, and with what trained as it was: what `detach` would give back."""
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
        """Take the values of `state_dict`. ValueError and no change where a name or a shape differs."""
        own = self.state_dict()
        check_tensors(tensors, own)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def save_pretrained(self, folder: str | Path, is_main_process: bool = True) -> None:
        """Write `modex_config.json` and `modex.safetensors`: the adapters and what trains beside them, not the model.

        Where parameters are sharded every process has to call this; those with `is_main_process=False` write nothing.
        """
        tensors = {name: gather(tensor) for name, tensor in self.state_dict().items()}
        if is_main_process:
            self.config.save_pretrained(folder)
            write_tensors(tensors, Path(folder) / WEIGHTS)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> Adapters:
        """Attach what `save_pretrained` wrote to the model that it was trained on.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the configuration or the tensors do not fit the model, which then is as it was.
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
        """Give the model back as it was: no hooks, no adapters, every value and `requires_grad`. A second call does nothing.

        These adapters are then gone: save them before.
        """
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        for name in self._names:
            holder, _, attribute = name.rpartition(".")
            # Not there where attaching failed half-way.
            self.model.get_submodule(holder)._modules.pop(attribute, None)
        for parameter, original in self._originals_of_parameters().items():
            parameter.copy_(original)
            parameter.grad = None
        for name, parameter in self.model.named_parameters():
            # What was added since stays as it is.
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        delattr(self.model, _OWNER)
        _forget_compiled_code()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, this thread sees the model without adapters and with the LayerNorms that it had; other threads do not.

        What `trained` names stays as it is. Not for training with gradient checkpointing, which computes again elsewhere.
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
        """Within, calls of the model by this thread put the weights of the experts into the dict that it gives.

        Name of an adapter -> (B, T, E) float32 (float64), for each time that it ran, in order: in a text layer with
        cross-attention cross_msa runs twice in a call, on the layer's input and after cross-attention. Plain adapters have
        weights of 1.
        """
        self._check_attached()
        entry: tuple[_Scope, dict[str, list[Tensor]]] = (self._scope, {})
        _THREAD.routes = (*_THREAD.routes, entry)
        try:
            yield entry[1]
        finally:
            _THREAD.routes = _without(_THREAD.routes, entry)

    def merge(self) -> None:
        """Impossible, and says why."""
        raise NotImplementedError(
            "ModeX adapters cannot be merged into the weights beside them: their hidden layer is not linear, and the router weighs "
            "the experts for each token by what the token is. Save them with save_pretrained instead"
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
            f"{own:,} parameters and {beside:,} beside them train, {share:.2f} % of all)"
        )

    def _check_attached(self) -> None:
        if not self.attached:
            raise ValueError(
                f"these adapters were detached from their {type(self.model).__name__}: attach(model, config) makes new ones"
            )

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return own_parameters(self.model, self._trained)

    def _originals_of_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Of what had no values then, those that it has now."""
        return {
            parameter: parameter.detach() if self._originals[name].is_meta else self._originals[name]
            for name, parameter in self._trained_parameters().items()
        }

    def _add(self, site: Site, adapter: ExpertAdapter) -> _Adapt:
        """Put an adapter in its place."""
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
    """Freeze a model and put adapters into it, which train with its LayerNorms. At the start it computes what it did.

    Each adapter is a submodule of the layer that it serves, or stands beside the module that a pattern names, so that `.to()`,
    `state_dict`, DDP and FSDP see it. It works by forward hooks; what is frozen is called and never replaced.

    Args:
        model: any `nn.Module`. The layers of transformers' ViT, DINOv2, BERT, RoBERTa, BLIP, CLIP and SigLIP are known.
        config: which sites get which adapter.

    Raises:
        TypeError: `config` is not a ModeXConfig.
        ValueError: the model has adapters already, or the configuration asks for what it does not have; nothing is changed then.
    """
    model = _without_wrapper(model)
    check_encoder(model, "model")
    if not isinstance(config, ModeXConfig):
        raise TypeError(
            f"config must be a ModeXConfig, got {config!r}: for saved adapters use Adapters.from_pretrained(model, folder)"
        )
    return Adapters(model, config, _plan(model, config))


def expected_tensors(model: nn.Module, config: ModeXConfig) -> dict[str, Tensor]:
    """Names and shapes of `Adapters.state_dict`, without memory, of which a damaged configuration may ask for any amount.

    ValueError where the configuration does not fit the model.
    """
    sites = [*_plan(model, config).sites()]
    try:
        with torch.device("meta"):
            added = {f"{site.name}.{key}": t for site in sites for key, t in _adapter(site, config).state_dict().items()}
    # More than a tensor can have.
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"no adapter can have bottleneck={config.bottleneck} and num_experts={config.num_experts}, as ModeXConfig says"
        ) from error
    return {**added, **own_parameters(model, trained_modules(model, config))}


def _without_wrapper(model: nn.Module) -> nn.Module:
    """The model in what `torch.compile` gives, which would put its own name in front of all others. Both run the adapters."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _plan(model: nn.Module, config: ModeXConfig) -> Plan:
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(isinstance(hook, _OnOutput | _OnInput) for hook in hooks):
            raise ValueError(f"{type(model).__name__} has adapters attached already, at {name}: detach() them first")
    return find_sites(model, config)


def _forget_compiled_code() -> None:
    """Compiled code does not look whether hooks have come or gone, and would go on without them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _without(entered: tuple[_T, ...], left: _T) -> tuple[_T, ...]:
    """Without the last that is this object."""
    at = max((i for i, entry in enumerate(entered) if entry is left), default=len(entered))
    return (*entered[:at], *entered[at + 1 :])


def _make(site: Site, config: ModeXConfig) -> ExpertAdapter:
    """An adapter where its layer is. It has 32 bits or more, since it trains; the op rounds it to its input's dtype."""
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
