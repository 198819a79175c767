"""A subclass of transformers' Trainer for fusion models."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from mope.devices import find_device
from mope.files import disk_error
from mope.finite import LossWatch, NotFiniteError, infinite
from mope.fusion.base import FusionModel
from mope.fusion.checkpoint import WEIGHTS
from mope.modalities import slots_of

from .batches import Batches, Loader
from .evaluation import measure
from .loggers import loggers
from .metrics import loss_sum
from .monitor import RoutingMonitor, routed_model
from .options import RunOptions
from .recipe import Recipe
from .stepping import Stepping

Collate = Callable[[list[Any]], dict[str, Tensor]]
# Trainer's file names.
STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"


class Trained(nn.Module):
    """A wrapper that hides the fusion model's config from Trainer and returns the parts of the loss instead of a loss."""

    # Makes Trainer count the labels of all parts of a batch, over all processes.
    accepts_loss_kwargs = True

    def __init__(self, fusion: FusionModel) -> None:
        super().__init__()
        self.fusion = fusion

    def train(self, mode: bool = True) -> Trained:
        """Set the training mode if it changes. Trainer calls this in each step, and walking the modules takes milliseconds."""
        if self.fusion.training != mode:
            super().train(mode)
        return self

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the model on its arguments -> logits (B,K), and the importance loss () or None."""
        output = self.fusion(**inputs)
        # Only MoPE has one.
        return output.logits, getattr(output, "importance_loss", None)


def take_device(arguments: TrainingArguments, device: torch.device) -> None:
    """Make Trainer and Accelerator compute on a device other than the first GPU.

    Raises:
        ValueError: there are several processes.
    """
    if arguments.world_size > 1:
        raise ValueError(f"each of {arguments.world_size} processes uses its own GPU: leave the device {device} out")
    # Trainer reads the first, Accelerate the second.
    arguments.__dict__["_setup_devices"] = device
    assert arguments.distributed_state is not None
    arguments.distributed_state.device = device


class FusionTrainer(Trainer):
    """Trainer that trains a fusion model with a `Recipe`.

    It differs from transformers' Trainer in the following:

    - Batches and the loss are defined over the global batch, and do not depend on the number of processes.
    - The recipe gives the learning rate of each encoder.
    - A checkpoint holds the trained parameters and not the frozen backbones.
    - Metrics are exact over several processes.
    - An interruption saves a checkpoint first.
    - A loss that is not finite ends training before a checkpoint is written. An accelerator is checked only when a log line or a
      checkpoint is due or an epoch ends, so that no step has to synchronize.

    Args:
        fusion: the model, on any device.
        recipe: the hyperparameters, with a metric (`Recipe.for_problem`).
        out: the folder for checkpoints and TensorBoard's files.
        collate: a function of items that returns the arguments of the model and the labels.
        train_items, dev_items: the items. Without dev_items nothing is evaluated.
        class_weights: the weight of each class in the training loss, see `loss_sum`. The recipe's are not used here.
        options: how to carry out the run; `changes` are fields of it.

    Raises:
        ValueError: an option has a value that is not allowed, the batch cannot be split over the processes, the precision is not
            supported here, trained parameters have 16 bits, graphs are "on" but impossible, or a launcher shards the model.
    """

    def __init__(
        self,
        fusion: FusionModel,
        recipe: Recipe,
        out: str | Path,
        *,
        collate: Collate,
        train_items: Dataset[Any],
        dev_items: Dataset[Any] | None = None,
        class_weights: Sequence[float] | None = None,
        options: RunOptions | None = None,
        **changes: Any,
    ) -> None:
        options = (options or RunOptions()).replace(**changes)
        out = Path(out).resolve()
        place = find_device(options.device)
        on_cpu = place.type == "cpu"
        precision = resolve_precision(recipe.precision, on_cpu=on_cpu)
        short = [name for name, p in fusion.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if short:
            raise ValueError(
                f"{len(short)} trained parameters have 16 bits, which lose most updates, for example {short[0]}: load the encoders "
                "to fine-tune in float32, and compute in 16 bits with precision='bf16' or 'fp16'"
            )
        arguments = TrainingArguments(
            output_dir=str(out),
            num_train_epochs=recipe.epochs,
            max_steps=-1 if options.max_steps is None else options.max_steps,
            gradient_accumulation_steps=recipe.accumulation,
            max_grad_norm=recipe.clip,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=on_cpu,
            # Every trained parameter gets a gradient, and buffers never change.
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            eval_strategy="no" if dev_items is None else "epoch",
            save_strategy="epoch",
            # Keep the last and the best.
            save_total_limit=2,
            metric_for_best_model=None if dev_items is None else recipe.metric,
            greater_is_better=True,
            # By default, Trainer would look for them among the arguments of `Trained.forward`.
            label_names=["labels"],
            remove_unused_columns=False,
            # The filter would read the loss in each step, and so synchronize with the device.
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=not options.progress,
            seed=options.seed,
            dataloader_num_workers=options.num_workers,
        )
        # Otherwise Trainer would split each batch over all GPUs that a single process sees.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if options.device != "auto" and not on_cpu:
            take_device(arguments, place)
        self.fusion, self.recipe, self.out, self.collate = fusion, recipe, out, collate
        self.batches = Batches(
            train_items,
            recipe.batch_size,
            parts=recipe.accumulation,
            seed=options.seed,
            process=arguments.process_index,
            processes=arguments.world_size,
        )
        if not self.batches.steps:
            raise ValueError(f"too few training items for {arguments.world_size} processes with {recipe.accumulation} parts each")
        arguments.logging_steps = max(10, self.batches.steps // 4)
        arguments.per_device_train_batch_size = math.ceil(recipe.batch_size / arguments.world_size / recipe.accumulation)
        self.eval_batch_size = options.eval_batch_size or recipe.batch_size
        self.stepping = Stepping(fusion, options, self.batches, place, arguments.world_size)
        self.interruption = Interruption()
        self._losses = LossWatch()
        reports = loggers(options.report_to, lambda: TensorBoardCallback(_Writer(out / "tensorboard")))
        self.frozen_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        super().__init__(
            Trained(fusion),
            arguments,
            data_collator=collate,
            train_dataset=train_items,
            eval_dataset=dev_items,
            callbacks=[RunCallback(self, options.save_steps), *reports],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "this trainer keeps the whole model on each device: launch it without FSDP and DeepSpeed, "
                "or shard the model with torch.distributed.fsdp.fully_shard in a training loop of your own"
            )
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.args.device)
        # It prints every log line if progress bars are off.
        self.remove_callback(PrinterCallback)
        self.monitor = RoutingMonitor().attach(self) if routed_model(fusion) is not None else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with the frozen weights in their fastest form, and drop the graphs at the end.

        The weights are cast to 16 bits if the computation is in 16 bits, because autocast would cast them in each step. On the CPU
        they are packed for oneDNN.
        """
        before = self.fusion.frozen_dtype
        self.fusion.cast_frozen(self.frozen_dtype or before)
        try:
            with self.fusion.prepacked(), self._in_a_stream_of_its_own():
                output = super().train(*args, **kwargs)
            self.check_losses()
            return output
        finally:
            if self.monitor is not None:
                self.monitor.detach()
            self.stepping.release()
            self.fusion.cast_frozen(before)

    def _in_a_stream_of_its_own(self) -> Any:
        """Return a context with a new stream if DistributedDataParallel is to be recorded, because torch requires it."""
        if self.stepping.why_not or self.args.device.type != "cuda" or self.args.world_size == 1:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.args.device))

    def get_train_dataloader(self) -> Loader:  # type: ignore[override]
        collate = self.stepping.padding(self.collate)
        return Loader(self.batches, collate, workers=self.args.dataloader_num_workers, pin=self.args.device.type == "cuda")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with a learning rate for each encoder."""
        if self.optimizer is None:
            slots = slots_of(self.fusion.config)
            groups = [
                {"params": parameters, "lr": self.recipe.learning_rate(slots[name].modality.name)}
                for name, parameters in parameters_by_modality(self.fusion).items()
            ]
            # With fp16, a fused step checks for overflows on the device; otherwise each step would synchronize.
            on_gpu = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.weight_decay, fused=on_gpu or None)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            milestones = [epoch * self.batches.steps for epoch in self.recipe.milestones]
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(  # type: ignore[assignment]
                optimizer, milestones, self.recipe.gamma
            )
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move the inputs to the device. With several processes that includes masks, which DDP would move with a sync."""
        return self.fusion.on_device(inputs) if self.args.world_size == 1 else super()._prepare_inputs(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run forward and backward for a part of a batch, through a CUDA graph if possible -> its loss ()."""
        if self.stepping.takes(inputs):
            model.train()
            loss = self.stepping(
                model,
                inputs,
                num_items_in_batch,
                loss=lambda *given: self._loss(*given)[0],
                scaler=self.accelerator.scaler,
                guard=lambda: (self.fusion.config, self.current_gradient_accumulation_steps),
            )
            if loss is not None:
                self._losses.see(loss, self.state.global_step + 1)
                return loss
        plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return plain

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this process's part of the global batch's loss, times the number of processes, which average their gradients."""
        loss, logits = self._loss(model, inputs, num_items_in_batch)
        if model.training:
            self._losses.see(loss, self.state.global_step + 1)
        return (loss, (logits,)) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Return loss and logits. This may be recorded in a graph, so only tensors may change from step to step."""
        labels = inputs["labels"]
        logits, importance = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        # A mean per part would weight items differently if parts differ in size.
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        weights = self.class_weights if self.fusion.training else None
        loss = loss_sum(logits, labels, label_smoothing=self.recipe.label_smoothing, weights=weights)
        loss = loss * self.args.world_size / count
        if importance is not None:
            loss = loss + self.fusion.config.importance_weight / self.current_gradient_accumulation_steps * importance
        return loss, logits

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute and log the metrics over all processes.

        Raises:
            NotFiniteError: a metric is not finite.
        """
        items: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        found = measure(
            self.fusion,
            items,
            self.collate,
            batch_size=self.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            autocast=self.accelerator.autocast,
            title=None if self.args.disable_tqdm else metric_key_prefix,
        )
        if wrong := infinite(found):
            raise NotFiniteError(f"{' and '.join(wrong)} of {metric_key_prefix} is not finite {self._advice()}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_losses(self) -> None:
        """Raise NotFiniteError if the loss of any step so far was not finite. Synchronizes; every process must call it."""
        if (step := self._losses.first()) is not None:
            raise NotFiniteError(f"loss is not finite {self._advice(step)}")

    def _advice(self, step: int | None = None) -> str:
        """Return the part of an error message that names the step (by default the last one) and the remedies."""
        step = self.state.global_step if step is None else step
        own = {self.recipe.rate_of(slot.modality.name) for slot in slots_of(self.fusion.config).values()}
        names = [field.name for field in fields(self.recipe) if field.name in own]
        rates = " and ".join(f"--{name.replace('_', '-')} {getattr(self.recipe, name):g}" for name in names)
        dtype = self.frozen_dtype
        precision = "" if dtype is None else f", or compute in float32 (--precision fp32, not {str(dtype).removeprefix('torch.')})"
        first = "; at the first step the data and the encoders' weights may not be finite themselves" if step == 1 else ""
        return f"at step {step}; lower the learning rates (now {rates}){precision}{first}"

    def train_until_stopped(self, checkpoint: Path | None = None) -> None:
        """Train from the beginning or from a checkpoint. Afterwards, `interruption.arrived` is the signal that ended it, or None.

        With several processes, a signal ends the process as usual and no checkpoint is written for it, because the processes
        would not all stop at the same step. The last checkpoint is then from the last epoch or from `save_steps`.
        """
        watched = self.interruption.watched() if self.args.world_size == 1 else nullcontext()
        with watched, warnings.catch_warnings():
            # Accelerate passes the argument under its old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        # The errors that torch and safetensors raise if the disk is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            step = self.state.global_step
            failure = disk_error(f"{self.out}: the checkpoint of step {step} cannot be written", self.out, error)
            # The incomplete folder is of no use and occupies disk space.
            if self.args.should_save:
                shutil.rmtree(self.out / f"checkpoint-{step}", ignore_errors=True)
            raise failure from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = self.out if output_dir is None else Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.contiguous() for name, tensor in self.fusion.trained_state_dict().items()}
            if wrong := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
                raise NotFiniteError(f"{wrong[0]} and {len(wrong) - 1} other tensors that train are not finite {self._advice()}")
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.fusion, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts: dict[str, Any] = {OPTIMIZER: self.optimizer, SCHEDULER: self.lr_scheduler}
        for name, part in parts.items():
            # With several processes on a CPU, Trainer of transformers 5.17 loads to "cpu:0", which torch does not accept.
            part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def load_best(self) -> int | None:
        """Load the weights of the best checkpoint -> its step. If there is none, keep the last weights and return None."""
        step: int | None = self.state.best_global_step
        if step is None or not (folder := self.out / f"checkpoint-{step}").is_dir():
            return None
        load_trained(self.fusion, folder)
        return step


class Interruption:
    """Records the first SIGINT or SIGTERM in `arrived`. A second one ends the process as usual."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.arrived: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals within the context. Does nothing outside the main thread, where Python cannot handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self.signals}

        def arrive(number: int, frame: Any) -> None:
            self.arrived = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in self.signals:
            signal.signal(number, arrive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class RunCallback(TrainerCallback):
    """Callback that writes checkpoints within epochs, and seeds each process differently."""

    def __init__(self, trainer: FusionTrainer, save_steps: int | None) -> None:
        self.trainer, self.save_steps = trainer, save_steps

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint from the same number of processes restores their RNG state later. Otherwise this reseeds them by step.
        torch.manual_seed(args.seed + 1000003 * args.process_index + 7919 * state.global_step)
        # The folder may have been moved since the checkpoint was written.
        best = self.trainer.out / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        stopped = self.trainer.interruption.arrived is not None
        # At the end of an epoch, Trainer writes it after the evaluation. A second write could be cut off and damage the first.
        if state.global_step % self.trainer.batches.steps:
            control.should_save |= stopped or bool(self.save_steps and state.global_step % self.save_steps == 0)
        control.should_training_stop |= stopped
        # On the CPU the check does not synchronize.
        if control.should_log or control.should_save or (args.device.type == "cpu" and args.world_size == 1):
            self.trainer.check_losses()

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.interruption.arrived is not None and state.global_step % self.trainer.batches.steps:
            # Training stopped within the epoch, and on_step_end has requested the checkpoint already.
            control.should_evaluate = control.should_save = False
        self.trainer.check_losses()


class _Writer:
    """TensorBoard's writer, created at the first write, because only the first process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __getattr__(self, name: str) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder))
        return getattr(self._writer, name)


def parameters_by_modality(fusion: FusionModel) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters in and around each encoder, by the encoder's name."""
    groups: dict[str, list[nn.Parameter]] = {modality: [] for modality in fusion.config.modalities}
    for name, parameter in fusion.named_parameters():
        if parameter.requires_grad:
            groups[fusion.modality_of(name)].append(parameter)
    return {modality: parameters for modality, parameters in groups.items() if parameters}


def load_trained(fusion: FusionModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model of the same config.

    Raises:
        ValueError: the file cannot be read, or its tensors differ from those that the model trains.
    """
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a readable checkpoint ({error})") from error
    own = fusion.trained_state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(f"{file}: is from another model: {', '.join(wrong[:5])} are missing, unknown or of another shape")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def last_checkpoint(out: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None."""
    found = []
    for folder in out.glob("checkpoint-*"):
        # An incomplete checkpoint has no state file.
        with suppress(ValueError):
            found.append((read_state(folder)["global_step"], folder))
    return max(found)[1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state that Trainer writes last into a checkpoint: "global_step", "epoch", "best_metric" and others.

    Raises:
        ValueError: it cannot be read, or lacks the step or the epoch.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
        if not isinstance(state, dict) or not {"global_step", "epoch"} <= state.keys():
            raise ValueError(f"{STATE} lacks the step or the epoch")
        return state
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: not a checkpoint of mope train ({error})") from error


def resolve_precision(precision: str, *, on_cpu: bool) -> str:
    """Resolve "auto" to the precision for the device.

    Raises:
        ValueError: the precision is fp16 on a CPU.
    """
    if precision == "auto":
        return "fp32" if on_cpu else "fp16"
    if precision == "fp16" and on_cpu:
        raise ValueError("precision fp16 needs a GPU: use fp32 or bf16 on a CPU")
    return precision
