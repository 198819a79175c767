"""From the complementary feature to mapped prompts."""

from __future__ import annotations

from typing import Any

from torch import nn


class FixedBatchNorm(nn.BatchNorm1d):
    """A BatchNorm1d that keeps the statistics it has, also in training: an affine map. Items do not reach each other through it."""

    def train(self, mode: bool = True) -> FixedBatchNorm:
        return super().train(False)


def mapper_layers(in_features: int, out_features: int, *, batchnorm: bool = False, gelu: bool = True) -> nn.Sequential:
    """Linear -> (FixedBatchNorm) -> (GELU), (B, in_features) -> (B, out_features)."""
    layers: list[Any] = [nn.Linear(in_features, out_features)]
    layers += [FixedBatchNorm(out_features).eval()] if batchnorm else []
    layers += [nn.GELU()] if gelu else []
    return nn.Sequential(*layers)
