"""The inputs of a fusion model, by the names that its modalities have in a batch: its signature, and checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mope.checks import Doubts, check_are_tensors
from mope.fusion.signature import sign_forward
from mope.hints import did_you_mean
from mope.modalities import Slot, known


class InputChecks:
    """Holds what a model is given to what its encoders read.

    Args:
        slots: of the model, by name.
        refused: names of inputs and flags that its encoders do not read, though their modalities have them.
    """

    def __init__(self, slots: Mapping[str, Slot], refused: Collection[str] = ()) -> None:
        self.slots, self.refused = slots, refused
        self._slot_of: dict[str, Slot] = {}
        self._doubts = Doubts()

    def sign(self, model: nn.Module) -> None:
        """Let the signature of `forward` list the inputs, and keep which slot each belongs to, others of the registry included."""
        slots = self.slots.values()
        tensors = [name for slot in slots for name in slot.names if name not in self.refused]
        sign_forward(model, tensors, [flag for slot in slots for flag in slot.flags if flag not in self.refused])
        others = [Slot(name, modality) for name, modality in known().items() if name not in self.slots]
        names = ((name, slot) for slot in (*others, *slots) for name in (*slot.names, *slot.flags))
        self._slot_of = {name: slot for name, slot in names if name not in self.refused}

    def own(
        self, model: Any, given: Mapping[str, Any], wanted: Sequence[str], check_flag: Callable[[str, str], None] | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, bool]]]:
        """Sort what a batch holds by slot, and check it.

        Args:
            model: a `FusionModel`, whose backbones read the inputs.
            given: the batch.
            wanted: the slots whose encoders have to run.
            check_flag: (slot, flag) -> nothing, ValueError where the encoder does not take it. None: all take all.

        Returns:
            Of each slot the inputs under the modality's own names, and the flags that are set under those that the encoder knows.

        Raises:
            TypeError: an input is not a tensor, or has a name that no modality knows.
            ValueError: an input is missing, does not fit its encoder or the others.
        """
        self._check_names(model, given)
        own = {name: slot.own(given) for name, slot in self.slots.items()}
        for name, slot in self.slots.items():
            _check(slot, model.backbone(name), own[name])
        flags: dict[str, dict[str, bool]] = {}
        for name, slot in self.slots.items():
            flags[name] = {known_as: True for flag, known_as in slot.flags.items() if given.get(flag)}
            if check_flag is not None:
                for flag in flags[name]:
                    check_flag(name, flag)
        if not torch.compiler.is_compiling():
            self._doubts.say(d for name, slot in self.slots.items() for d in slot.modality.doubts(model.backbone(name), own[name]))
        self._check_given(model, own, wanted)
        return own, flags

    def _check_names(self, model: Any, given: Mapping[str, Any]) -> None:
        """Hold names and types of inputs to what there is. Those of modalities that the model lacks are left alone."""
        for name, value in given.items():
            slot = self._slot_of.get(name)
            if slot is None:
                hint = did_you_mean(name, self._slot_of)
                raise TypeError(f"{type(model).__name__}: no encoder reads {name}{hint and '; ' + hint}")
            if value is None or value is False:
                continue
            if name not in slot.flags:
                check_are_tensors({name: value}, slot.modality.not_a_tensor)
            elif slot.name not in self.slots:
                raise ValueError(f"{name}: method {model.config.method!r} has no {slot.name} encoder")

    def _check_given(self, model: Any, own: Mapping[str, Mapping[str, Tensor]], wanted: Sequence[str]) -> None:
        sizes = []
        for name in wanted:
            slot = self.slots[name]
            if slot.modality.required not in own[name]:
                works_on = " and ".join(model.config.modalities)
                raise ValueError(f"method {model.config.method!r} works on {works_on}: {slot.required} must be given")
            # torch.export fixes what len() gives.
            sizes.append(own[name][slot.modality.required].shape[0])
        if any(size != sizes[0] for size in sizes):
            found = ", ".join(f"{size} in {self.slots[name].required}" for size, name in zip(sizes, wanted, strict=True))
            raise ValueError(f"all inputs must hold the same number of items, got {found}")


def _check(slot: Slot, encoder: nn.Module, own: Mapping[str, Tensor]) -> None:
    """`Modality.check`, which knows the inputs by the modality's own names."""
    if not slot.prefix:
        slot.modality.check(encoder, own)
        return
    try:
        slot.modality.check(encoder, own)
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}") from error


def as_encoder_knows(slot: Slot, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs of a slot, but for the mask, under the names that its encoder knows, from those of its modality."""
    return {of_encoder: own[of_batch] for of_batch, of_encoder in slot.modality.inputs.items() if of_batch in own}
