"""Whole models against the released way and against what a user would write by hand.

Encoders are in float32 under autocast, as in training, and ours casts its frozen weights once. Dropout and noise are off, so that
all compute the same. The importance loss has no threshold, because rounding could decide on which side of it a value falls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, ViTConfig, ViTModel

import mope_kernels
from mope import MoPEConfig, MoPEForClassification
from mope.demo import plain
from mope.fused import MoPESwinBlock
from mope.graphs import CudaGraphRunner

from . import shapes
from .case import Case
from .problem import Inputs, Outputs, Problem
from .released import ReleasedModel

LABELS = 101
IN_FLOAT32 = "in float32 it is the same as released"
ON_CPU = "without a GPU there are no graphs, and ours is this"


class Called(nn.Module):
    """Module that calls `forward(module, ...)`, under autocast if `dtype` has 16 bits and the first input is float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, forward: Callable[..., Outputs]) -> None:
        super().__init__()
        self.module, self.dtype, self.function = module, dtype, forward

    def forward(self, first: Tensor, *others: Tensor) -> Outputs:
        enabled = self.dtype.itemsize == 2 and first.dtype == torch.float32
        with torch.autocast(first.device.type, dtype=self.dtype, enabled=enabled):
            return self.function(self.module, first, *others)


def trained_parameters(module: nn.Module, training: bool) -> Inputs:
    """Return the parameters that get gradients, by the names that they have in a `Called`; none without `training`."""
    return {f"module.{name}": p for name, p in module.named_parameters() if p.requires_grad} if training else {}


def windows_run_by(block: MoPESwinBlock, dtype: torch.dtype) -> str:
    """Return the implementation that computes a block's attention in windows."""
    assert block.position_bias is not None
    rows, dim = block.num_prompts + block.resolution**2, block.proj.in_features
    found = mope_kernels.explain(
        "window_prompt_attention",
        torch.empty(1, rows, 3 * dim, dtype=dtype),
        block.position_bias,
        num_prompts=block.num_prompts,
        num_heads=block.num_heads,
        resolution=block.resolution,
        window_size=block.window_size,
        shift=block.shift,
    )
    return found.impl or ""


def layers_run_by(model: MoPEForClassification) -> str:
    """Return the implementations that compute the ops of a model's prompted layers."""
    return ", ".join(sorted({answer.impl or "" for answer in plain.explain_ops(model).values()}))


def new_config(shape: shapes.Model, case: Case, impl: str = "auto", prompt_owner: str = "released") -> MoPEConfig:
    """Make a config: the published one for a Swin Transformer, and otherwise one without a `prompt_owner`."""
    options: dict[str, Any] = {"num_labels": LABELS, "num_experts": shape.experts, "noise_std": 0.0}
    options |= {"static_length": shape.prompts, "prompt_length": shape.prompts}
    options |= {"eval_top_k": case.top_k, "importance_threshold": 0.0, "impl": impl}
    if not shape.depths:
        return MoPEConfig(**options)
    return MoPEConfig.preset("mope-v4", **options, prompt_dropout=0.0, prompt_owner=prompt_owner)


def new_backbones(shape: shapes.Model) -> dict[str, nn.Module]:
    """Create encoders with random weights, which are the same every time."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    size |= {"num_attention_heads": max(shape.hidden // 64, 1)}
    size |= {"intermediate_size": shape.ratio * shape.hidden}
    text = BertModel(BertConfig(**size), add_pooling_layer=False)
    vision: nn.Module
    if not shape.depths:
        vision = ViTModel(ViTConfig(**size, image_size=shape.image), add_pooling_layer=False)
    else:
        heads = [max((shape.embed << stage) // shape.head, 1) for stage in range(len(shape.depths))]
        swin: dict[str, Any] = {"embed_dim": shape.embed, "depths": shape.depths, "num_heads": heads, "window_size": shape.window}
        swin["mlp_ratio"] = shape.ratio
        vision = SwinModel(SwinConfig(**swin, image_size=shape.image), add_pooling_layer=False)
    return {"vision": vision, "text": text}


def new_model(shape: shapes.Model, case: Case, impl: str = "auto") -> MoPEForClassification:
    """Create our model of a case, on torch's default device. Its weights are the same every time."""
    model = MoPEForClassification(new_config(shape, case, impl), **new_backbones(shape))
    return model.to(torch.get_default_device()).train(case.training)


def model(case: Case, dtype: torch.dtype) -> Problem:
    """Build the problem. Serving computes logits; a training step also the importance loss (Swin) and gradients, no optimizer."""
    shape = shapes.MODELS[case.shape]
    build = _swin_model if shape.depths else _vit_model
    return build(shape, case, dtype)


def new_inputs(shape: shapes.Model) -> Inputs:
    """Draw images and texts without padding."""
    return {
        "pixel_values": torch.randn(shape.batch, 3, shape.image, shape.image),
        "input_ids": torch.randint(5, 30000, (shape.batch, shape.tokens)),
        "attention_mask": torch.ones(shape.batch, shape.tokens, dtype=torch.int64),
    }


