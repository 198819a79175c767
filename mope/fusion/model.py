"""Fusion models on top of frozen transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import SwinModel
from transformers.utils.generic import ModelOutput

from mope.backbones import Attachment, attach, base_model, find_adapter, find_architecture
from mope.checks import check_are_tensors, check_encoder, naming_memory
from mope.encoders.importance import importance, warn_of_local_batches
from mope.encoders.layerwise import LayerwiseEncoder, TrainedPrompts, as_prompts
from mope.encoders.pooling import AttentionPooling, Pool, mean_pooling
from mope.encoders.recomputing import Recomputing
from mope.encoders.windowed import MoPESwinEncoder, TrainedWindowPrompts, WindowedEncoder, distinct
from mope.fused import FrozenAttention, InputPrompts, MoPEAttention, PromptBank, Router
from mope.fused.modules import version
from mope.fused.padding import Padding
from mope.fused.router import make_router, sample_noise, without_noise
from mope.fusion.base import in_frozen_dtype
from mope.fusion.config import MoPEConfig
from mope.fusion.heads import new_head, new_input_prompts, new_mapper, new_pooling, new_swin, router_options, task_loss
from mope.fusion.inputs import InputChecks, as_encoder_knows
from mope.fusion.predicting import dense_weights
from mope.fusion.saving import SavedModel
from mope.fusion.sources import source_of
from mope.graphs import CudaGraphRunner
from mope.hints import did_you_mean
from mope.modalities import known
from mope.printing import describe_output
from mope.processes import is_distributed
from mope.registering import register_model
from mope_kernels import Routing

NO_BANKS = (
    "a Swin Transformer has no banks, because its prompts pass through every part of a block, not only as keys and values: "
    "leave banks out"
)


# Attributes of a model and arguments of its forward, which encoders and inputs may not use as names.
OWN = frozenset(
    {
        *("blocks", "card_data", "config", "cross_blocks", "cross_head", "head", "input_checks", "input_prompts", "mapper"),
        *("pooling", "router", "slots", "training", "warnings_issued", "widths"),
    }
)
ARGUMENTS = frozenset({"banks", "cross_features", "labels", "output_attentions", "router_noise"})


class EncoderInputs(NamedTuple):
    """Inputs of one encoder: tensors and flags under the encoder's names, and its padding."""

    given: dict[str, Any]
    padding: Padding

    @property
    def batch(self) -> int:
        """Batch size B, read from a shape because torch.export would treat the result of len() as a constant."""
        size: int = next(iter(self.given.values())).shape[0]
        return size


