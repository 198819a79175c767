"""Base class of all fusion models: the interface that training, evaluation and data loading rely on."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mope.encoders.recomputing import Recomputing
from mope.fused.prepack import PrepackedLayers
from mope.fusion.card import write_card
from mope.fusion.checkpoint import (
    WEIGHTS,
    GivenEncoder,
    check_options_of_saving,
    describe,
    keep_encoder,
    write_config,
    write_tensors,
)
from mope.fusion.frozen import HALF, CastWeights
from mope.fusion.hub import push
from mope.fusion.predicting import Prediction, predict
from mope.fusion.protocol import ModelConfig
from mope.hints import did_you_mean
from mope.modalities import Modality, known, slots_of

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="FusionModel")


# Options of transformers' `save_pretrained`: those for the hub, and those that are accepted but have no effect here.
OF_THE_HUB = ("repo_id", "private", "token", "revision", "commit_message")
OPTIONS_OF_SAVING = (*OF_THE_HUB, "max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format")
UPLOAD = "Upload model"
# A sentinel, because transformers' Trainer passes None.
NOT_GIVEN: Any = object()


def in_frozen_dtype(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a method under autocast of the dtype passed to `cast_frozen`, if any."""

    @wraps(method)
    def run(model: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if model.frozen_dtype is None:
            return method(model, *args, **kwargs)
        with torch.autocast(model.device.type, dtype=model.frozen_dtype):
            return method(model, *args, **kwargs)

    return run


class FusionModel(PreTrainedModel, ABC):
    """Multimodal classifier that carries its tokenizer and image processor with it.

    The class is a `PreTrainedModel`, so transformers' Trainer, Auto classes and tools work with it. A transformers model is built
    from its configuration alone; a fusion model is built around existing encoders. It therefore does not call
    `PreTrainedModel.__init__`, which would choose attention kernels and initialize weights.

    `config` holds `method`, `modalities`, `main` and `complementary` (or None), the classes (`num_labels`, `id2label`,
    `problem_type`) and `padding_side`. The model is called on a batch from `mope.data.Collator`. Its output has `logits`
    (B,num_labels) and may have an `importance_loss`, whose weight in the loss is `config.importance_weight`.
    """

    config: Any

    # Read by transformers: the loss is the mean over a batch and accepts no further arguments.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    base_model_prefix = ""
    name_or_path = ""
    _no_split_modules = []  # type: ignore[assignment]  # noqa: RUF012 - as transformers declares it

    # The class of `config`; transformers reads it as `config_class`.
    configuration: ClassVar[type[ModelConfig] | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # transformers would derive this from the annotation of `config`, which here is a string or names another class.
        cls.config_class = cls.configuration  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        # Data and results, for the model card.
        self.card_data: dict[str, Any] = {}
        # transformers records here which warnings it has already issued.
        self.warnings_issued: dict[str, bool] = {}
        self._checkpointing: Recomputing | None = None
        # Each value is a processor, or the folder from which it is loaded on first use.
        self._processors: dict[str, Any] = {}
        self._cast: CastWeights | None = None

    @abstractmethod
    def backbone(self, modality: str) -> nn.Module:
        """Return the encoder of a modality."""

    @abstractmethod
    def modality_of(self, parameter: str) -> str:
        """Return the name of the encoder that a parameter, given by name, belongs to."""

    @abstractmethod
    def frozen_modules(self) -> Iterable[nn.Module]:
        """Return the modules whose frozen weights may be cast and packed, excluding the modules added to them."""

    def frozen_weights_moved(self) -> None:
        """Respond to a change of the frozen weights' storage. Does nothing unless overridden."""

    @abstractmethod
    def given_encoders(self) -> dict[str, GivenEncoder]:
        """Return the original encoders, keyed by the names of their records."""

    @abstractmethod
    def saved_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds besides the encoders, by name."""

    @abstractmethod
    def load_saved(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Load the tensors of `saved_state_dict` from those read from a file.

        Raises:
            ValueError: A tensor is missing or does not fit; the model is left unchanged.
        """

    def records_in_config(self, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the entries for config.json that describe the encoders, given the record of each."""
        return records

    def check_savable(self) -> None:
        """Raise ValueError if saving would lose something. Never raises unless overridden."""

    def recompute(self, recomputing: Recomputing | None) -> None:
        """Respond to gradient checkpointing being switched on, or off (None). Does nothing unless overridden."""

    def gradient_checkpointing_enable(  # type: ignore[override]
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations, with the same noise and routing.

        Args:
            gradient_checkpointing_kwargs: Arguments of torch's checkpoint. Only `use_reentrant=False` is accepted.
            every_n_layers: See `mope.encoders.recomputing.Recomputing`.
            offload: See `mope.encoders.recomputing.Recomputing`.

        Raises:
            ValueError: `gradient_checkpointing_kwargs` requests reentrant checkpointing or has another key, or `every_n_layers` or
                `offload` is invalid.
        """
        given = dict(gradient_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise ValueError("gradient checkpointing with use_reentrant=True is not supported: prompts are keyword arguments")
        if given:
            raise ValueError(f"gradient checkpointing accepts only use_reentrant=False, got {', '.join(given)}")
        recomputing = Recomputing(every_n_layers, offload)
        self.recompute(recomputing)
        self._checkpointing = recomputing

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpointing = None
        self.recompute(None)

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Call `gradient_checkpointing_enable`, under its name in newer versions of transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Call `gradient_checkpointing_disable`, under its name in newer versions of transformers."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Return whether layers are recomputed in the backward pass."""
        return self._checkpointing is not None

    # The name in newer versions of transformers.
    is_activation_checkpointing = is_gradient_checkpointing

    @abstractmethod
    def detach(self) -> None:
        """Restore the encoders to their original state."""

    def trains(self, modality: str) -> bool:
        """Return whether training changes the output of an encoder."""
        return any(p.requires_grad for p in self.backbone(modality).parameters())

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that training changes, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def device(self) -> torch.device:
        """The device of the main encoder."""
        return next(self.backbone(self.config.main).parameters()).device

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch on the model's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    @property
    def frozen_dtype(self) -> torch.dtype | None:
        """Dtype passed to `cast_frozen`, or None."""
        return None if self._cast is None else self._cast.dtype

    def cast_frozen(self, dtype: torch.dtype | None) -> None:
        """Cast frozen weights of linear and convolution layers to 16 bits, and compute under autocast of that dtype from now on.

        The results equal, bit for bit, those of `torch.autocast` of that dtype around the model, which casts these weights in every
        forward. Trained parameters are not cast, and neither are fine-tuned encoders. The cast weights take half the memory on an
        accelerator: the originals move to host memory (on the CPU they stay there beside the 16-bit copies). `save_pretrained` and
        the fingerprints use the originals, and `detach` restores them.

        Args:
            dtype: torch.bfloat16 or torch.float16, or None to restore the weights and compute in their dtype again.

        Raises:
            ValueError: `dtype` is another dtype, or the cast weights were changed since, so that the originals no longer match.
        """
        if dtype not in (None, *HALF):
            raise ValueError(f"cast_frozen: dtype must be torch.float16, torch.bfloat16 or None, got {dtype}")
        if dtype == self.frozen_dtype:
            return
        try:
            if self._cast is not None:
                self._cast.undo()
                self._cast = None
            if dtype is not None:
                self._cast = CastWeights(self.frozen_modules(), dtype)
        finally:
            self.frozen_weights_moved()

    @contextmanager
    def answering(self, *, experts: bool = False) -> Iterator[Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """Yield a function that classifies in evaluation mode without gradients: inputs -> logits and weights of the experts.

        The logits are (B,num_labels); the weights (B,K), by the name of each routed block, are {} unless they are asked for.

        Raises:
            ValueError: `experts` are asked for, and the model has none.
        """
        if experts:
            raise ValueError(f"experts: a {type(self).__name__} has none to name")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.prepacked():
                yield lambda **batch: (self(**batch).logits, {})
        finally:
            self.train(was_training)

    def predict(self, *, batch_size: int = 32, experts: bool = False, **items: Any) -> list[Prediction]:
        """Classify raw items, `model.predict(images=[...], texts=[...])` -> a `Prediction` for each, in their order.

        What reads them are the processors that the model holds, such as `tokenizer` and `image_processor`.

        Args:
            batch_size: items that are computed at once.
            experts: name the experts that each item took.
            items: of each modality a list: `images`, PIL images or paths, None for a grey one; `texts`; of other modalities under
                their names, what a line of data has.

        Raises:
            TypeError: a modality is missing or unknown, or is no list.
            ValueError: the lists have different lengths, an item cannot be read, the model lacks a processor or has no experts.
        """
        return predict(self, items, batch_size=batch_size, experts=experts)

    @contextmanager
    def prepacked(self) -> Iterator[None]:
        """Keep, within the context, copies of frozen linear weights on the CPU in the layout that oneDNN multiplies fastest.

        Results differ only by the order of summation. The copies take as much memory as the weights themselves (twice as much in
        training, where gradients pass through). Only float32 and bfloat16 weights are packed, and only on the CPU.
        """
        layers = PrepackedLayers(self.frozen_modules()) if self.device.type == "cpu" else None
        try:
            yield
        finally:
            if layers is not None:
                layers.undo()

    @contextmanager
    def weights_as_given(self) -> Iterator[None]:
        """Restore, within the context, the weights that the encoders had before `cast_frozen`, in host memory."""
        with nullcontext() if self._cast is None else self._cast.as_before():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Implement `to`, `half`, `cuda` and similar methods.

        Raises:
            ValueError: The requested dtype differs from that of `cast_frozen`; casting the rounded weights would not restore their
                original values.
        """
        if (dtype := self.frozen_dtype) is not None and fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype:
            raise ValueError(f"cast_frozen put the frozen weights in {dtype}: call cast_frozen(None) before changing the dtype")
        super()._apply(fn, recurse)
        self.frozen_weights_moved()
        return self

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each original encoder, or "trained" for encoders that train."""
        with self.weights_as_given():
            return {
                name: "trained" if given.trains else describe(given.encoder, given.state)["fingerprint"]
                for name, given in self.given_encoders().items()
            }

    def save_pretrained(  # type: ignore[override]
        self,
        path: str | Path,
        backbones: str = "by_name",
        dtype: torch.dtype | None = None,
        *,
        state_dict: Any = NOT_GIVEN,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a checkpoint: config.json, model.safetensors, tokenizer/ and image_processor/ if the model has them.

        Args:
            path: Folder to write, created if necessary.
            backbones: "by_name" records the names and fingerprints of the encoders; "copy" also stores the original encoders.
                Fine-tuned encoders are always copied, with their current weights.
            dtype: Dtype in which the copies are stored; they are cast back on loading. None keeps the dtype of the weights.
            state_dict: State of the whole model, gathered from all processes, or None for the model's own state; transformers'
                Trainer passes it for a checkpoint. If the argument is passed, model.safetensors holds everything that trains,
                including fine-tuned encoders, so that Trainer can resume from it.
            is_main_process: Whether this process writes.
            push_to_hub: Whether to upload the folder as well, see `push_to_hub`.
            **options: Options of `push_to_hub`; `repo_id` defaults to the name of the folder. Other options of transformers, such
                as max_shard_size, are accepted and ignored.

        Raises:
            TypeError: An option is unknown.
            ValueError: `backbones` has another value, `dtype` is given without copies, an encoder cannot be copied, or something
                that trains would be lost.
        """
        check_options_of_saving(backbones, dtype)
        if unknown := [name for name in options if name not in OPTIONS_OF_SAVING]:
            hint = did_you_mean(
                unknown[0], ("backbones", "dtype", "state_dict", "is_main_process", "push_to_hub", *OPTIONS_OF_SAVING)
            )
            raise TypeError(f"save_pretrained has no argument {', '.join(unknown)}{hint and '; ' + hint}")
        self.check_savable()
        if not is_main_process:
            return
        folder, records = Path(path), {}
        folder.mkdir(parents=True, exist_ok=True)
        with self.weights_as_given():
            for name, given in self.given_encoders().items():
                records[name] = keep_encoder(given, folder, backbones, dtype)
        self.save_processors(folder)
        tensors = self.saved_state_dict()
        if state_dict is not NOT_GIVEN:
            tensors = {name: (state_dict or {}).get(name, tensor) for name, tensor in self.trained_state_dict().items()}
        write_tensors(tensors, folder / WEIGHTS)
        write_config(folder, {**self.config.to_dict(), **self.records_in_config(records)})
        # Written last, because the model can be loaded without it.
        write_card(folder, self, records)
        if push_to_hub:
            push(
                folder,
                options.get("repo_id") or folder.name,
                private=options.get("private"),
                token=options.get("token"),
                revision=options.get("revision"),
                message=options.get("commit_message", UPLOAD),
            )

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        backbones: str = "by_name",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = UPLOAD,
    ) -> Any:
        """Upload the checkpoint that `save_pretrained` writes to the hub, and return huggingface_hub's description of the commit.

        Args:
            repo_id: "organisation/name", created if necessary.
            backbones: See `save_pretrained`.
            private: Whether a new repository is private.
            token: Access token of the hub.
            revision: Branch to upload to, created if necessary.
            commit_message: Message of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, backbones)
            return push(Path(folder), repo_id, private=private, token=token, revision=revision, message=commit_message)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:  # type: ignore[override]
        """Names of tensors that are not saved, so that transformers' Trainer does not report them as missing when it resumes."""
        return set(self.state_dict()) - set(self.trained_state_dict())

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: the encoders tie their own weights, and there are no others to tie."""

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move or cast the model, as `torch.nn.Module.to` does."""
        nn.Module.to(self, *args, **kwargs)
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements in all parameters, or in those that train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, the number of all parameters, and their ratio."""
        trained, all_of_them = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trained:,} || all params: {all_of_them:,} || trainable%: {100 * trained / all_of_them:.4f}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the main encoder."""
        return next(p.dtype for p in self.backbone(self.config.main).parameters() if p.is_floating_point())

    @property
    def main_input_name(self) -> str:  # type: ignore[override]
        """Name of the input that the main encoder requires."""
        return slots_of(self.config)[self.config.main].required

    def restored(self, tensors: dict[str, Tensor], folder: Path) -> Self:
        """Load a checkpoint into this new model and return it in evaluation mode; detach its encoders if loading fails."""
        try:
            self.load_saved(tensors, folder / WEIGHTS)
        except BaseException:
            self.detach()
            raise
        self.find_processors(folder)
        return self.eval()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Return an iterator over the parameters that an optimizer should update."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder; None until one is set."""
        return self._processor("tokenizer")

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._set_processor("tokenizer", tokenizer)

    @property
    def image_processor(self) -> Any:
        """The image processor of the vision encoder; None until one is set."""
        return self._processor("image_processor")

    @image_processor.setter
    def image_processor(self, image_processor: Any) -> None:
        self._set_processor("image_processor", image_processor)

    def processor(self, name: str) -> Any:
        """Return the processor of an encoder, given the encoder's name in the model; None until one is set.

        Encoders of the same modality share the processor of that modality, such as `tokenizer`, unless they have their own.
        """
        slot = slots_of(self.config)[name]
        if slot.processor is None:
            return None
        own = self._processor(slot.processor)
        return self._processor(slot.modality.processor or "") if own is None else own

    def set_processor(self, name: str, processor: Any) -> None:
        """Set the processor that turns raw items into inputs of an encoder, given the encoder's name in the model.

        Raises:
            ValueError: The encoder's modality has no processor, or the processor does not fit the configuration.
        """
        slot = slots_of(self.config)[name]
        if slot.processor is None:
            raise ValueError(f"{name} needs no processor: modality {slot.modality.name!r} has none")
        self._set_processor(slot.processor, processor)

    def _set_processor(self, name: str, processor: Any) -> None:
        self._processor_kinds()[name].check_processor(processor, self.config)
        self._processors[name] = processor

    def _processor_kinds(self) -> dict[str, Modality]:
        """Return the modality of each processor name that this model supports."""
        own = {slot.processor: slot.modality for slot in slots_of(self.config).values() if slot.processor is not None}
        return {modality.processor: modality for modality in known().values() if modality.processor is not None} | own

    def _processor(self, name: str) -> Any:
        processor = self._processors.get(name)
        if isinstance(processor, Path):
            load = self._processor_kinds()[name].load_processor
            processor = load(processor, config=self.config, local_files_only=True, trust_remote_code=False)
            self._processors[name] = processor
        return processor

    def save_processors(self, folder: Path) -> None:
        """Write each processor that is set to its own subfolder of `folder`."""
        for name, processor in self._processors.items():
            if not isinstance(processor, Path):
                processor.save_pretrained(folder / name)
            elif processor.resolve() != (folder / name).resolve():
                shutil.copytree(processor, folder / name, dirs_exist_ok=True)

    def find_processors(self, folder: Path) -> None:
        """Find the processors that `save_processors` wrote; each is loaded on first use."""
        self._processors = {name: folder / name for name in self._processor_kinds() if (folder / name).is_dir()}
