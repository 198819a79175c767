"""Accelerated forward of the released prompted BERT classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import mope_kernels
from mope.backbones import BertAdapter
from mope.fused import Packing
from mope.fused.modules import has_hooks

from .live import Accelerated, missing

_BERT = BertAdapter()


class TextClassifier(Accelerated):
    """Classifier whose prompts are only keys and values, so they are not added to the rows of a layer or removed from them.

    Attention matrices are never formed, and no tokens are read back from the device.
    """

    bert_encoder: Any
    tokenizer: Any
    heads: nn.Module
    use_prompt: bool
    prompt_depth: int
    prompt_vector: Tensor
    prompt_dropout: nn.Module

    def forward(
        self,
        text_input: Any,
        return_features: bool = False,
        dump_attn: bool = False,
        prompt_depth_override: int | None = None,
        prompt_embeddings: Sequence[Tensor] | None = None,
        prompt_length_override: int | None = None,
        vision_embedding: Tensor | None = None,
        blind_prompt: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify texts; return logits (B, n), and with `return_features` also the final [CLS] features (B, C)."""
        if not self.use_prompt:
            # There is nothing to replace: without prompts, the released method runs the stock model.
            return cast(Any, super()).forward(text_input, return_features=return_features)
        layers = self.bert_encoder.encoder.layer
        unsupported = {"dump_attn": dump_attn, "blind_prompt": blind_prompt}
        unsupported |= {"prompt_depth_override": prompt_depth_override not in (None, len(layers))}
        if any(unsupported.values()):
            asked = ", ".join(name for name, given in unsupported.items() if given)
            # These are not passed on to the released method, because it needs the patched BertLayer of its own environment.
            raise NotImplementedError(f"accelerate: {asked} of the released BertClassifier is not supported: call undo() first")
        device = self.bert_encoder.device
        encoded = self.tokenizer(text_input, return_tensors="pt", padding=True, truncation=True)
        tokens, types, mask = (encoded[name].to(device) for name in ("input_ids", "token_type_ids", "attention_mask"))
        self.put_in_order(tokens)
        x, batch, packing = self.bert_encoder.embeddings(input_ids=tokens, token_type_ids=types), len(tokens), None
        hidden: dict[str, Any] = {"lengths": mask.sum(1)}
        if getattr(self.tokenizer, "padding_side", "right") != "right":
            hidden = {"attn_bias": (1 - mask[:, None, None].to(x.dtype)) * -1e4}
        elif (packing := self._packing(encoded["attention_mask"], device)) is not None:
            x, hidden = packing.pack(x), {"offsets": packing.offsets, "max_length": packing.max_length}
        for i, layer in enumerate(layers):
            prompts = self._prompts(i, batch, prompt_embeddings, vision_embedding)
            attention, dropout = _BERT.attention(layer), layer.attention.self.dropout
            out = mope_kernels.prompt_attention(
                *attention.project(x),
                *attention.keys_and_values(prompts),
                **hidden,
                dropout_p=dropout.p if dropout.training else 0.0,
            )
            x = _BERT.finish(layer, x, attention.merge(out))
        features = x[:, 0] if packing is None else packing.first_tokens(x)
        logits = self.heads(features)
        return (logits, features) if return_features else logits

    def frozen_parts(self) -> Sequence[nn.Module]:
        return (self.bert_encoder.encoder,)

    def _packing(self, mask: Tensor, device: torch.device) -> Packing | None:
        """Return the packing of a padded batch, or None; a mask on the CPU can be read without a sync."""
        can_pack = mask.device.type == "cpu" and not torch.compiler.is_compiling() and _BERT.is_row_wise(self.bert_encoder)
        return Packing.of(mask.bool(), device) if can_pack else None

    def _prompts(self, layer: int, batch: int, given: Sequence[Tensor] | None, mapped: Tensor | None) -> Tensor:
        """Return the prompts (B, P, C) of a layer, or (1, P, C) if all items share them."""
        if given is None:
            # With dropout, each item has different prompts.
            batch = batch if self.prompt_dropout.training else 1
            return self.prompt_dropout(self.prompt_vector[layer].expand(batch, -1, -1))
        if mapped is None:
            return self.prompt_dropout(given[layer])
        return torch.cat([self.prompt_dropout(mapped)[:, None], given[layer].squeeze(1)], dim=1)


def recognise(module: nn.Module) -> bool:
    """Return whether a module looks like the released BERT classifier."""
    return hasattr(module, "bert_encoder") and hasattr(module, "prompt_vector")


def replaced(classifier: nn.Module) -> dict[str, tuple[nn.Module, type[Accelerated]]]:
    """Return the modules to accelerate, by name within the classifier; none without prompts, because the stock model runs."""
    return {"": (classifier, TextClassifier)} if cast(Any, classifier).use_prompt else {}


def differences(classifier: Any) -> Iterator[str]:
    """Yield the differences between a module with a BERT and prompts and the released classifier."""
    parts = ["tokenizer", "heads", "use_prompt", "bert_encoder.config", "bert_encoder.embeddings", "bert_encoder.encoder.layer"]
    parts += ["prompt_depth", "prompt_dropout"] if getattr(classifier, "use_prompt", False) else []
    if lacking := missing(classifier, parts):
        yield f"{', '.join(lacking)} missing"
        return
    layers = classifier.bert_encoder.encoder.layer
    if classifier.use_prompt and classifier.prompt_depth != len(layers):
        yield f"prompt_depth is {classifier.prompt_depth}, not that of all {len(layers)} layers"
    yield from _BERT.objections(classifier.bert_encoder.config)
    yield from (f"bert_encoder.encoder.layer.{i} has hooks, which would not run" for i, m in enumerate(layers) if has_hooks(m))
    if "forward" in vars(classifier):
        yield "forward was replaced on the instance"
