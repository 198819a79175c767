"""Layers that map the complementary feature to prompts."""

from __future__ import annotations

from typing import Any

from torch import nn


class FixedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with fixed statistics, even in training: an affine map, through which items do not affect each other."""

    def train(self, mode: bool = True) -> FixedBatchNorm:
        return super().train(False)


def mapper_layers(in_features: int, out_features: int, *, batchnorm: bool = False, gelu: bool = True) -> nn.Sequential:
    """Build Linear -> (FixedBatchNorm) -> (GELU), mapping (B, in_features) to (B, out_features)."""
    layers: list[Any] = [nn.Linear(in_features, out_features)]
    layers += [FixedBatchNorm(out_features).eval()] if batchnorm else []
    layers += [nn.GELU()] if gelu else []
    return nn.Sequential(*layers)
