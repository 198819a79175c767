"""The interface of a fusion model, of any system, to training, evaluation and data."""

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


# Options of transformers' `save_pretrained`: those for the hub, and those that have no effect here.
OF_THE_HUB = ("repo_id", "private", "token", "revision", "commit_message")
OPTIONS_OF_SAVING = (*OF_THE_HUB, "max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format")
UPLOAD = "Upload model"
# Not None, which transformers' Trainer gives.
NOT_GIVEN: Any = object()


def in_frozen_dtype(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Under autocast of the dtype that `cast_frozen` was given, if it was."""

    @wraps(method)
    def run(model: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if model.frozen_dtype is None:
            return method(model, *args, **kwargs)
        with torch.autocast(model.device.type, dtype=model.frozen_dtype):
            return method(model, *args, **kwargs)

    return run


class FusionModel(PreTrainedModel, ABC):
    """Classifies items of several modalities; what makes inputs of raw items travels with it.

    A model of transformers' kind, which its Trainer, Auto classes and tools take as one of their own. What transformers' own models
    build from a configuration alone, this one builds around encoders that are given: `PreTrainedModel.__init__`, which would choose
    attention kernels and draw weights, is not called.

    Its `config` says `method`, `modalities`, the `main` and the `complementary` one (or None), the classes (`num_labels`,
    `id2label`, `problem_type`) and `padding_side`. It is called with what `mope.data.Collator` makes; the output has `logits`
    (B,num_labels), and may have an `importance_loss`, which counts `config.importance_weight` times.
    """

    config: Any

    # transformers reads this: the loss is the mean over a batch, and takes no further arguments.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    base_model_prefix = ""
    name_or_path = ""
    _no_split_modules = []  # type: ignore[assignment]  # noqa: RUF012 - as transformers declares it

    # The class of `config`; transformers reads it as `config_class`.
    configuration: ClassVar[type[ModelConfig] | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # transformers takes it from the annotation of `config`, which here is a string, or of another class.
        cls.config_class = cls.configuration  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        # Data and results, for the card of a saved model.
        self.card_data: dict[str, Any] = {}
        # transformers notes here which warnings it has given.
        self.warnings_issued: dict[str, bool] = {}
        self._checkpointing: Recomputing | None = None
        # A processor, or the folder to load it from when it is first used.
        self._processors: dict[str, Any] = {}
        self._cast: CastWeights | None = None

    @abstractmethod
    def backbone(self, modality: str) -> nn.Module:
        """The encoder of a modality."""

    @abstractmethod
    def modality_of(self, parameter: str) -> str:
        """The encoder in or around which a parameter stands, by the parameter's name."""

    @abstractmethod
    def frozen_modules(self) -> Iterable[nn.Module]:
        """Return the modules whose frozen weights may be cast and packed, without what was added to them."""

    def frozen_weights_moved(self) -> None:
        """Do what is needed after frozen weights got another place in memory: nothing, unless a subclass knows better."""

    @abstractmethod
    def given_encoders(self) -> dict[str, GivenEncoder]:
        """Return each encoder as it was given, by the name of its record."""

    @abstractmethod
    def saved_state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds beside the encoders, by name."""

    @abstractmethod
    def load_saved(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Take `saved_state_dict` from the tensors of a file. Where one is missing or does not fit, ValueError and no change."""

    def records_in_config(self, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what config.json says of the encoders, from the record of each."""
        return records

    def check_savable(self) -> None:
        """Raise ValueError where something would be lost: never, unless a subclass knows better."""

    def recompute(self, recomputing: Recomputing | None) -> None:
        """Do what a subclass needs where gradient checkpointing is switched on, or off: None."""

    def gradient_checkpointing_enable(  # type: ignore[override]
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations, with the same noise and routing.

        Args:
            gradient_checkpointing_kwargs: of torch's checkpoint; `use_reentrant` alone, and False.
            every_n_layers, offload: see `mope.encoders.recomputing.Recomputing`.

        Raises:
            ValueError: reentrant checkpointing is asked for, or another argument of torch's checkpoint; or another value is wrong.
        """
        given = dict(gradient_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise ValueError("gradient checkpointing with use_reentrant=True is not supported: prompts are keyword arguments")
        if given:
            raise ValueError(f"gradient checkpointing takes use_reentrant=False, and no {', '.join(given)}")
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
        """`gradient_checkpointing_enable` by its name in newer versions of transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its name in newer versions of transformers."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self._checkpointing is not None

    # The name in newer versions of transformers.
    is_activation_checkpointing = is_gradient_checkpointing

    @abstractmethod
    def detach(self) -> None:
        """Give the encoders back as they were."""

    def trains(self, modality: str) -> bool:
        """Whether training changes what an encoder says."""
        return any(p.requires_grad for p in self.backbone(modality).parameters())

    def trained_state_dict(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def device(self) -> torch.device:
        """The device of the main encoder."""
        return next(self.backbone(self.config.main).parameters()).device

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the model wants it: on its device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    @property
    def frozen_dtype(self) -> torch.dtype | None:
        """Return the dtype that `cast_frozen` was given."""
        return None if self._cast is None else self._cast.dtype

    def cast_frozen(self, dtype: torch.dtype | None) -> None:
        """Keep frozen weights of linear and convolution layers in 16 bits, and compute under autocast of that dtype from now on.

        The same numbers, bit for bit, as `torch.autocast` of that dtype around the model, which casts these weights in every
        forward. What trains stays as it is, fine-tuned encoders too. An accelerator then holds half as many bytes of them: the
        weights as they were go to the memory of the host (on the CPU they stay there beside those in 16 bits). They are what
        `save_pretrained` writes and fingerprints are of, and `detach` brings them back.

        Args:
            dtype: torch.bfloat16 or torch.float16; None: bring the weights back, and compute in their dtype again.

        Raises:
            ValueError: another dtype; or cast weights were changed since, so that there is nothing to bring back.
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
        """Evaluation mode, no gradients -> for a while, a call of the model that gives logits, and weights of experts.

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
        """For a while frozen linear layers on the CPU keep copies of their weights in the order that oneDNN multiplies fastest.

        The same results but for the order of sums. The copies take as much memory again as the weights (twice as much in training,
        where gradients pass through), in float32 and bfloat16; other dtypes and devices are left alone.
        """
        layers = PrepackedLayers(self.frozen_modules()) if self.device.type == "cpu" else None
        try:
            yield
        finally:
            if layers is not None:
                layers.undo()

    @contextmanager
    def weights_as_given(self) -> Iterator[None]:
        """For a while the encoders have the weights that they had before `cast_frozen`, in the memory of the host."""
        with nullcontext() if self._cast is None else self._cast.as_before():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `cuda` and their like.

        Raises:
            ValueError: another dtype is asked for than that of `cast_frozen`, from which what was rounded would not come back.
        """
        if (dtype := self.frozen_dtype) is not None and fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype:
            raise ValueError(f"the frozen weights are in {dtype} by cast_frozen: call cast_frozen(None) before another dtype")
        super()._apply(fn, recurse)
        self.frozen_weights_moved()
        return self

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each encoder as it was given, "trained" for one that trains."""
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
            path: of the folder; made if need be.
            backbones: "by_name" keeps the encoders' names and fingerprints, "copy" the encoders themselves too, as they were given.
                One that was fine-tuned is copied in any case, as it is.
            dtype: of the copies' files; they are cast back when they are loaded. None: as they are.
            state_dict: of the whole model, gathered from all processes, or None for the model's own, as transformers' Trainer gives
                it for a checkpoint. Where it is given, all that trains is in model.safetensors, fine-tuned encoders too, so that
                Trainer can resume from it.
            is_main_process: whether this process writes.
            push_to_hub, options: see `push_to_hub`; `repo_id`: default the name of the folder. Other options of transformers, such
                as max_shard_size, have nothing to act on.

        Raises:
            ValueError: `backbones` is neither, `dtype` is given without copies, an encoder cannot be copied, or something that
                trains would be lost.
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
        # The model can be loaded without it.
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
        """Save the model and upload it to the hub, as `save_pretrained` writes it -> what huggingface_hub says of the commit.

        Args:
            repo_id: "organisation/name"; made if need be.
            backbones: see `save_pretrained`.
            private, token, revision, commit_message: of the hub; a revision that is not there becomes a branch.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, backbones)
            return push(Path(folder), repo_id, private=private, token=token, revision=revision, message=commit_message)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:  # type: ignore[override]
        """Return the tensors that checkpoints leave out, so that transformers' Trainer does not miss them when it resumes."""
        return set(self.state_dict()) - set(self.trained_state_dict())

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: no weights are tied that the encoders do not tie themselves."""

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move or cast as any module."""
        nn.Module.to(self, *args, **kwargs)
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trained, all_of_them = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trained:,} || all params: {all_of_them:,} || trainable%: {100 * trained / all_of_them:.4f}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the main encoder."""
        return next(p.dtype for p in self.backbone(self.config.main).parameters() if p.is_floating_point())

    @property
    def main_input_name(self) -> str:  # type: ignore[override]
        """The input that the main encoder cannot do without."""
        return slots_of(self.config)[self.config.main].required

    def restored(self, tensors: dict[str, Tensor], folder: Path) -> Self:
        """Return this new model in evaluation mode, with what a checkpoint holds; where that does not fit, its encoders go back."""
        try:
            self.load_saved(tensors, folder / WEIGHTS)
        except BaseException:
            self.detach()
            raise
        self.find_processors(folder)
        return self.eval()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters for an optimizer."""
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
        """Return the processor of an encoder, by the encoder's name in the model; None until one is set.

        Several encoders of a modality share what was set for the modality, such as `tokenizer`, but for those with their own.
        """
        slot = slots_of(self.config)[name]
        if slot.processor is None:
            return None
        own = self._processor(slot.processor)
        return self._processor(slot.modality.processor or "") if own is None else own

    def set_processor(self, name: str, processor: Any) -> None:
        """Set what makes inputs of raw items for an encoder, by the encoder's name in the model.

        Raises:
            ValueError: its modality needs none, or it does not fit the configuration.
        """
        slot = slots_of(self.config)[name]
        if slot.processor is None:
            raise ValueError(f"{name} needs no processor: modality {slot.modality.name!r} names none")
        self._set_processor(slot.processor, processor)

    def _set_processor(self, name: str, processor: Any) -> None:
        self._processor_kinds()[name].check_processor(processor, self.config)
        self._processors[name] = processor

    def _processor_kinds(self) -> dict[str, Modality]:
        """The modality of each name that a processor may have here."""
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
        """Write those that are set into folders of their own in a folder."""
        for name, processor in self._processors.items():
            if not isinstance(processor, Path):
                processor.save_pretrained(folder / name)
            elif processor.resolve() != (folder / name).resolve():
                shutil.copytree(processor, folder / name, dirs_exist_ok=True)

    def find_processors(self, folder: Path) -> None:
        """Take those that `save_processors` wrote, when they are first used."""
        self._processors = {name: folder / name for name in self._processor_kinds() if (folder / name).is_dir()}