def outputs_of(shape: shapes.Model, case: Case, banks: Any = None) -> Callable[..., Outputs]:
    """Return a function that calls a model and returns its logits and, for training with a Swin, the importance loss."""

    def forward(model: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        output = model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, banks=banks)
        return (output.logits, output.importance_loss) if case.training and shape.depths else (output.logits,)

    return forward


def new_ours(shape: shapes.Model, case: Case, dtype: torch.dtype) -> tuple[MoPEForClassification, nn.Module]:
    """Return our model and the module that computes the outputs of the case.

    The frozen weights are cast to `dtype` if it has 16 bits. For serving with a ViT, banks are built beforehand.
    """
    model, banks = new_model(shape, case), None
    if dtype.itemsize == 2:
        model.cast_frozen(dtype)
    if not case.training and not shape.depths:
        with torch.no_grad():
            banks = model.build_banks()
    return model, Called(model, dtype, outputs_of(shape, case, banks))


def _ours(model: MoPEForClassification, called: nn.Module, graphs: bool) -> Callable[..., Outputs]:
    """Return `called` as a way, optionally through CUDA graphs. On a CPU, frozen layers are packed for oneDNN."""
    # The layers stay packed while `run` holds a reference to this.
    in_order = model.prepacked()
    in_order.__enter__()

    def run(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, held: object = in_order) -> Outputs:
        return called(pixel_values, input_ids, attention_mask)

    function: Any = CudaGraphRunner(run, modules=[model]) if graphs else run
    return lambda pixel_values, input_ids, attention_mask, **_: function(
        pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask
    )


def _swin_model(shape: shapes.Model, case: Case, dtype: torch.dtype) -> Problem:
    (model, ours), source, twin = new_ours(shape, case, dtype), new_model(shape, case), new_model(shape, case, "reference")
    # The activations of all blocks together do not fit into memory in float64.
    twin.gradient_checkpointing_enable()
    inputs = new_inputs(shape)
    on_gpu, half = inputs["pixel_values"].is_cuda, dtype.itemsize == 2

    def released(module: Any, *tensors: Tensor) -> Outputs:
        outputs: Outputs = module(*tensors)
        return outputs if case.training else outputs[:1]

    def definition(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **parameters: Tensor) -> Outputs:
        called = Called(twin.to(pixel_values.dtype), dtype, outputs_of(shape, case))
        return torch.func.functional_call(called, parameters, (pixel_values, input_ids, attention_mask))

    def way(module: nn.Module) -> Callable[..., Outputs]:
        called = Called(module, dtype, released)
        return lambda pixel_values, input_ids, attention_mask, **_: called(pixel_values, input_ids, attention_mask)

    ways: dict[str, Callable[..., Outputs] | str] = {
        "ours": _ours(model, ours, on_gpu and not case.training),
        "ours without graphs": _ours(model, ours, False) if on_gpu else ON_CPU,
        "released": way(ReleasedModel(source)),
        "released without waiting": way(ReleasedModel(source, waits=False)),
        "released half": IN_FLOAT32,
    }
    inputs_of = {"ours": trained_parameters(model, case.training)}
    if half:
        halved = copy.deepcopy(source).to(dtype)
        ways["released half"] = way(ReleasedModel(halved))
        pixels = inputs["pixel_values"].to(dtype)
        inputs_of["released half"] = {"pixel_values": pixels, **trained_parameters(halved, case.training)}
    vision: Any = model.vision
    parameters = trained_parameters(source, case.training)
    return Problem(
        inputs | parameters,
        ways,
        definition,
        windows_run_by(vision.blocks()[0][0], dtype),
        None,
        dtype,
        tuple(parameters),
        (torch.randn(shape.batch, LABELS), torch.randn(()))[: 2 if case.training else 1],
        recorded=on_gpu and not case.training,
        inputs_of=inputs_of,
    )


def _vit_model(shape: shapes.Model, case: Case, dtype: torch.dtype) -> Problem:
    (model, ours), source, twin = new_ours(shape, case, dtype), new_model(shape, case), new_model(shape, case, "reference")
    inputs = new_inputs(shape)
    on_gpu = inputs["pixel_values"].is_cuda

    def by_hand(model: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        return plain.forward(model, pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)[:1]

    def unprojected(model: Any, *tensors: Tensor) -> Outputs:
        return (model(**dict(zip(inputs, tensors, strict=True))).logits,)

    concatenated = Called(source, dtype, by_hand)

    def definition(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **parameters: Tensor) -> Outputs:
        called = Called(twin.to(pixel_values.dtype), dtype, by_hand if case.top_k is None else unprojected)
        return torch.func.functional_call(called, parameters, (pixel_values, input_ids, attention_mask))

    parameters = trained_parameters(source, case.training)
    return Problem(
        inputs | parameters,
        {
            "ours": _ours(model, ours, on_gpu and not case.training),
            "ours without graphs": _ours(model, ours, False) if on_gpu else ON_CPU,
            "concatenated": lambda pixel_values, input_ids, attention_mask, **_: concatenated(
                pixel_values, input_ids, attention_mask
            ),
        },
        definition,
        layers_run_by(model),
        None,
        dtype,
        tuple(parameters),
        (torch.randn(shape.batch, LABELS),),
        recorded=on_gpu and not case.training,
        inputs_of={"ours": trained_parameters(model, case.training)},
    )