@dataclass
class MoPEOutput(ModelOutput):
    """Output of a fusion model.

    Attributes:
        loss: (), task loss + importance_weight * importance_loss; None without labels.
        logits: (B,num_labels).
        importance_loss: (), mean over the routed blocks; None in evaluation without labels, and if nothing is routed.
        routing: `Routing` of each routed block, first block first; None if nothing is routed.
        features: (B,C), the input of the head; (B, C + Cc), the features of both encoders, with late_concat and ensemble.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    importance_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    features: Tensor | None = None

    def __repr__(self) -> str:
        return describe_output(self)


class MoPEForClassification(SavedModel):
    """Multimodal classifier with frozen encoders, whose prompts, routers, mapper and head are trained.

    The complementary encoders run first. Their features, concatenated or summed to psi (B,Cc), are the input of the routers and of
    the mapper, Linear(Cc, mapper_hidden) -> GELU -> Linear(mapper_hidden, C). The mapper makes one mapped prompt for all layers,
    which each layer projects with its own key and value weights. The main encoder then runs with its prompts, and the head
    classifies its feature. `MoPEConfig` describes all other options. With `finetuned`, encoder weights train as well, in place, in
    training mode but without dropout of attention probabilities.

    The backbones are frozen, prompted and kept in eval mode from construction until `detach`. Prompts are held in `blocks` (main
    encoder) and `cross_blocks` (complementary encoders), with one `MoPEAttention` for each prompted layer.

    Encoders are attributes with the names of their modalities, such as `vision` and `text`. `forward` accepts their inputs under
    the modality's names in a batch; `inspect.signature(model.forward)` lists them.

    A `SwinModel` is copied into a `MoPESwinEncoder`, which takes its place and holds its own prompts, routers and mapper; its
    feature is the mean over prompts and tokens. The original model is not changed, shares nothing with the copy, and may be
    deleted; `detach` has nothing to restore. The published MoPE uses a Swin Transformer for vision and a BERT for text:
    `MoPEConfig.preset("mope-v4")`.

    Args:
        config: Configuration of the model.
        **backbones: `vision=`, `text=` and so on: a transformers model of a known architecture (see `register_backbone`) for each
            of `config.modalities`.

    Raises:
        TypeError: A keyword is not the name of a modality.
        ValueError: A backbone is missing, superfluous, of the wrong modality, already prompted, or cannot be prompted; or the
            config requires something that a backbone does not support.
    """

    def __init__(self, config: MoPEConfig, **backbones: nn.Module | None) -> None:
        super().__init__()
        self._check_backbones(config, backbones)
        self.config, self.slots = config, config.slots
        for name in dict.fromkeys((*known(), *config.modalities)):
            backbone = backbones.get(name)
            # A modality that this model does not use may share its name with one of the model's attributes.
            if backbone is not None or not (name in OWN or hasattr(type(self), name)):
                setattr(self, name, None if backbone is None else base_model(backbone))
        self._sources = {m: source_of(self.backbone(m)) for m in config.modalities}
        kinds = {name: slot.modality.name for name, slot in self.slots.items()}
        self.widths = {m: find_architecture(self.backbone(m), kinds[m], m).hidden_size(self.backbone(m)) for m in config.modalities}
        dim, cross_dim = self.widths[config.main], self._cross_dim()
        for name in config.modalities:
            if isinstance(model := self.backbone(name), SwinModel):
                with naming_memory(_what_is_added(config)):
                    setattr(self, name, new_swin(config, name, model, cross_dim))
        if config.prompt_owner != "instance" and not any(self._is_swin(m) for m in config.modalities):
            raise ValueError(
                f"prompt_owner={config.prompt_owner!r} is an order of windows, which only a SwinModel has: "
                "set it to 'instance', or pass a SwinModel as vision"
            )
        # Adapters by slot, for the backbones that are prompted layer by layer.
        self._adapters = {m: find_adapter(self.backbone(m), kinds[m], m) for m in config.modalities if not self._is_swin(m)}
        self._warned_top_k = self._warned_local = False

        layers = {config.main: config.prompted_layers if config.prompts_main and config.prompt_depth == "deep" else ()}
        layers |= {m: None if config.cross_prompt_length else () for m in config.modalities[1:]}
        self._layers = {m: () if self._is_swin(m) else self._existing_layers(m, wanted) for m, wanted in layers.items()}
        self._attachments: dict[str, Attachment] = {}
        try:
            self.attach()
            with naming_memory(_what_is_added(config)):
                self._add_parts(dim, cross_dim)
            self.to(self.device)
            self.input_checks = InputChecks(self.slots)
            self.input_checks.sign(self)
        # This includes out-of-memory errors and interrupts, because the caller would have no way to detach the encoders.
        except BaseException:
            self.detach()
            raise

    @staticmethod
    def _check_backbones(config: MoPEConfig, backbones: Mapping[str, nn.Module | None]) -> None:
        """Check that the given encoders are those that the configuration requires."""
        every = dict.fromkeys((*known(), *config.modalities))
        if strangers := [name for name in backbones if name not in every]:
            hint = did_you_mean(strangers[0], every)
            raise TypeError(f"MoPEForClassification got {', '.join(strangers)}, which name no modality{hint and '; ' + hint}")
        if taken := [name for name in config.modalities if name in OWN or hasattr(MoPEForClassification, name)]:
            raise ValueError(
                f"a model has something else that is called {taken[0]}, so no encoder can use the name: choose another, "
                f"named={{'my_{taken[0]}': ...}}"
            )
        inputs = [name for slot in config.slots.values() for name in (*slot.names, *slot.flags)]
        if taken := [name for name in inputs if name in ARGUMENTS]:
            raise ValueError(f"forward has an argument {taken[0]} of its own, so no input can use the name: rename the modality")
        for name in every:
            backbone = backbones.get(name)
            if (backbone is not None) != (name in config.modalities):
                raise ValueError(
                    f"method {config.method!r} works on {' and '.join(config.modalities)}: "
                    f"{name} must {'not ' if backbone is not None else ''}be given"
                )
            if backbone is not None:
                check_encoder(backbone, name)
            if isinstance(backbone, MoPESwinEncoder):
                raise ValueError(f"{name} was given a MoPESwinEncoder, which holds the prompts of another model: give a SwinModel")

    def _cross_dim(self) -> int | None:
        """Return the width Cc of psi; None without complementary encoders."""
        widths = {m: self.widths[m] for m in self.config.modalities[1:]}
        if not widths:
            return None
        if self.config.combine == "concat":
            return sum(widths.values())
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{width} of {name}" for name, width in widths.items())
            raise ValueError(f"combine='sum' adds features of one width, these are {found}: set combine='concat'")
        return next(iter(widths.values()))

    def _add_parts(self, dim: int, cross_dim: int | None) -> None:
        """Add the trainable parts; `dim` and `cross_dim` are the widths of the main encoder and of psi."""
        config, (main, *others) = self.config, self.config.modalities
        # A Swin Transformer holds its own parts.
        layerwise = main in self._adapters
        self.router: Router | None = None
        if config.router_scope == "shared" and layerwise:
            self.router = make_router(
                config.router_kind, dim, cross_dim, config.experts, impl=config.impl, **router_options(config)
            )
        self.blocks = self._prompts_for(
            main,
            cross_dim=cross_dim,
            static_length=config.static_length,
            num_experts=config.experts,
            prompt_length=config.prompt_length,
            router=None if self.router else config.router_kind,
            **router_options(config),
        )
        of_others = [self._prompts_for(m, static_length=config.cross_prompt_length) for m in others]
        self.cross_blocks = nn.ModuleList(block for blocks in of_others for block in blocks)
        self.input_prompts: InputPrompts | None = None
        if config.prompts_main and config.prompt_depth == "shallow" and layerwise:
            adapter = self._adapters[main]
            if adapter.own_between:
                raise ValueError(
                    f"prompt_depth='shallow' is not supported with {type(adapter).__name__}, because prompt tokens would shift "
                    "the positions or biases of its attention: set prompt_depth='deep'"
                )
            first_layer = adapter.layers(self.backbone(main))[0]
            self.input_prompts = new_input_prompts(config, adapter.attention(first_layer).norm, dim)
        self.mapper: nn.Module | None = None
        if cross_dim is not None and config.maps and layerwise:
            self.mapper = new_mapper(config, [self.widths[m] for m in others] if config.mapper_each else [cross_dim], dim)
        self.pooling: AttentionPooling | None = None
        if config.feature == "attention":
            self.pooling = new_pooling(config, dim, self._num_heads(main), cross_dim)
        self.head = new_head(config, dim + (cross_dim or 0) if config.fusion.head == "concat" else dim)
        self.cross_head: nn.Sequential | None = None
        if cross_dim is not None and config.fusion.head == "mean":
            self.cross_head = new_head(config, cross_dim)

    def backbone(self, modality: str) -> nn.Module:
        """Return the encoder of a modality, given its name in the model."""
        backbone: nn.Module = getattr(self, modality)
        return backbone

    def encoder(self, modality: str, *, recomputing: Recomputing | None = None) -> LayerwiseEncoder | WindowedEncoder:
        """Return the object that encodes a modality with `encode(inputs, padding, prompts)`.

        Args:
            modality: Name of the encoder in the model.
            recomputing: Gradient checkpointing of the layers, or None to keep their activations.
        """
        backbone = self.backbone(modality)
        if isinstance(backbone, MoPESwinEncoder):
            return WindowedEncoder(backbone, recomputing=recomputing)
        return LayerwiseEncoder(backbone, self._adapters[modality], recomputing=recomputing)

    def _num_heads(self, modality: str) -> int:
        """Heads of an encoder's last layer."""
        if isinstance(backbone := self.backbone(modality), MoPESwinEncoder):
            swin: Any = backbone.config
            return int(swin.num_heads[-1])
        adapter = self._adapters[modality]
        layer: Any = adapter.layers(backbone)[-1]
        return adapter.attention(getattr(layer, "layer", layer)).num_heads

    def _is_swin(self, modality: str) -> bool:
        return isinstance(self.backbone(modality), MoPESwinEncoder)

    def _existing_layers(self, modality: str, wanted: Sequence[int] | None) -> tuple[int, ...]:
        count = len(self._adapters[modality].layers(self.backbone(modality)))
        if wanted is None:
            return tuple(range(count))
        if any(not -count <= i < count for i in wanted):
            raise ValueError(f"prompted_layers must lie in 0..{count - 1} for this {modality} backbone, got {list(wanted)}")
        return tuple(sorted({i % count for i in wanted}))

    def _prompts_for(self, modality: str, **options: Any) -> nn.ModuleList:
        return nn.ModuleList(
            MoPEAttention(
                self.frozen_attention(modality, i),
                self.widths[modality],
                bound=self.config.prompt_init_bound,
                prompt_dropout=self.config.prompt_dropout,
                impl=self.config.impl,
                **options,
            )
            for i in self._layers[modality]
        )

    def prompts_of(self, modality: str) -> dict[int, MoPEAttention]:
        """Return the prompts of each prompted layer of an encoder, by layer index; {} for one that is prompted in windows."""
        layers = self._layers[modality]
        if modality == self.config.main:
            blocks: Any = self.blocks
        else:
            start = sum(len(self._layers[m]) for m in self._before(modality))
            blocks = list(self.cross_blocks)[start : start + len(layers)]
        return dict(zip(layers, blocks, strict=True))

    def _before(self, modality: str) -> Sequence[str]:
        """Return the complementary encoders that precede one."""
        others = self.config.modalities[1:]
        return others[: others.index(modality)]

    def modality_of(self, parameter: str) -> str:
        """Return the encoder that a parameter belongs to; head, mapper and shared parts belong to the main encoder."""
        main, *others = self.config.modalities
        part, _, rest = parameter.partition(".")
        if part == "cross_blocks":
            of_blocks = [m for m in others for _ in self._layers[m]]
            return of_blocks[int(rest.partition(".")[0])]
        return part if part in others else main

    def frozen_attention(self, modality: str, layer: int) -> FrozenAttention:
        """Return the frozen attention of a prompted layer in the form that prompts use."""
        block: Any = self._adapters[modality].layers(self.backbone(modality))[layer]
        return self._adapters[modality].attend_to_prompts(block.layer)

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch on the device of the model, except attention masks, which stay where they are.

        With a CPU mask, padding of a BERT is dropped without a sync; with a GPU mask, padding is computed and masked.
        """
        masks = {slot.mask for slot in self.slots.values()}
        return {n: t if n in masks else t.to(self.device, non_blocking=True) for n, t in batch.items()}

    @property
    def attached(self) -> bool:
        """Return whether the backbones are frozen and prompted. Always true if all of them are copied Swin Transformers."""
        return set(self._adapters) == set(self._attachments)

    def attach(self) -> None:
        """Freeze and prompt the backbones again after `detach`."""
        try:
            for modality in self._adapters:
                if modality not in self._attachments:
                    finetune = modality in self.config.finetuned
                    self._attachments[modality] = attach(self.backbone(modality), self._layers[modality], finetune=finetune)
        except BaseException:
            self.detach()
            raise
        # Fine-tuned encoders follow the training mode of the model.
        self.train(self.training)

    def detach(self) -> None:
        """Restore the backbones: modules, weights, requires_grad and training mode. Afterwards the model cannot run.

        A Swin Transformer was copied, so there is nothing to restore.
        """
        self.cast_frozen(None)
        while self._attachments:
            self._attachments.popitem()[1].detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or an unpickled model."""
        super().__setstate__(state)
        self.input_checks.sign(self)
        self.frozen_weights_moved()

    def frozen_weights_moved(self) -> None:
        """Make the weights of joined projections adjacent in memory again."""
        for attachment in self._attachments.values():
            attachment.join_projections()

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Return the encoders that do not train, excluding the modules added to them."""
        for modality in self.config.modalities:
            encoder = self.backbone(modality)
            if modality not in self.config.finetuned:
                yield from encoder.swin_modules() if isinstance(encoder, MoPESwinEncoder) else [encoder]

    def train(self, mode: bool = True) -> MoPEForClassification:
        """Set the training mode of prompts, routers, mapper, head and encoders that train; frozen encoders stay in eval mode."""
        super().train(mode)
        for modality in self._attachments:
            if modality not in self.config.finetuned:
                self.backbone(modality).eval()
        return self

    def routed_blocks(self) -> tuple[str, ...]:
        """Return the names of the blocks whose routing `forward` returns, in the same order, counting from 0."""
        return tuple(self.routers())

    def routers(self) -> dict[str, Router]:
        """Return the router of each routed block. Blocks may share a router."""
        if isinstance(encoder := self.backbone(self.config.main), MoPESwinEncoder):
            return encoder.routed_blocks()
        routers = {f"layer {i}": prompts.router or self.router for i, prompts in self.prompts_of(self.config.main).items()}
        return {name: router for name, router in routers.items() if router is not None}

    def trains(self, modality: str) -> bool:
        """Return whether the feature of an encoder depends on anything that trains: its weights or its prompts.

        If this is False for the complementary encoders, `encode_complementary` returns the same result in every epoch.
        """
        own: tuple[nn.Module | None, ...] = (self.blocks, self.input_prompts, self.router)
        if modality != self.config.main:
            own = tuple(self.prompts_of(modality).values())
        return any(p.requires_grad for module in (*own, self.backbone(modality)) if module is not None for p in module.parameters())

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that are not frozen: those added to the encoders, and the encoders that train."""
        return self._state_dict_without(m for m in self.config.modalities if m not in self.config.finetuned)

    def added_state_dict(self) -> dict[str, Tensor]:
        """Return everything except the encoders: parameters, frozen expert embeddings of routers, statistics of BatchNorm."""
        return self._state_dict_without(self.config.modalities)

    def _state_dict_without(self, modalities: Iterable[str]) -> dict[str, Tensor]:
        left_out: tuple[str, ...] = ()
        for modality in modalities:
            if isinstance(encoder := self.backbone(modality), MoPESwinEncoder):
                left_out += tuple(f"{modality}.{name}" for name in encoder.swin_tensors())
            else:
                left_out += (f"{modality}.",)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(left_out)}

    @in_frozen_dtype
    def forward(
        self,
        /,
        *,
        labels: Tensor | None = None,
        cross_features: Tensor | None = None,
        banks: Sequence[PromptBank | None] | None = None,
        router_noise: bool = False,
        output_attentions: bool = False,
        **inputs: Any,
    ) -> MoPEOutput:
        """Classify a batch.

        Args:
            labels: (B,) integer, or (B,num_labels) of 0 and 1 with problem_type "multi_label".
            cross_features: (B,Cc), the result of `encode_complementary`. The complementary encoders then do not run, and need no
                inputs.
            banks: Result of `build_banks`, with which the prompts are projected only once for many batches.
            router_noise: Whether to add router noise in evaluation too.
            output_attentions: Must be False.
            **inputs: Inputs of the encoders, under the modalities' names in a batch. `inspect.signature(model.forward)` lists them;
                `mope.modalities.Vision` and `mope.modalities.Text` describe them.

        Raises:
            TypeError: An input is not a tensor, or its name is unknown to all modalities.
            ValueError: An input is missing or has another number of items; a shape is wrong; ids or labels on the CPU are out of
                range; a text is longer than the positions of its encoder; a bank is stale; attention matrices are requested; or
                positions cannot be interpolated.
            RuntimeError: Prompts would be skipped, because a backbone was detached or its layers were replaced.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True: the fused attention never forms the attention matrix, so it cannot be returned"
            )
        config = self.config
        check_are_tensors({"labels": labels, "cross_features": cross_features})
        read = self.read(inputs, config.modalities if cross_features is None else (config.main,))
        self._warn()

        batch = read[config.main].batch
        psi = mapped = None
        if cross_features is not None:
            psi = self.check_cross_features(cross_features, batch)
        elif config.complementary:
            psi = self._encode_complementary(read)
        if self.mapper is not None and psi is not None:
            mapped = as_prompts(self.mapper(psi.to(_dtype(self.mapper, psi.dtype))))
        noise = sample_noise(list(self.routers().values()), batch, always=router_noise)
        features, routing = self._encode_main(read[config.main], psi, mapped, noise, banks)
        logits, features = self._classify(features, psi)

        unevenness = self._importance(routing, noise) if routing and (self.training or labels is not None) else None
        loss = None if labels is None else task_loss(logits, labels, self.config.problem_type)
        if loss is not None and unevenness is not None:
            loss = loss + config.importance_weight * unevenness
        return MoPEOutput(loss, logits, unevenness, routing or None, features)

    @in_frozen_dtype
    def encode_complementary(self, /, **inputs: Any) -> Tensor:
        """Compute psi (B,Cc), the features of the complementary encoders, from the inputs of `forward`.

        Inputs of the main encoder are ignored. `forward(..., cross_features=psi)` then runs only the main encoder, which saves time
        in every epoch but the first if the complementary encoders train nothing (`trains`).

        Raises:
            ValueError: The method has no complementary encoder, or an input of one is missing.
        """
        if not self.config.complementary:
            raise ValueError(f"method {self.config.method!r} has no complementary encoder")
        return self._encode_complementary(self.read(inputs, self.config.modalities[1:]))

    def combine(self, features: Sequence[Tensor]) -> Tensor:
        """Combine the features of the complementary encoders, in the order of the configuration, to psi (B,Cc)."""
        if len(features) == 1:
            return features[0]
        if self.config.combine == "concat":
            return torch.cat(list(features), dim=-1)
        # The sum has the widest of the dtypes, whatever their order.
        return reduce(torch.add, features)

    def read(self, given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, EncoderInputs]:
        """Sort the contents of a batch by encoder, and check them.

        Args:
            given: The batch.
            wanted: Names of the encoders that have to run.

        Raises:
            TypeError: An input is not a tensor, or its name is unknown to all modalities.
            ValueError: An input is missing, or does not fit its encoder or the other inputs.
        """
        own, flags = self.input_checks.own(self, given, wanted, self.check_takes)
        return {name: self._inputs_of(name, own[name], flags[name]) for name in self.slots}

    def check_takes(self, modality: str, flag: str) -> None:
        """Raise ValueError, with the reason, if an encoder does not support a flag of its modality."""
        if (why := self.encoder(modality).refusal(flag)) is not None:
            raise ValueError(f"{flag}: {why}")

    def check_flag(self, flag: str) -> None:
        """Raise ValueError, with the reason, if no modality of the model has a flag or one of its encoders does not support it."""
        takers = [name for name, slot in self.slots.items() if flag in slot.modality.flags]
        if not takers:
            kind = next((name for name, modality in known().items() if flag in modality.flags), "such")
            raise ValueError(f"{flag}: method {self.config.method!r} has no {kind} encoder")
        for name in takers:
            self.check_takes(name, flag)

    def _inputs_of(self, name: str, own: dict[str, Tensor], flags: dict[str, bool]) -> EncoderInputs:
        modality = self.slots[name].modality
        mask = own.get(modality.mask) if modality.mask is not None else None
        inputs = as_encoder_knows(self.slots[name], own)
        if mask is None:
            return EncoderInputs({**inputs, **flags}, Padding())
        if name in self._adapters:
            mask = self._adapters[name].token_mask(self.backbone(name), mask)
        per_token = modality.input_per_token
        padding = Padding.of(mask, self.device, left=self.config.padding_side == "left", can_reorder=per_token)
        if per_token:
            inputs = {each: padding.tokens_first(tensor) for each, tensor in inputs.items()}
        return EncoderInputs({**inputs, **flags}, padding)

    def check_cross_features(self, psi: Tensor, batch: int) -> Tensor:
        """Check that a given psi is (B,Cc), and return it."""
        width = self._cross_dim()
        if width is None:
            raise ValueError(f"method {self.config.method!r} has no complementary encoder: cross_features must not be given")
        if tuple(psi.shape) != (batch, width):
            raise ValueError(f"cross_features must be {(batch, width)}, got {tuple(psi.shape)}")
        return psi

    def _classify(self, features: Tensor, psi: Tensor | None) -> tuple[Tensor, Tensor]:
        """Classify features (B,C) and psi (B,Cc); return logits (B,num_labels) and the features that they were computed from."""
        if psi is None or self.config.fusion.head == "main":
            return self.head(features.to(_dtype(self.head))), features
        both = torch.cat([features, psi.to(features.dtype)], dim=-1)
        if self.cross_head is None:
            return self.head(both.to(_dtype(self.head))), both
        logits = self.head(features.to(_dtype(self.head))) + self.cross_head(psi.to(_dtype(self.cross_head)))
        return logits / 2, both

    def _importance(self, routing: Sequence[Routing], noise: Sequence[Tensor | None]) -> Tensor:
        """Compute the importance loss.

        It spans the batches of all processes in training only, because in evaluation not all processes may get here.
        """
        config = self.config
        noise_of = {id(r): n for r, n in zip(routing, noise, strict=True)}
        return importance(
            [r.probs if config.importance_noise else without_noise(r.probs, noise_of[id(r)]) for r in distinct(routing)],
            threshold=config.importance_threshold,
            impl=config.impl,
            across_processes=self.training and config.prompt_owner == "instance",
        )

    def _warn(self) -> None:
        """Issue warnings about training, once each."""
        config = self.config
        if self.training and config.prompt_owner == "released" and is_distributed() and not self._warned_local:
            self._warned_local = True
            warn_of_local_batches()
        if self.training and config.experts and config.train_top_k == 1 < config.num_experts and not self._warned_top_k:
            self._warned_top_k = True
            warnings.warn(
                "training with train_top_k=1: the router gets almost no gradient from the task loss (none with renormalize); "
                "train with train_top_k=None and set eval_top_k=1",
                stacklevel=6,
            )

    def _encode_complementary(self, read: Mapping[str, EncoderInputs]) -> Tensor:
        return self.combine([self._encode(m, read[m]) for m in self.config.modalities[1:]])

    def _encode(self, modality: str, inputs: EncoderInputs) -> Tensor:
        """Run a complementary encoder with its static prompts, and return its feature (B,C)."""
        with torch.set_grad_enabled(self._needs_graph(modality, *inputs.given.values())):
            encoder = self._ready_encoder(modality)
            if isinstance(encoder, WindowedEncoder):
                return encoder.encode(*inputs, TrainedWindowPrompts(encoder.backbone, inputs.batch))[0]
            return encoder.encode(*inputs, TrainedPrompts(self.prompts_of(modality)))[0]

    def _encode_main(
        self,
        inputs: EncoderInputs,
        cross: Tensor | None,
        mapped: Tensor | None,
        noise: Sequence[Tensor | None],
        banks: Sequence[PromptBank | None] | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run the main encoder with its prompts, and return its feature (B,C) and the routing of each routed block."""
        config, top_k = self.config, self.config.train_top_k if self.training else self.config.eval_top_k
        pool = self._pool(cross)
        with torch.set_grad_enabled(self._needs_graph(config.main, cross, mapped, *noise, *inputs.given.values())):
            encoder = self._ready_encoder(config.main)
            if isinstance(encoder, WindowedEncoder):
                if banks is not None:
                    raise ValueError(NO_BANKS)
                swin = encoder.backbone
                windows = TrainedWindowPrompts(swin, inputs.batch, cross, mapped=swin.mapped(cross), noise=noise, top_k=top_k)
                return encoder.encode(*inputs, windows, pool)
            prompts = TrainedPrompts(
                self.prompts_of(config.main),
                cross=cross,
                mapped=mapped,
                noise=noise,
                top_k=top_k,
                banks=banks,
                router=self.router,
                input_prompts=self.input_prompts,
            )
            return encoder.encode(*inputs, prompts, pool)

    def _pool(self, psi: Tensor | None) -> Pool | None:
        """Return what makes the main encoder's feature from its tokens; None for its own summary."""
        if self.config.feature == "first":
            return None
        pooling, with_gradients = self.pooling, torch.is_grad_enabled()
        if pooling is None:
            return mean_pooling

        def pool(tokens: Tensor, padding: Padding) -> Tensor:
            # Where nothing in the encoder trains, it runs without gradients.
            with torch.set_grad_enabled(with_gradients):
                return pooling(tokens, padding, psi)

        return pool

    def _ready_encoder(self, modality: str) -> LayerwiseEncoder | WindowedEncoder:
        """Return the encoder of a modality. RuntimeError if its prompts would be skipped."""
        encoder = self.encoder(modality, recomputing=self._checkpointing if self.training and torch.is_grad_enabled() else None)
        if isinstance(encoder, WindowedEncoder):
            return encoder
        if modality not in self._attachments:
            raise RuntimeError(f"the prompts of the {modality} backbone were detached and would be skipped: call attach() first")
        wanted, found = list(self._layers[modality]), encoder.prompted()
        if found != wanted:
            raise RuntimeError(
                f"layers {wanted} of the {modality} backbone were prompted and layers {found} are: "
                "layers were replaced after attach(), and prompts would be skipped"
            )
        return encoder

    def _needs_graph(self, modality: str, *given: Any) -> bool:
        """Return whether an encoder or its inputs require gradients."""
        asked = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        return torch.is_grad_enabled() and (asked or self.trains(modality))

    @in_frozen_dtype
    def build_banks(self) -> tuple[PromptBank | None, ...]:
        """Project the experts of each prompted layer once, for many calls of `forward(..., banks=banks)`.

        The result is differentiable if gradients are enabled. It holds None for layers without experts, and for layers that change
        the keys of prompts after projecting them. A bank raises an error if its prompts have changed. Changes to the backbone's own
        weights are not detected; build new banks after them.

        Raises:
            ValueError: The main encoder is a Swin Transformer.
        """
        main = self.config.main
        if self._is_swin(main):
            raise ValueError(NO_BANKS)
        frozen = {i: self.frozen_attention(main, i) for i in self.prompts_of(main)}
        return tuple(
            None if block.experts is None or not frozen[i].can_bank else block.build_bank(frozen[i])
            for i, block in self.prompts_of(main).items()
        )

    @contextmanager
    def answering(self, *, experts: bool = False) -> Iterator[Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FusionModel.answering`; an expert that is not taken has weight 0."""
        if experts and not (names := self.routed_blocks()):
            raise ValueError(f"experts: this model routes nothing (method {self.config.method!r}), so there are none to name")
        with self.serving() as predict:

            def answer(**batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
                out: MoPEOutput = predict(**batch)
                assert out.logits is not None
                if not experts:
                    return out.logits, {}
                routing = zip(names, out.routing or (), strict=True)
                return out.logits, {name: dense_weights(r.weights, r.indices, r.probs.shape[1]) for name, r in routing}

            yield answer

    @contextmanager
    def serving(
        self,
        *,
        prepack: bool = True,
        graphs: bool = False,
        batch_sizes: Sequence[int] | None = None,
        max_graphs: int = 8,
        interpolate_pos_encoding: bool = False,
    ) -> Iterator[Callable[..., MoPEOutput]]:
        """Serve the model within the context: evaluation mode, no gradients, prompts projected once (see `build_banks`).

        The prompts of a Swin Transformer are not projected in advance.

        Args:
            prepack: Whether to prepack weights on the CPU, see `prepacked`.
            graphs: Whether to launch all kernels of a call at once on a GPU, see `mope.CudaGraphRunner`. Calls have to come from
                the current thread.
            batch_sizes: See `mope.CudaGraphRunner`; needs prompt_owner "instance".
            max_graphs: See `mope.CudaGraphRunner`.
            interpolate_pos_encoding: Value of this flag in every call, see `forward`.

        >>> with model.serving() as predict:
        ...     logits = predict(**batch).logits
        """
        if batch_sizes is not None and not graphs:
            raise ValueError("serving: batch_sizes has an effect only with graphs=True")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.prepacked() if prepack else nullcontext():
                options: dict[str, Any] = {} if self._is_swin(self.config.main) else {"banks": self.build_banks()}
                if interpolate_pos_encoding:
                    self.check_flag("interpolate_pos_encoding")
                    options["interpolate_pos_encoding"] = True
                predict = partial(self, **options) if options else self
                if not graphs:
                    yield predict
                    return
                # The guard is needed because replaying a graph does not run the check for stale banks.
                in_banks = [p for block in self.blocks for name, p in block.named_parameters() if not name.startswith("router.")]
                with CudaGraphRunner(
                    predict,
                    max_graphs=max_graphs,
                    batch_sizes=batch_sizes,
                    guard=lambda: (self.config, [version(p) for p in in_banks]),
                ) as run:
                    yield run
        finally:
            self.train(was_training)


def _what_is_added(config: MoPEConfig) -> str:
    lengths = f"static_length={config.static_length}, prompt_length={config.prompt_length}, num_experts={config.num_experts}"
    return f"what MoPEConfig adds to the encoders with {lengths}; reduce them, num_experts first"


def _dtype(module: nn.Module, without: torch.dtype = torch.float32) -> torch.dtype:
    """Return the dtype of the parameters, or `without` if there are none."""
    return next((p.dtype for p in module.parameters()), without)


register_model(MoPEForClassification)
