"""Monitor routing during training: log statistics of each block, and warn about experts that are never used."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from mope.fusion.config import MoPEConfig
from mope.fusion.model import MoPEForClassification
from mope.processes import is_distributed
from mope_kernels import Routing

# Prefix of the names of routing statistics in the log.
PREFIX = "routing/"
# Minimum number of examples per expert in an interval. With fewer, a balanced router may leave an expert unused by chance.
LEAST_EXAMPLES = 8


class RoutingMonitor(TrainerCallback):
    """Log the routing of a MoPE model at each logging step of transformers' Trainer.

    For each routed block, such as "layer 3", the log gets statistics of the training examples since the last logging step, over
    all processes: `routing/layer_3/load/expert_0` and so on (mean probability), `cv_squared` (squared coefficient of variation of
    the loads), `load_entropy` and `example_entropy` (as fractions of log K), and `unused` (number of experts that no example used).
    An example uses the expert with the largest probability, or with `train_top_k` the selected experts.

    A warning names each block in which an expert has not been used since the last evaluation, once per block. If there have been
    fewer than 8 training examples per expert, the interval is extended to the next evaluation.

    The statistics of forward passes are summed on the device, also in CUDA graphs. The host reads the sums only at logging steps
    and evaluations. Training does not depend on them.

    Args:
        every: Look for unused experts at the first logging step after this many steps, instead of at evaluations. None looks
            after each evaluation or, without evaluations, after each epoch.

    Raises:
        ValueError: `every` is below 1, or, when training begins, the model routes nothing.

    >>> trainer = Trainer(model, arguments, train_dataset=items, data_collator=Collator(model))
    >>> RoutingMonitor().attach(trainer)
    >>> trainer.train()
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"RoutingMonitor: every must be at least 1, or None, got {every}")
        self.every = every
        self._sums: _Sums | None = None
        self._attached = False
        self._warned: set[str] = set()
        self._checked_at = 0

    def attach(self, trainer: Trainer) -> Self:
        """Insert the monitor before a trainer's loggers, so that they log the statistics; progress bars do not show them.

        A monitor passed as `Trainer(callbacks=[...])` runs after the loggers, so its statistics appear only in the trainer's
        `state.log_history`.
        """
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        for callback in handler.callbacks:
            if isinstance(callback, ProgressCallback | PrinterCallback):
                callback.on_log = _without_routing(callback.on_log)  # type: ignore[method-assign]
        self._attached = True
        return self

    def detach(self) -> None:
        """Stop monitoring the model."""
        if self._sums is not None:
            self._sums.remove()
        self._sums = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Start monitoring the model."""
        self.detach()
        model = routed_model(kwargs["model"])
        if model is None:
            raise ValueError(
                f"RoutingMonitor: {type(kwargs['model']).__name__} routes nothing: remove the monitor, or train a "
                "MoPEForClassification whose method has experts"
            )
        if args.report_to and not self._attached:
            warnings.warn(
                f"RoutingMonitor: {', '.join(args.report_to)} will not get its statistics, because it runs after the loggers: "
                "remove it from callbacks, and call RoutingMonitor().attach(trainer)",
                stacklevel=2,
            )
        self._sums, self._checked_at = _Sums(model), state.global_step

    def on_substep_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the statistics of one part of a batch."""
        if self._sums is not None:
            self._sums.add()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the statistics of a batch, or of its last part."""
        if self._sums is not None:
            self._sums.add()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the statistics to a training log and to the trainer's history."""
        if self._sums is None or "loss" not in (logs or {}):
            return
        found = numbers(self._sums.read(), self._sums.blocks)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)
        if self.every is not None and state.global_step - self._checked_at >= self.every:
            self._check(state)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """End an interval at an evaluation."""
        if self.every is None:
            self._check(state)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """End an interval after an epoch, if there are no evaluations."""
        if self.every is None and args.eval_strategy == "no":
            self._check(state)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop monitoring the model."""
        self.detach()

    def _check(self, state: Any) -> None:
        """Warn about blocks with an expert that was not used since the last check. Every process must call it."""
        steps = state.global_step - self._checked_at
        if self._sums is None or not steps:
            return
        taken, examples = self._sums.interval()
        if examples < LEAST_EXAMPLES * len(taken[0]):
            return
        self._sums.begin_interval()
        self._checked_at = state.global_step
        self._warn(taken, steps, state)

    def _warn(self, taken: list[list[float]], steps: int, state: Any) -> None:
        """Warn about blocks with an unused expert, once per block."""
        assert self._sums is not None
        for block, counts in zip(self._sums.blocks, taken, strict=True):
            never = [expert for expert, count in enumerate(counts) if not count]
            if not never or block in self._warned:
                continue
            self._warned.add(block)
            if state.is_world_process_zero:
                when = f"in {steps} step{'s' if steps > 1 else ''} up to step {state.global_step}"
                warnings.warn(_never_taken(block, never, when, self._sums.model.config), stacklevel=2)


def _never_taken(block: str, never: list[int], when: str, config: MoPEConfig) -> str:
    """Return a warning that names a block's unused experts and the settings to change."""
    listed = f"expert{'s' if len(never) > 1 else ''} {', '.join(map(str, never))} of {config.num_experts}"
    return (
        f"{block}: no example used {listed} (counted from 0) {when}: raise importance_weight (now {config.importance_weight:g}), "
        f"lower importance_threshold (now {config.importance_threshold:g}), or use fewer experts (num_experts)"
    )


