"""Swin Transformer blocks whose windows also contain prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import mope_kernels
from mope_kernels import Routing

from .modules import is_plain
from .plain import add, add_norm, gelu_mlp, norm_dtype
from .prompts import PromptExperts
from .router import Router, make_router


def position_bias(table: Tensor, window_size: int) -> Tensor:
    """Look up the bias on a window's scores: table ((2w-1)^2, H), a row per distance between two tokens, -> (H, w*w, w*w)."""
    place = torch.arange(window_size, device=table.device)
    distance = place[:, None] - place[None, :] + window_size - 1
    index = rearrange(distance, "yq yk -> yq 1 yk 1") * (2 * window_size - 1) + rearrange(distance, "xq xk -> 1 xq 1 xk")
    return rearrange(table[index], "yq xq yk xk h -> h (yq xq) (yk xk)").contiguous()


def position_table(bias: Tensor, window_size: int) -> Tensor:
    """Recover the table ((2w-1)^2, H) from a `position_bias` (H, w*w, w*w)."""
    distance = torch.arange(1 - window_size, window_size, device=bias.device)
    query, key = distance.clamp_min(0), distance.neg().clamp_min(0)
    rows, columns = (window_size * rearrange(place, "y -> y 1") + place for place in (query, key))
    return rearrange(bias[:, rows, columns], "h y x -> (y x) h").contiguous()


@dataclass(frozen=True)
class BlockPrompts:
    """Configuration of a block's own prompts, all of which are optional.

    Attributes:
        length: Number of prompts per expert l.
        num_experts: Number of experts K; 0 for no dynamic prompts.
        static_length: Number S of prompts shared by all images. Default: `length`.
        bound: Prompts are initialised from U(-bound, bound). Default: sqrt(3 / C).
    """

    length: int = 0
    num_experts: int = 0
    static_length: int | None = None
    bound: float | None = None


