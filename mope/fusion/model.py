"""Fusion models over frozen transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinModel
from transformers.utils.generic import ModelOutput

from mope.backbones import Attachment, BackboneAdapter, PromptedLayer, attach, base_model, find_adapter, find_architecture
from mope.checks import Warnings, check_are_tensors, check_encoder, check_images, check_texts, naming_memory
from mope.encoders.importance import importance, is_distributed, warn_of_local_batches
from mope.encoders.windowed import MoPESwinEncoder, distinct
from mope.fused import FrozenAttention, InputPrompts, MoPEAttention, Packing, PromptBank, Router
from mope.fused.modules import version
from mope.fused.prepack import PrepackedLayers
from mope.fused.router import make_router, sample_noise, without_noise
from mope.fusion.checkpoint import SavedModel
from mope.fusion.config import MoPEConfig
from mope.fusion.frozen import HALF, CastWeights
from mope.fusion.heads import new_head, new_input_prompts, new_mapper, new_swin, router_options, task_loss
from mope.fusion.sources import source_of
from mope.graphs import CudaGraphRunner
from mope.printing import describe_output
from mope_kernels import Routing

NO_BANKS = (
    "a Swin Transformer has no banks: its prompts pass through every part of a block, not only as keys and values: leave banks out"
)

P = ParamSpec("P")
R = TypeVar("R")

# The input that an encoder cannot do without.
REQUIRED = {"vision": "pixel_values", "text": "input_ids"}


@dataclass
class MoPEOutput(ModelOutput):
    """What a fusion model returns.

    loss: (), task loss + importance_weight * importance_loss; None without labels.
    logits: (B,num_labels).
    importance_loss: (), mean over the routed blocks; None in evaluation without labels, and where nothing is routed.
    routing: the `Routing` of each routed block, first block first; None where nothing is routed.
    features: (B,C), what the head sees; (B, C + Cc) of both encoders in late_concat and ensemble.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    importance_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    features: Tensor | None = None

    def __repr__(self) -> str:
        return describe_output(self)


class Padding(NamedTuple):
    """Where the padding of a text batch is: `lengths` (B,) for right padding, `token_mask` (B,L) bool for any; or nowhere.

    `packing`, where the host knows it, to do without. `order` (B,L) int64: where each token came from, of texts that `tokens_first`
    has to put in order for `lengths` to be true.
    """

    lengths: Tensor | None = None
    token_mask: Tensor | None = None
    packing: Packing | None = None
    order: Tensor | None = None

    def tokens_first(self, of_tokens: Tensor) -> Tensor:
        """(B,L), or (1,L) for all items -> (B,L), tokens in front of padding and in the order that they had."""
        return of_tokens if self.order is None else of_tokens.expand_as(self.order).gather(1, self.order)

    def as_mask(self, num_tokens: int) -> Any:
        """(B,L) bool, None without padding."""
        if self.lengths is None:
            return self.token_mask
        return torch.arange(num_tokens, device=self.lengths.device) < self.lengths[:, None]

    def first_tokens(self, hidden_states: Tensor) -> Tensor:
        """(B,L,C) -> (B,C), each item's first token that is no padding."""
        if self.token_mask is None:
            return hidden_states[:, 0]
        first = self.token_mask.int().argmax(-1)
        return hidden_states[torch.arange(first.shape[0], device=first.device), first]