class _Sums:
    """Sums of a model's routing statistics, kept on its device.

    A forward pass overwrites one buffer with its statistics, and `add` adds the buffer to the sums after the step. A CUDA graph
    replays the write, and warm-up passes before a recording are not counted.
    """

    def __init__(self, model: MoPEForClassification) -> None:
        self.model, self.blocks = model, model.routed_blocks()
        self._experts: int = model.config.num_experts
        shape = (len(self.blocks), 2 * self._experts + 2)
        self._last, self._since_log, self._before = (torch.zeros(shape, device=model.device) for _ in range(3))
        self._hook = model.register_forward_hook(self._see)

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def _see(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """Store the statistics of a forward pass in training mode."""
        if model.training and output.routing:
            self._last.copy_(statistics(output.routing, self.model.config.train_top_k))

    def add(self) -> None:
        """Add the statistics of the last forward pass, without synchronization with the device."""
        self._since_log.add_(self._last)

    def read(self) -> Tensor:
        """Return the sums since the last call, over all processes, on the host. Every process must call it."""
        found = _over_processes(self._since_log)
        self._before.add_(self._since_log)
        self._since_log.zero_()
        return found

    def interval(self) -> tuple[list[list[float]], float]:
        """Return how many examples of the interval used each expert of each block, and the number of examples.

        Both are summed over all processes, and every process must call it.
        """
        found = _over_processes(self._before + self._since_log)
        taken: list[list[float]] = found[:, self._experts : 2 * self._experts].tolist()
        return taken, float(found[0, -1])

    def begin_interval(self) -> None:
        """Begin a new interval.

        Sums that are not logged yet belong to the previous interval. They are subtracted here because the next `read` adds them.
        """
        self._before.copy_(-self._since_log)


def _over_processes(sums: Tensor) -> Tensor:
    total = sums.clone()
    if is_distributed():
        dist.all_reduce(total)
    return total.double().cpu()


@torch.no_grad()
def statistics(routing: Sequence[Routing], top_k: int | None) -> Tensor:
    """Return sums over the B examples of a batch, (L,2K+2) float32.

    The columns are, for each block, the probabilities (K), the number of examples that used each expert (K), the entropies in
    nats, and the number of examples.
    """
    probs = torch.stack([each.probs for each in routing], dim=1).float()
    chosen = probs.topk(top_k or 1, dim=-1).indices
    taken = torch.zeros_like(probs).scatter_(-1, chosen, 1.0).sum(0)
    entropy = torch.special.entr(probs).sum((0, 2))
    count = torch.full_like(entropy, len(probs))
    return torch.cat([probs.sum(0), taken, torch.stack([entropy, count], dim=-1)], dim=-1)


def numbers(sums: Tensor, blocks: Sequence[str]) -> dict[str, float | int]:
    """Compute the statistics for the log, by name, from sums (L,2K+2) on the host; {} if there are no examples."""
    experts = (sums.shape[1] - 2) // 2
    load, taken, (entropy, count) = sums[:, :experts], sums[:, experts:-2], sums[:, -2:].unbind(-1)
    if not count.all():
        return {}
    load, limit = load / count[:, None], torch.tensor(max(experts, 2)).double().log()
    spread = load.var(-1) if experts > 1 else torch.zeros(len(load))
    columns = {
        "cv_squared": spread / load.mean(-1).square(),
        "load_entropy": torch.special.entr(load).sum(-1) / limit,
        "example_entropy": entropy / count / limit,
    }
    found: dict[str, float | int] = {}
    for row, block in enumerate(blocks):
        name = PREFIX + re.sub(r"[^A-Za-z0-9]+", "_", block)
        found |= {f"{name}/load/expert_{expert}": float(value) for expert, value in enumerate(load[row])}
        found |= {f"{name}/{column}": float(values[row]) for column, values in columns.items()}
        found[f"{name}/unused"] = int((taken[row] == 0).sum())
    return found


def routed_model(model: nn.Module | None) -> MoPEForClassification | None:
    """Return the first routed MoPE model among a model's modules, or None."""
    for module in () if model is None else model.modules():
        if isinstance(module, MoPEForClassification) and module.routed_blocks():
            return module
    return None


def _without_routing(on_log: Callable[..., None]) -> Callable[..., None]:
    """Wrap a callback's `on_log` so that it does not see the routing statistics."""

    def wrapped(args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = None if logs is None else {name: value for name, value in logs.items() if not name.startswith(PREFIX)}
        on_log(args, state, control, logs=kept, **kwargs)

    return wrapped
