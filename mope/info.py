"""Output of `mope info`: versions, devices, the C++ extension, and the implementation of each op on each device."""

from __future__ import annotations

from typing import Any

import torch

from mope import environment
from mope.fused import prepack
from mope_kernels import ExpertBank, _extension, explain

NO_ONEDNN = "torch has none of its operators here: frozen layers on the CPU are not prepacked"


def describe() -> str:
    """Return the text that `mope info` prints."""
    width = max(map(len, environment.versions()))
    lines = [f"{name:<{width}}  {version}" for name, version in environment.versions().items()]
    if commit := environment.commit():
        lines.append(f"{'commit':<{width}}  {commit}")

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    lines += ["", *(f"{device!s:<{width}}  {environment.device_name(device)}" for device in devices)]
    status = _extension.status()
    lines += ["", f"{'C++ kernels':<{width}}  " + (f"for {status.target}: {status.path}" if status.loaded else status.reason)]
    in_order = " and ".join(str(dtype).removeprefix("torch.") for dtype in prepack.DTYPES if prepack.available(dtype))
    lines.append(f"{'oneDNN':<{width}}  " + (f"puts frozen layers of {in_order} in its order" if in_order else NO_ONEDNN))

    # All GPUs are assumed to behave like the first one.
    for device in devices[:2]:
        lines += ["", f"What runs on {device.type}, float32:"]
        found = {op: explain(op, *args, **kwargs) for op, (args, kwargs) in examples(device).items()}
        lines += map(str, found.values())
        half = {op: explain(op, *args, **kwargs) for op, (args, kwargs) in examples(device, torch.bfloat16).items()}
        lines += ["", f"What differs from that on {device.type} in bfloat16:"]
        lines += [str(answer) for op, answer in half.items() if answer.impl != found[op].impl] or ["nothing"]
    return "\n".join(lines)


def examples(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return small example arguments of each op, with the dtypes that they have under autocast to `dtype`."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    heads, prompts, probs = zeros(2, 2, 4, 32), zeros(2, 2, 1, 32), zeros(2, 4, dtype=torch.float32)
    indices = torch.zeros(2, 4, dtype=torch.int64, device=device)
    bank = ExpertBank(*(zeros(4, 2, 1, 32, dtype=torch.float32) for _ in range(2)))
    rows, experts = zeros(2, 3, 8), zeros(4, 1, 8, dtype=torch.float32)
    adapter = (zeros(2, 8), zeros(4, 8), zeros(4), zeros(1, 8, 4), zeros(1, 8))
    window = {"num_prompts": 1, "num_heads": 2, "resolution": 2, "window_size": 2}
    return {
        "route": ((probs,), {}),
        "mix_prompts": ((zeros(4, 1, 64, dtype=torch.float32), probs, indices), {}),
        "importance_loss": ((probs,), {}),
        "prompt_attention": ((heads, heads, heads, prompts, prompts), {}),
        "mope_attention": ((heads, heads, heads, probs, bank), {}),
        "window_prompt_attention": ((zeros(2, 5, 192), zeros(2, 4, 4, dtype=torch.float32)), window),
        "add_norm": ((rows, rows, None, None), {}),
        "prompted_norm": ((rows, rows, None, None), {"num_replaced": 0, "experts": experts, "cross_logits": probs}),
        "gelu_mlp": ((rows, zeros(32, 8), None, zeros(8, 32), None), {}),
        "expert_adapter": (adapter, {}),
    }