def in_frozen_dtype(
    method: Callable[Concatenate[MoPEForClassification, P], R],
) -> Callable[Concatenate[MoPEForClassification, P], R]:
    """Under autocast of the dtype that `cast_frozen` was given, if it was."""

    @wraps(method)
    def run(model: MoPEForClassification, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if model.frozen_dtype is None:
            return method(model, *args, **kwargs)
        with torch.autocast(model.device.type, dtype=model.frozen_dtype):
            return method(model, *args, **kwargs)

    return run


class MoPEForClassification(SavedModel):
    """Classifies image-text pairs with frozen encoders; prompts, routers, mapper and head are trained.

    The complementary encoder runs first. The feature of its first token, psi (B,Cc), goes to the routers and the mapper,
    Linear(Cc, mapper_hidden) -> GELU -> Linear(mapper_hidden, C): one mapped prompt for all layers, which each layer projects
    with its own keys and values. The main encoder runs with its prompts, and the head reads its first token. What else there is,
    `MoPEConfig` says; with `finetuned` the weights of the encoders train as well, in place, in training mode but without the
    dropout of attention probabilities.

    The backbones are frozen, prompted and kept in eval mode from construction to `detach`. Prompts stand in `blocks` (main
    encoder) and `cross_blocks` (complementary encoder), one `MoPEAttention` for each prompted layer.

    A `SwinModel` is copied into a `MoPESwinEncoder`, which stands in `vision` and holds prompts, routers and mapper of its own; its
    feature is the mean over prompts and tokens. The model that was given is not changed, nothing is shared with it, and
    it may be deleted; `detach` has nothing to give back. As MoPE was published: vision a Swin Transformer, text a BERT,
    `MoPEConfig.preset("mope-v4")`.

    Args:
        config: what to build.
        vision, text: transformers models of a known architecture (see `register_backbone`), those that the method needs.

    Raises:
        ValueError: a backbone is missing, superfluous, of the wrong modality, prompted already, or cannot be prompted; or the
            config asks for something that this backbone does not have.
    """

    def __init__(self, config: MoPEConfig, *, vision: nn.Module | None = None, text: nn.Module | None = None) -> None:
        super().__init__()
        for modality, backbone in (("vision", vision), ("text", text)):
            if (backbone is not None) != (modality in config.modalities):
                raise ValueError(
                    f"method {config.method!r} works on {' and '.join(config.modalities)}: "
                    f"{modality} must {'not ' if backbone is not None else ''}be given"
                )
            if backbone is not None:
                check_encoder(backbone, modality)
        if isinstance(vision, MoPESwinEncoder):
            raise ValueError("vision was given a MoPESwinEncoder, which holds the prompts of another model: give a SwinModel")
        self.config = config
        self.vision: nn.Module | None = None if vision is None else base_model(vision)
        self.text: nn.Module | None = None if text is None else base_model(text)
        self._sources = {m: source_of(self.backbone(m)) for m in config.modalities}
        main, other = config.main, config.complementary
        self._widths = {m: find_architecture(self.backbone(m), m).hidden_size(self.backbone(m)) for m in config.modalities}
        dim, cross_dim = self._widths[main], self._widths[other] if other else None
        if isinstance(self.vision, SwinModel):
            with naming_memory(_what_is_added(config)):
                self.vision = new_swin(config, self.vision, cross_dim)
        elif config.prompt_owner != "instance":
            raise ValueError(
                f"prompt_owner={config.prompt_owner!r} is an order of windows, which only a SwinModel has: "
                "set it to 'instance', or give a SwinModel as vision"
            )
        # By modality, of the backbones that are prompted layer by layer.
        self._adapters = {m: find_adapter(self.backbone(m), m) for m in config.modalities if not self._is_swin(m)}
        self._checkpointing = False
        self._cast: CastWeights | None = None
        self._warned_top_k = self._warned_local = False
        self._warnings = Warnings()

        layers = {main: config.prompted_layers if config.prompts_main and config.prompt_depth == "deep" else ()}
        if other:
            layers[other] = None if config.cross_prompt_length else ()
        self._layers = {m: () if self._is_swin(m) else self._existing_layers(m, wanted) for m, wanted in layers.items()}
        self._attachments: dict[str, Attachment] = {}
        try:
            self.attach()
            with naming_memory(_what_is_added(config)):
                self._add_parts(dim, cross_dim)
            self.to(self.device)
        # Also memory that is not there, and an interruption: whoever gave the encoders has no handle to detach them by.
        except BaseException:
            self.detach()
            raise

    def _add_parts(self, dim: int, cross_dim: int | None) -> None:
        """What trains: `dim` and `cross_dim` are the widths of the main and the complementary encoder."""
        config, (main, *others) = self.config, self.config.modalities
        other = others[0] if others else None
        # A Swin Transformer holds its own.
        layerwise = main in self._adapters
        self.router: Router | None = None
        if config.router_scope == "shared" and layerwise:
            self.router = make_router(config.router, dim, cross_dim, config.experts, impl=config.impl, **router_options(config))
        self.blocks = self._prompts_for(
            main,
            cross_dim=cross_dim,
            static_length=config.static_length,
            num_experts=config.experts,
            prompt_length=config.prompt_length,
            router=None if self.router else config.router,
            **router_options(config),
        )
        self.cross_blocks = self._prompts_for(other, static_length=config.cross_prompt_length) if other else nn.ModuleList()
        self.input_prompts: InputPrompts | None = None
        if config.prompts_main and config.prompt_depth == "shallow" and layerwise:
            adapter = self._adapters[main]
            first_layer = adapter.layers(self.backbone(main))[0]
            self.input_prompts = new_input_prompts(config, adapter.attention(first_layer).norm, dim)
        self.mapper: nn.Module | None = None
        if cross_dim is not None and config.maps and layerwise:
            self.mapper = new_mapper(config, cross_dim, dim)
        self.head = new_head(config, dim + (cross_dim or 0) if config.method == "late_concat" else dim)
        self.cross_head: nn.Sequential | None = None
        if cross_dim is not None and config.method == "ensemble":
            self.cross_head = new_head(config, cross_dim)

    def backbone(self, modality: str) -> nn.Module:
        """The "vision" or "text" encoder."""
        backbone: nn.Module = getattr(self, modality)
        return backbone

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
                self._frozen(modality, i),
                self._widths[modality],
                bound=self.config.prompt_init_bound,
                prompt_dropout=self.config.prompt_dropout,
                impl=self.config.impl,
                **options,
            )
            for i in self._layers[modality]
        )

    def _prompts_of(self, modality: str) -> dict[int, MoPEAttention]:
        """The prompts of each prompted layer."""
        blocks: Any = self.blocks if modality == self.config.main else self.cross_blocks
        return dict(zip(self._layers[modality], blocks, strict=True))

    def _frozen(self, modality: str, layer: int) -> FrozenAttention:
        block: Any = self._adapters[modality].layers(self.backbone(modality))[layer]
        return self._adapters[modality].attention(block.layer)

    @property
    def device(self) -> torch.device:
        return next(self.backbone(self.config.main).parameters()).device

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device of the model, but for the attention mask, which stays where it is.

        Of a mask on the CPU the host reads which rows of a BERT are padding, and leaves them out; it waits for nothing. From one
        on a GPU it would have to wait, and padding is computed with and hidden from attention.
        """
        return {n: t if n == "attention_mask" else t.to(self.device, non_blocking=True) for n, t in batch.items()}

    @property
    def attached(self) -> bool:
        """Whether the backbones are frozen and wait for prompts. Always so for a Swin Transformer alone, which is a copy."""
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
        # Those that are fine-tuned are in the mode of the model.
        self.train(self.training)

    def detach(self) -> None:
        """Give the backbones back as they were: modules, weights, requires_grad, training mode. The model does not run any more.

        There is nothing to give back of a Swin Transformer, which was copied.
        """
        self.cast_frozen(None)
        while self._attachments:
            self._attachments.popitem()[1].detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoPEForClassification:
        """`to`, `half`, `cuda` and their like: parameters that lay side by side do so again.

        Raises:
            ValueError: another dtype is asked for than that of `cast_frozen`, from which what was rounded would not come back.
        """
        if (dtype := self.frozen_dtype) is not None and fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype:
            raise ValueError(f"the frozen weights are in {dtype} by cast_frozen: call cast_frozen(None) before another dtype")
        super()._apply(fn, recurse)
        self._join_projections()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of what was pickled."""
        super().__setstate__(state)
        self._join_projections()

    def _join_projections(self) -> None:
        for attachment in self._attachments.values():
            attachment.join_projections()

    @property
    def frozen_dtype(self) -> torch.dtype | None:
        """What `cast_frozen` was given."""
        return None if self._cast is None else self._cast.dtype

    def cast_frozen(self, dtype: torch.dtype | None) -> None:
        """Keep frozen weights of linear and convolution layers in 16 bits, and compute under autocast of that dtype from now on.

        The same numbers, bit for bit, as `torch.autocast` of that dtype around the model, which casts these weights in every
        forward. What trains stays as it is, fine-tuned encoders too. An accelerator then holds half as many bytes of them: the
        weights as they were go to the memory of the host (on the CPU they stay there beside those in 16 bits). They are what
        `save_pretrained` writes and fingerprints are of, and `detach` brings them back.

        Args:
            dtype: torch.bfloat16 or torch.float16; None: bring the weights back, and compute in their dtype again.

        Raises:
            ValueError: another dtype; or cast weights were changed since, so that there is nothing to bring back.
        """
        if dtype not in (None, *HALF):
            raise ValueError(f"cast_frozen: dtype must be torch.float16, torch.bfloat16 or None, got {dtype}")
        if dtype == self.frozen_dtype:
            return
        try:
            if self._cast is not None:
                self._cast.undo()
                self._cast = None
            if dtype is not None:
                self._cast = CastWeights(self._frozen_parts(), dtype)
        finally:
            self._join_projections()

    def _frozen_parts(self) -> Iterator[nn.Module]:
        """The encoders that do not train, without what was added to them."""
        for modality in self.config.modalities:
            encoder = self.backbone(modality)
            if modality not in self.config.finetuned:
                yield from encoder.swin_modules() if isinstance(encoder, MoPESwinEncoder) else [encoder]

    @contextmanager
    def prepacked(self) -> Iterator[None]:
        """For a while frozen linear layers on the CPU keep copies of their weights in the order that oneDNN multiplies fastest.

        The same results but for the order of sums. The copies take as much memory again as the weights (twice as much in training,
        where gradients pass through), in float32 and bfloat16; other dtypes and devices are left alone.
        """
        layers = PrepackedLayers(self._frozen_parts()) if self.device.type == "cpu" else None
        try:
            yield
        finally:
            if layers is not None:
                layers.undo()

    @contextmanager
    def weights_as_given(self) -> Iterator[None]:
        """For a while the encoders have the weights that they had before `cast_frozen`, in the memory of the host."""
        with nullcontext() if self._cast is None else self._cast.as_before():
            yield

    def train(self, mode: bool = True) -> MoPEForClassification:
        """Training mode of prompts, routers, mapper, head and encoders that train; frozen ones stay in eval mode."""
        super().train(mode)
        for modality in self._attachments:
            if modality not in self.config.finetuned:
                self.backbone(modality).eval()
        return self

    def routed_blocks(self) -> tuple[str, ...]:
        """Names of the blocks whose routing `forward` returns, in its order; layers, stages and blocks count from 0."""
        return tuple(self._routers())

    def _routers(self) -> dict[str, Router]:
        """The router of each routed block, which blocks may share."""
        if isinstance(encoder := self.backbone(self.config.main), MoPESwinEncoder):
            return encoder.routed_blocks()
        routers = {f"layer {i}": prompts.router or self.router for i, prompts in self._prompts_of(self.config.main).items()}
        return {name: router for name, router in routers.items() if router is not None}

    def trains(self, modality: str) -> bool:
        """Whether anything is trained that the feature of this encoder depends on: its weights, or prompts in it.

        Where it is False for the complementary encoder, `encode_complementary` gives the same in every epoch.
        """
        main = (self.blocks, self.input_prompts, self.router)
        modules = (*(main if modality == self.config.main else (self.cross_blocks,)), self.backbone(modality))
        return any(p.requires_grad for module in modules if module is not None for p in module.parameters())

    def trained_state_dict(self) -> dict[str, Tensor]:
        """All that is not frozen: what was added to the encoders, and the encoders that train."""
        return self._state_dict_without(m for m in self.config.modalities if m not in self.config.finetuned)

    def added_state_dict(self) -> dict[str, Tensor]:
        """All but the encoders: parameters, frozen expert embeddings of routers, statistics of a mapper's BatchNorm."""
        return self._state_dict_without(self.config.modalities)

    def _state_dict_without(self, modalities: Iterable[str]) -> dict[str, Tensor]:
        left_out: tuple[str, ...] = ()
        for modality in modalities:
            if isinstance(encoder := self.backbone(modality), MoPESwinEncoder):
                left_out += tuple(f"vision.{name}" for name in encoder.swin_tensors())
            else:
                left_out += (f"{modality}.",)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(left_out)}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute prompted blocks in the backward pass instead of keeping their activations, with the same noise and routing."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("gradient checkpointing with use_reentrant=True is not supported: prompts are keyword arguments")
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self._checkpointing = False

    @in_frozen_dtype
    def forward(
        self,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cross_features: Tensor | None = None,
        banks: Sequence[PromptBank | None] | None = None,
        router_noise: bool = False,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
    ) -> MoPEOutput:
        """Classify a batch.

        Args:
            pixel_values: (B,channels,height,width), as the vision backbone wants them.
            input_ids, attention_mask, token_type_ids, position_ids: (B,L) integer, as the text backbone wants them. The mask may be
                on the CPU whatever the device: nothing is then computed for padding (see `on_device`).
            labels: (B,) integer, or (B,num_labels) of 0 and 1 with problem_type "multi_label".
            cross_features: (B,Cc) of `encode_complementary`. The complementary encoder then does not run, and needs no inputs.
            banks: of `build_banks`, to project the prompts once for many batches.
            router_noise: add router noise in evaluation too.
            interpolate_pos_encoding: take images of another size than the vision encoder's, as transformers does: its encoding of
                positions is interpolated. Not in a Swin Transformer.
            output_attentions: refused.

        Raises:
            TypeError: an input is no tensor.
            ValueError: an input is missing or has another number of items; something has another shape; ids or labels that are on
                the CPU lie outside of what there is; a text is longer than its encoder has positions; a bank is stale; attention
                matrices are asked for; or positions cannot be interpolated.
            RuntimeError: prompts would be skipped, because a backbone was detached or its layers were replaced.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True: the fused attention never forms the attention matrix, so it cannot be returned"
            )
        config = self.config
        check_are_tensors(labels=labels, cross_features=cross_features)
        inputs, padding = self._inputs(
            pixel_values, input_ids, attention_mask, token_type_ids, position_ids, interpolate_pos_encoding
        )
        self._check_given(inputs, config.modalities if cross_features is None else (config.main,))
        self._warn()

        # torch.export fixes what len() gives.
        batch = inputs[config.main][REQUIRED[config.main]].shape[0]
        psi = mapped = None
        if cross_features is not None:
            psi = self._check_cross_features(cross_features, batch)
        elif config.complementary:
            psi, _ = self._encode(config.complementary, inputs, padding)
        if self.mapper is not None and psi is not None:
            mapped = self.mapper(psi.to(_dtype(self.mapper, psi.dtype)))[:, None]
        noise = sample_noise(list(self._routers().values()), batch, always=router_noise)
        features, routing = self._encode(
            config.main,
            inputs,
            padding,
            cross=psi,
            mapped=mapped,
            noise=noise,
            top_k=config.train_top_k if self.training else config.eval_top_k,
            banks=banks,
        )
        logits, features = self._classify(features, psi)

        unevenness = self._importance(routing, noise) if routing and (self.training or labels is not None) else None
        loss = None if labels is None else task_loss(logits, labels, self.config.problem_type)
        if loss is not None and unevenness is not None:
            loss = loss + config.importance_weight * unevenness
        return MoPEOutput(loss, logits, unevenness, routing or None, features)

    @in_frozen_dtype
    def encode_complementary(
        self,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """psi (B,Cc), the feature of the complementary encoder, from what `forward` takes; the main encoder's part is ignored.

        `forward(..., cross_features=psi)` then runs the main encoder alone, which saves time in every epoch but the first where the
        complementary encoder trains nothing (`trains`).

        Raises:
            ValueError: the method has no complementary encoder, or its input is missing.
        """
        other = self.config.complementary
        if other is None:
            raise ValueError(f"method {self.config.method!r} has no complementary encoder")
        inputs, padding = self._inputs(
            pixel_values, input_ids, attention_mask, token_type_ids, position_ids, interpolate_pos_encoding
        )
        self._check_given(inputs, (other,))
        return self._encode(other, inputs, padding)[0]

    def _inputs(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Padding]]:
        """What each encoder reads, and where its padding is."""
        beside = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        check_are_tensors(pixel_values=pixel_values, input_ids=input_ids, **beside)
        check_images(pixel_values)
        if self.text is not None:
            check_texts(self.text, input_ids, given_positions=position_ids is not None, **beside)
        if interpolate_pos_encoding:
            self._check_interpolates()
        if attention_mask is not None and input_ids is not None and attention_mask.shape != input_ids.shape:
            expected, found = tuple(input_ids.shape), tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be {expected}, as input_ids is, got {found}")
        given: dict[str, dict[str, Any]] = {
            "vision": {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding or None},
            "text": {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids},
        }
        inputs = {m: {name: value for name, value in of.items() if value is not None} for m, of in given.items()}
        text: Any = self.text
        seen = {name: value for of in inputs.values() for name, value in of.items() if isinstance(value, Tensor)}
        self._warnings.of_inputs(seen, attention_mask, None if text is None else getattr(text.config, "pad_token_id", None))
        padding = self._padding(attention_mask)
        inputs["text"] = {name: padding.tokens_first(tensor) for name, tensor in inputs["text"].items()}
        return inputs, {"vision": Padding(), "text": padding}

    def _check_interpolates(self) -> None:
        why = ""
        if "vision" not in self.config.modalities:
            why = f"method {self.config.method!r} has no vision encoder"
        elif self._is_swin("vision"):
            why = "the windows of a Swin Transformer fit images of one size, and it has no encoding of positions to interpolate"
        elif not getattr(self._adapters["vision"], "interpolates", False):
            name = type(self._adapters["vision"]).__name__
            why = f"{name} does not say that its embed takes it (interpolates = True)"
        if why:
            raise ValueError(f"interpolate_pos_encoding: {why}")

    def _check_given(self, inputs: dict[str, dict[str, Tensor]], modalities: Sequence[str]) -> None:
        for modality in modalities:
            if REQUIRED[modality] not in inputs[modality]:
                works_on = " and ".join(self.config.modalities)
                raise ValueError(f"method {self.config.method!r} works on {works_on}: {REQUIRED[modality]} must be given")
        sizes = [inputs[modality][REQUIRED[modality]].shape[0] for modality in modalities]
        if sizes[0] != sizes[-1]:
            found = ", ".join(f"{size} in {REQUIRED[modality]}" for size, modality in zip(sizes, modalities, strict=True))
            raise ValueError(f"all inputs must hold the same number of items, got {found}")

    def _check_cross_features(self, psi: Tensor, batch: int) -> Tensor:
        other = self.config.complementary
        if other is None:
            raise ValueError(f"method {self.config.method!r} has no complementary encoder: cross_features must not be given")
        if tuple(psi.shape) != (batch, self._widths[other]):
            raise ValueError(f"cross_features must be {(batch, self._widths[other])}, got {tuple(psi.shape)}")
        return psi

    def _classify(self, features: Tensor, psi: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of both encoders, (B,C) and (B,Cc) -> logits (B,num_labels), and the features that they were made from."""
        if self.config.method not in ("late_concat", "ensemble") or psi is None:
            return self.head(features.to(_dtype(self.head))), features
        both = torch.cat([features, psi.to(features.dtype)], dim=-1)
        if self.cross_head is None:
            return self.head(both.to(_dtype(self.head))), both
        logits = self.head(features.to(_dtype(self.head))) + self.cross_head(psi.to(_dtype(self.cross_head)))
        return logits / 2, both

    def _importance(self, routing: Sequence[Routing], noise: Sequence[Tensor | None]) -> Tensor:
        """In training over the batch of all processes; those that evaluate need not all come here."""
        config = self.config
        noise_of = {id(r): n for r, n in zip(routing, noise, strict=True)}
        return importance(
            [r.probs if config.importance_noise else without_noise(r.probs, noise_of[id(r)]) for r in distinct(routing)],
            threshold=config.importance_threshold,
            impl=config.impl,
            across_processes=self.training and config.prompt_owner == "instance",
        )

    def _warn(self) -> None:
        """Once each."""
        config = self.config
        if self.training and config.prompt_owner == "released" and is_distributed() and not self._warned_local:
            self._warned_local = True
            warn_of_local_batches()
        if self.training and config.experts and config.train_top_k == 1 < config.num_experts and not self._warned_top_k:
            self._warned_top_k = True
            warnings.warn(
                "training with train_top_k=1: the task loss hardly reaches the router (not at all with renormalize); "
                "train with train_top_k=None and set eval_top_k=1",
                stacklevel=6,
            )

    def _padding(self, attention_mask: Tensor | None) -> Padding:
        """(B,L), 1 for tokens and 0 for padding. No value is read on an accelerator: the host would wait for it."""
        if attention_mask is None:
            return Padding()
        mask, device, order = attention_mask.bool(), self.device, None
        is_readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.config.padding_side == "left":
            packing = Packing.of(mask, device) if is_readable else None
            return Padding(token_mask=mask.to(device, non_blocking=True), packing=packing)
        lengths = mask.sum(-1)
        # Attention and routers do not see an order of tokens, only their positions, which are counted after this. Where nobody may
        # look whether there is anything to put in order, it costs a sort of B*L bytes and a gather for each input, once for all
        # layers; with padding on the right it changes nothing.
        if not is_readable or (mask[:, 1:] & ~mask[:, :-1]).any():
            order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
            mask = mask if not is_readable else mask.gather(1, order)
            order = order.to(device, non_blocking=True)
        packing = Packing.of(mask, device) if is_readable else None
        return Padding(lengths.to(device, non_blocking=True), packing=packing, order=order)

    def _encode(
        self,
        modality: str,
        inputs: dict[str, dict[str, Tensor]],
        padding: dict[str, Padding],
        *,
        cross: Tensor | None = None,
        mapped: Tensor | None = None,
        noise: Sequence[Tensor | None] = (),
        top_k: int | None = None,
        banks: Sequence[PromptBank | None] | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run one encoder with its prompts -> its feature (B,C), and the routing of each block.

        The feature is the normalised one of the first token, that of a Swin Transformer the mean over prompts and tokens.
        """
        if self._is_swin(modality):
            return self._encode_swin(inputs, cross, noise, top_k, banks)
        if modality not in self._attachments:
            raise RuntimeError(f"the prompts of the {modality} backbone were detached and would be skipped: call attach() first")
        backbone, adapter, where = self.backbone(modality), self._adapters[modality], padding[modality]
        blocks = self._prompts_of(modality)
        if banks is not None and len(banks) != len(blocks):
            raise ValueError(f"banks must hold one entry for each of the {len(blocks)} prompted layers, got {len(banks)}")
        bank_of = dict(zip(blocks, banks or [None] * len(blocks), strict=True))
        layers = adapter.layers(backbone)
        found = [i for i, layer in enumerate(layers) if isinstance(layer, PromptedLayer)]
        if found != list(blocks):
            raise RuntimeError(
                f"layers {list(blocks)} of the {modality} backbone were prompted and layers {found} are: "
                "others were put in their place after attach(), and prompts would be skipped"
            )

        routing: list[Routing] = []
        # Drawn outside of what gradient checkpointing runs twice.
        noise_of_layer = iter(noise)
        with torch.set_grad_enabled(self._needs_graph(modality, cross, mapped, *noise, *inputs[modality].values())):
            tokens = adapter.embed(backbone, inputs[modality], where.token_mask)
            hidden_states, packing, mask = tokens, None, None
            if modality == self.config.main and self.input_prompts is not None:
                hidden_states = self.input_prompts(tokens, mapped)
                mask = self.input_prompts.visible(where.as_mask(tokens.shape[1]), hidden_states)
            elif where.packing is not None and adapter.is_row_wise(backbone):
                packing, where = where.packing, Padding()
                hidden_states = packing.pack(tokens)
            else:
                mask = where.as_mask(tokens.shape[1])
            for i, layer in enumerate(layers):
                if i not in blocks:
                    hidden_states = self._run(_plain_layer, hidden_states, adapter=adapter, block=layer, mask=mask, packing=packing)
                    continue
                hidden_states, routed = self._run(
                    layer,
                    hidden_states,
                    prompts=blocks[i],
                    cross=cross,
                    mapped=mapped,
                    lengths=where.lengths,
                    token_mask=where.token_mask,
                    packing=packing,
                    noise=None if blocks[i].experts is None else next(noise_of_layer),
                    top_k=top_k,
                    bank=bank_of[i],
                    router=self.router,
                )
                if routed is not None:
                    routing.append(routed)
            if packing is None:
                first = where.first_tokens(hidden_states[:, -tokens.shape[1] :])
            else:
                first = packing.first_tokens(hidden_states)
            return adapter.normalize(backbone, first), tuple(routing)

    def _encode_swin(
        self,
        inputs: dict[str, dict[str, Tensor]],
        cross: Tensor | None,
        noise: Sequence[Tensor | None],
        top_k: int | None,
        banks: Sequence[PromptBank | None] | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        if banks is not None:
            raise ValueError(NO_BANKS)
        encoder: Any = self.vision
        with torch.set_grad_enabled(self._needs_graph("vision", cross, *noise, *inputs["vision"].values())):
            output = encoder(
                **inputs["vision"],
                cross=cross,
                noise=noise,
                top_k=top_k,
                checkpointing=self._checkpointing and self.training,
                importance=False,
            )
        return output.features, output.routing

    def _needs_graph(self, modality: str, *given: Any) -> bool:
        """Whether anything in an encoder, or given to it, asks for gradients."""
        asked = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        return torch.is_grad_enabled() and (asked or self.trains(modality))

    def _run(self, layer: Callable[..., Any], hidden_states: Tensor, **inputs: Any) -> Any:
        if self._checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, hidden_states, use_reentrant=False, **inputs)
        return layer(hidden_states, **inputs)

    @in_frozen_dtype
    def build_banks(self) -> tuple[PromptBank | None, ...]:
        """Project the experts of each prompted layer once, for many calls of `forward(..., banks=banks)`.

        Differentiable where gradients are enabled. A bank refuses to run after its prompts have changed; build new ones as well
        after a change to the backbone's own weights. None for a layer without experts.

        Raises:
            ValueError: the main encoder is a Swin Transformer.
        """
        main = self.config.main
        if self._is_swin(main):
            raise ValueError(NO_BANKS)
        return tuple(
            None if block.experts is None else block.build_bank(self._frozen(main, i))
            for i, block in self._prompts_of(main).items()
        )

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
        """Evaluation mode, no gradients, prompts projected once (not in a Swin Transformer, see `build_banks`).

        Args:
            prepack: on the CPU, see `prepacked`.
            graphs: on a GPU, launch all kernels of a call at once, see `mope.CudaGraphRunner`. Calls have to come from this thread.
            batch_sizes, max_graphs: of the runner; the first needs prompt_owner "instance".
            interpolate_pos_encoding: in every call, see `forward`.

        >>> with model.serving() as predict:
        ...     logits = predict(pixel_values=pixel_values, input_ids=input_ids).logits
        """
        if batch_sizes is not None and not graphs:
            raise ValueError("serving: batch_sizes are those of graphs: give graphs=True")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.prepacked() if prepack else nullcontext():
                options: dict[str, Any] = {} if self._is_swin(self.config.main) else {"banks": self.build_banks()}
                if interpolate_pos_encoding:
                    self._check_interpolates()
                    options["interpolate_pos_encoding"] = True
                predict = partial(self, **options) if options else self
                if not graphs:
                    yield predict
                    return
                # A graph runs no check of banks.
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
    return f"what MoPEConfig adds to the encoders with {lengths}; take less, num_experts first"


def _plain_layer(
    hidden_states: Tensor, *, adapter: BackboneAdapter, block: nn.Module, mask: Tensor | None, packing: Packing | None
) -> Tensor:
    """A layer without prompts of its own: (B,L,C) -> (B,L,C)."""
    return adapter.finish(block, hidden_states, adapter.attention(block).plain(hidden_states, mask, packing))


def _dtype(module: nn.Module, without: torch.dtype = torch.float32) -> torch.dtype:
    """Of its parameters, `without` where it has none."""
    return next((p.dtype for p in module.parameters()), without)
