"""What training, evaluation and data ask of a fusion model, of any system."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope.modalities import Modality, known, slots_of


class FusionModel(nn.Module, ABC):
    """Classifies image-text pairs; tokenizer and image processor travel with it.

    Its `config` says `method`, `modalities`, the `main` and the `complementary` one (or None), the classes (`num_labels`,
    `id2label`, `problem_type`) and `padding_side`. It is called with what `mope.data.Collator` makes; the output has `logits`
    (B,num_labels), and may have an `importance_loss`, which counts `config.importance_weight` times.
    """

    config: Any

    def __init__(self) -> None:
        super().__init__()
        # A processor, or the folder to load it from when it is first used.
        self._processors: dict[str, Any] = {}

    @abstractmethod
    def backbone(self, modality: str) -> nn.Module:
        """The encoder of a modality."""

    @abstractmethod
    def modality_of(self, parameter: str) -> str:
        """The encoder in or around which a parameter stands, by the parameter's name."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """What the encoders were when they were given."""

    @abstractmethod
    def trains(self, modality: str) -> bool:
        """Whether training changes what an encoder says."""

    @abstractmethod
    def trained_state_dict(self) -> dict[str, Tensor]:
        """All that training changes."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the model wants it."""

    @property
    @abstractmethod
    def frozen_dtype(self) -> torch.dtype | None:
        """What `cast_frozen` was given."""

    @abstractmethod
    def cast_frozen(self, dtype: torch.dtype | None) -> None:
        """Keep frozen weights in 16 bits and compute under autocast of that dtype; None: bring them back."""

    @abstractmethod
    def weights_as_given(self) -> AbstractContextManager[None]:
        """For a while the encoders have the weights that they were given."""

    @abstractmethod
    def prepacked(self) -> AbstractContextManager[None]:
        """For a while frozen linear layers on the CPU keep copies of their weights in the order that oneDNN multiplies fastest."""

    @abstractmethod
    def gradient_checkpointing_enable(self) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""

    @abstractmethod
    def save_pretrained(self, path: str | Path, backbones: str = "by_name") -> None:
        """Write a checkpoint, with names and fingerprints of the encoders or copies ("copy") of them."""

    @abstractmethod
    def detach(self) -> None:
        """Give the encoders back as they were."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer should be given."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder, None if nobody has set one."""
        return self._processor("tokenizer")

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._set_processor("tokenizer", tokenizer)

    @property
    def image_processor(self) -> Any:
        """The image processor of the vision encoder, None if nobody has set one."""
        return self._processor("image_processor")

    @image_processor.setter
    def image_processor(self, image_processor: Any) -> None:
        self._set_processor("image_processor", image_processor)

    def processor(self, name: str) -> Any:
        """What makes inputs of raw items for an encoder, by the encoder's name in the model; None if nobody has set it.

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
