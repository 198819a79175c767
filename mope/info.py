"""What `mope info` prints: versions, devices, the C++ extension, and for each op what would run on each device."""

from __future__ import annotations

from typing import Any

import torch

from mope import environment
from mope_kernels import ExpertBank, _extension, explain


def describe() -> str:
    """Paragraphs of text."""
    width = max(map(len, environment.versions()))
    lines = [f"{name:<{width}}  {version}" for name, version in environment.versions().items()]
    if commit := environment.commit():
        lines.append(f"{'commit':<{width}}  {commit}")

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    lines += ["", *(f"{device!s:<{width}}  {environment.device_name(device)}" for device in devices)]
    status = _extension.status()
    lines += ["", f"{'C++ kernels':<{width}}  {status.path if status.loaded else status.reason}"]

    # One GPU stands for all.
    for device in devices[:2]:
        lines += ["", f"What runs on {device.type}, float32:"]
        for op, (args, kwargs) in examples(device).items():
            lines.append(str(explain(op, *args, **kwargs)))
    return "\n".join(lines)


def examples(device: torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a call of each op, small."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    heads, prompts, probs = zeros(2, 2, 4, 32), zeros(2, 2, 1, 32), zeros(2, 4)
    indices = torch.zeros(2, 4, dtype=torch.int64, device=device)
    bank = ExpertBank(zeros(4, 2, 1, 32), zeros(4, 2, 1, 32))
    rows = zeros(2, 3, 8)
    adapter = (zeros(2, 8), zeros(4, 8), zeros(4), zeros(1, 8, 4), zeros(1, 8))
    window = {"num_prompts": 1, "num_heads": 2, "resolution": 2, "window_size": 2}
    return {
        "route": ((probs,), {}),
        "mix_prompts": ((zeros(4, 1, 64), probs, indices), {}),
        "importance_loss": ((probs,), {}),
        "prompt_attention": ((heads, heads, heads, prompts, prompts), {}),
        "mope_attention": ((heads, heads, heads, probs, bank), {}),
        "window_prompt_attention": ((zeros(2, 5, 192), zeros(2, 4, 4)), window),
        "add_norm": ((rows, rows, None, None), {}),
        "prompted_norm": ((rows, rows, None, None), {"num_replaced": 0, "experts": zeros(4, 1, 8), "cross_logits": probs}),
        "gelu_mlp": ((rows, zeros(32, 8), None, zeros(8, 32), None), {}),
        "expert_adapter": (adapter, {}),
    }
