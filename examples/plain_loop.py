"""Use only `mope.fused`: add prompts and routers to the frozen attention of your own Transformer, in a plain PyTorch loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mope_kernels
from mope.fused import FrozenAttention, MoPEAttention

WIDTH, HEADS = 64, 4


class Block(nn.Module):
    """An ordinary Transformer block that knows nothing about prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Prompted(nn.Module):
    """A frozen encoder of such blocks, with static prompts and routed prompt experts in each, and a head.

    Args:
        blocks: Blocks of the encoder. They are frozen.
        cross_dim: Width of the other modality's feature, which is the input of the routers.
    """

    def __init__(self, blocks: nn.ModuleList, cross_dim: int) -> None:
        super().__init__()
        self.blocks = blocks.requires_grad_(False)
        self.prompts = nn.ModuleList(
            MoPEAttention(
                FrozenAttention(block.q, block.k, block.v, block.o, num_heads=HEADS, norm=block.norm1),
                dim=WIDTH,
                cross_dim=cross_dim,
                num_experts=4,
                prompt_length=6,
                static_length=4,
                temperature=1.0,
            )
            for block in blocks
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits (B,2) and the importance loss () from tokens (B,L,C) and features (B,Cc)."""
        probabilities = []
        for block, prompts in zip(self.blocks, self.prompts, strict=True):
            attended, routing = prompts(x, cross)
            x = x + attended
            x = x + block.mlp(block.norm2(x))
            probabilities.append(routing.probs)
        # The importance loss of all blocks measures how unevenly the experts are used.
        return self.head(x.mean(1)), mope_kernels.importance_loss(torch.stack(probabilities)).mean()


def main() -> None:
    torch.manual_seed(0)
    model = Prompted(nn.ModuleList(Block() for _ in range(3)), cross_dim=16)
    tokens, cross = torch.randn(32, 20, WIDTH), torch.randn(32, 16)
    # The label depends on both modalities: it is 1 if one feature of the tokens and one of the other modality have the same sign.
    labels = (tokens[..., 0].mean(1) * cross[:, 0] > 0).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        logits, unevenness = model(tokens, cross)
        loss = F.cross_entropy(logits, labels) + 0.01 * unevenness
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}, accuracy {(logits.argmax(-1) == labels).float().mean():.2f}")


if __name__ == "__main__":
    main()