class MoPESwinBlock(nn.Module):
    """Swin Transformer block over [prompts; tokens], (B, P + R*R, C), with the tokens in row-major order.

    A routed block replaces the P incoming prompts with its own, [static; dynamic; mapped], each of which is optional. Its router
    sees the mean over the whole input, incoming prompts included. A block without prompts of its own keeps the incoming ones.
    Prompts have no position, so their order does not matter. See `mope_kernels.window_prompt_attention`. (Prompted Swin
    Transformer of MoPE, arXiv 2403.10568.)

    Args:
        dim: Token width C.
        num_heads: Number of heads H.
        resolution: Number of tokens per side R.
        window_size: Tokens per side of a window. If R <= window_size, there is one window and no shift.
        shift: Shift of the windows.
        num_prompts: Number of prompts P, the same for every block of a stage.
        mlp_ratio: Width of the MLP as a multiple of C.
        eps: Epsilon of the LayerNorms.
        own: Prompts that replace the incoming ones.
        cross_dim: Width Cc of the complementary modality's feature; None for no router, in which case routing is passed in.
        router: "multimodal" or "complementary"; None for no router, in which case routing is passed in.
        router_options: self_width, cross_width, temperature, noise_std, router_embedding and renormalize; see `MultimodalRouter`.
        prompt_owner: "instance", or "released" for the released code's order of windows.
        impl: Implementation of the fused ops.
    """

    position_bias: Tensor | None
    # Replaces `position_bias` when the position bias is trained.
    position_table: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: int,
        *,
        window_size: int = 7,
        shift: int = 0,
        num_prompts: int = 0,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        own: BlockPrompts | None = None,
        cross_dim: int | None = None,
        router: str | None = "multimodal",
        prompt_owner: str = "instance",
        impl: str = "auto",
        **router_options: Any,
    ) -> None:
        super().__init__()
        if resolution > window_size and resolution % window_size:
            raise ValueError(
                f"MoPESwinBlock: resolution must be divisible by window_size, got {resolution} and {window_size}: choose an image "
                "size for which it is divisible in every stage"
            )
        self.num_heads, self.resolution, self.num_prompts = num_heads, resolution, num_prompts
        self.window_size, self.shift = (resolution, 0) if resolution <= window_size else (window_size, shift)
        self.prompt_owner, self.impl = prompt_owner, impl
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        # Not the table of the checkpoints: the bias of a window is looked up once, when weights are loaded. See `finetune`.
        self.register_buffer("position_bias", torch.zeros(num_heads, self.window_size**2, self.window_size**2))
        self.register_parameter("position_table", None)
        own = own or BlockPrompts()
        bound = (3 / dim) ** 0.5 if own.bound is None else own.bound
        static_length = own.length if own.static_length is None else own.static_length
        self.static = nn.Parameter(torch.empty(static_length, dim).uniform_(-bound, bound)) if static_length else None
        self.experts: PromptExperts | None = None
        if own.num_experts and own.length:
            self.experts = PromptExperts(own.num_experts, own.length, dim, bound=bound, impl=impl)
        self.router = make_router(router if self.experts else None, dim, cross_dim, own.num_experts, impl=impl, **router_options)

    def swin_modules(self) -> list[nn.Module]:
        """Return the modules of the original Swin block; the position bias is not a module."""
        return [self.norm1, self.qkv, self.proj, self.norm2, self.mlp]

    def finetune(self) -> None:
        """Make the block's own weights trainable. The position bias is then looked up in a trainable table in each call."""
        for module in self.swin_modules():
            module.requires_grad_(True)
        if self.position_bias is not None:
            self.position_table = nn.Parameter(position_table(self.position_bias, self.window_size))
            self.position_bias = None

    def route(
        self, x: Tensor, cross: Tensor, noise: Tensor | None = None, top_k: int | None = None, *, router: Router | None = None
    ) -> Routing:
        """Route by the mean of the block's input x (B, P + R*R, C) and by psi (B, Cc).

        `router` is a router shared by several blocks, to be used instead of the block's own.
        """
        router = router or self.router
        if router is None:
            raise ValueError(
                "MoPESwinBlock: this block has no router: pass own=BlockPrompts(...) and cross_dim to create one, or pass routing"
            )
        pooled = x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)) if router.sees_tokens else None
        return router(pooled, cross, noise, top_k)

    def with_prompts(
        self, x: Tensor, routing: Routing | None = None, mapped: Tensor | None = None, *, dropout: nn.Module | None = None
    ) -> Tensor:
        """Replace any incoming prompts with the block's own: x (B, P + R*R or R*R, C), mapped (B, M, C) -> (B, P + R*R, C).

        `dropout` acts on static and dynamic prompts, independently for each image.
        """
        parts = [] if self.static is None else [self.static.expand(x.shape[0], -1, -1)]
        if routing is not None:
            if self.experts is None:
                raise ValueError(
                    "MoPESwinBlock: this block has no experts to mix: pass own=BlockPrompts(length, num_experts) when creating it"
                )
            parts.append(self.experts(routing.weights, routing.indices))
        parts = parts if dropout is None else [dropout(part) for part in parts]
        parts += [] if mapped is None else [mapped]
        prompts = [part.to(x.dtype) for part in parts]
        if (found := sum(p.shape[1] for p in prompts)) != self.num_prompts:
            raise ValueError(f"MoPESwinBlock: {found} prompts where every block of the stage has {self.num_prompts}")
        return torch.cat([*prompts, x[:, -(self.resolution**2) :]], dim=1)

    def own_prompts(
        self,
        routing: Routing | None = None,
        mapped: Tensor | None = None,
        *,
        router: Router | None = None,
        cross_logits: Tensor | None = None,
        noise: Tensor | None = None,
        top_k: int | None = None,
    ) -> dict[str, Any]:
        """Return the block's own prompts as arguments of `step`.

        Dynamic prompts come with their `routing`, or with the inputs from which `step` decides it: `router`, the block's own or a
        shared one, and `cross_logits` (B,K), psi's part of its logits. `mapped` is as in `forward`, `noise` and `top_k` as in
        `route`.
        """
        own: dict[str, Any] = {"static": self.static, "mapped": mapped}
        if routing is not None or router is not None:
            if self.experts is None:
                raise ValueError(
                    "MoPESwinBlock: this block has no experts to mix: pass own=BlockPrompts(length, num_experts) when creating it"
                )
            own |= {"experts": self.experts.prompts, "routing": routing}
        if router is not None:
            own |= {"cross_logits": cross_logits, "noise": noise, "top_k": top_k, **router.of_tokens()}
            own |= {"temperature": router.temperature, "renormalize": router.renormalize}
        found = sum(t.shape[-2] for t in (self.static, own.get("experts"), mapped) if t is not None)
        if found != self.num_prompts:
            raise ValueError(f"MoPESwinBlock: {found} prompts where every block of the stage has {self.num_prompts}")
        return own

    def add_up(self, x: Tensor, update: Tensor | None, own: dict[str, Any] | None) -> tuple[Tensor, Routing | None]:
        """Return x + update, with the prompts of `own`, if any, in place of the incoming ones, and their routing."""
        if own is None:
            return add(x, update), None
        replaced = x.shape[1] - self.resolution**2
        total, _, routing = mope_kernels.prompted_norm(x, update, None, None, num_replaced=replaced, impl=self.impl, **own)
        return total, routing

    def enter(self, x: Tensor, update: Tensor | None, own: dict[str, Any] | None) -> tuple[Tensor, Tensor, Routing | None]:
        """Return the sum of `add_up`, its LayerNorm, and the routing."""
        norm: Any = self.norm1
        dtype = norm_dtype(x, update, norm, behind=self.qkv)
        if dtype is None:
            total, routing = self.add_up(x, update, own)
            return total, norm(total), routing
        options: dict[str, Any] = {"eps": norm.eps, "norm_dtype": dtype, "impl": self.impl}
        if own is None:
            return *mope_kernels.add_norm(x, update, norm.weight, norm.bias, **options), None
        replaced = x.shape[1] - self.resolution**2
        return mope_kernels.prompted_norm(x, update, norm.weight, norm.bias, num_replaced=replaced, **options, **own)

    def mlp_layers(self) -> list[nn.Module]:
        """Return the layers of the MLP in order; an empty list if the MLP must be called."""
        return list(self.mlp) if is_plain(self.mlp, nn.Sequential) else []

    def step(
        self, x: Tensor, update: Tensor | None = None, own: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Run the block like `forward`, but return the last residual sum unevaluated; the next block's add+LayerNorm adds it.

        Args:
            x: First summand of the input, (B, n + R*R, C). The number of incoming prompts n is P, or any number if `own` replaces
                them.
            update: Second summand of the input, in the shape of x; None for none.
            own: Result of `own_prompts`, to replace the incoming prompts.

        Returns:
            x and update for the next block, (B, P + R*R, C) each, and the routing of the prompts.
        """
        x, normed, routing = self.enter(x, update, own)
        attended = mope_kernels.window_prompt_attention(
            self.qkv(normed),
            position_bias(self.position_table, self.window_size) if self.position_bias is None else self.position_bias,
            num_prompts=self.num_prompts,
            num_heads=self.num_heads,
            resolution=self.resolution,
            window_size=self.window_size,
            shift=self.shift,
            prompt_owner=self.prompt_owner,
            impl=self.impl,
        )
        layers = self.mlp_layers()
        x, normed = add_norm(x, self.proj(attended), self.norm2, behind=layers[0] if layers else None, impl=self.impl)
        return x, gelu_mlp(self.mlp, layers, normed, impl=self.impl), routing

    def forward(self, x: Tensor, routing: Routing | None = None, mapped: Tensor | None = None) -> Tensor:
        """Apply the block to x (B, P + R*R, C); with `routing` or `mapped`, its own prompts replace the incoming ones."""
        own = None if routing is None and mapped is None else self.own_prompts(routing, mapped)
        x, update, _ = self.step(x, None, own)
        return x + update

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, window_size={self.window_size}, shift={self.shift}, num_prompts={self.num_prompts}"


class MergeNeighbours(torch.autograd.Function):
    """Concatenate four neighbouring tokens, or four copies of a prompt: (B, P + R*R, C) -> (B, P + R*R/4, 4C), in one copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_prompts: int, resolution: int) -> Tensor:
        ctx.num_prompts, ctx.resolution = num_prompts, resolution
        batch, _, dim = x.shape
        merged = x.new_empty(batch, num_prompts + resolution**2 // 4, 4 * dim)
        prompts, tokens = _neighbours(x, merged, num_prompts, resolution)
        prompts[1].copy_(prompts[0])
        tokens[1].copy_(tokens[0])
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_merged = grads[0].contiguous()
        batch, rows, width = grad_merged.shape
        grad = grad_merged.new_empty(batch, rows + ctx.resolution**2 * 3 // 4, width // 4)
        prompts, tokens = _neighbours(grad, grad_merged, ctx.num_prompts, ctx.resolution)
        prompts[0].copy_(prompts[1].sum(2, keepdim=True))
        tokens[0].copy_(tokens[1])
        return grad, None, None


def _neighbours(
    x: Tensor, merged: Tensor, num_prompts: int, resolution: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return matching views of a merge's input and output: prompts (B,P,1|4,C) and tokens (B,R/2,R/2,2,2,C), a pair each."""
    half = resolution // 2
    prompts = x[:, :num_prompts, None], merged[:, :num_prompts].unflatten(-1, (4, -1))
    # The four neighbours are in column-major order.
    tokens = x[:, num_prompts:].unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)
    return prompts, (tokens, merged[:, num_prompts:].unflatten(1, (half, half)).unflatten(-1, (2, 2, -1)))


class PromptedPatchMerging(nn.Module):
    """Patch merging between two stages: four neighbouring tokens become one of twice the width.

    A prompt is used as all four neighbours.

    Args:
        dim: Token width C of the preceding stage.
        resolution: Number of tokens per side R; must be even.
        num_prompts: Number of prompts P.
        eps: Epsilon of the LayerNorm.
        impl: Implementation, see `mope_kernels.add_norm`.
    """

    def __init__(self, dim: int, resolution: int, num_prompts: int, *, eps: float = 1e-5, impl: str = "auto") -> None:
        super().__init__()
        if resolution % 2:
            raise ValueError(f"PromptedPatchMerging: resolution must be even, got {resolution}")
        self.resolution, self.num_prompts, self.impl = resolution, num_prompts, impl
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge x (B, P + R*R, C) into (B, P + R*R/4, 2C)."""
        merged = MergeNeighbours.apply(x, self.num_prompts, self.resolution)
        _, normed = add_norm(merged, None, self.norm, behind=self.reduction, impl=self.impl)
        return self.reduction(normed)
