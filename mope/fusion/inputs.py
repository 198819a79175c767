"""Inputs of a fusion model, by their names in a batch: signature of `forward`, and checks."""

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
    """Checks of the inputs of a model against those that its encoders read.

    Args:
        slots: Slots of the model, by name.
        refused: Names of inputs and flags that the modalities define but the encoders do not read.
    """

    def __init__(self, slots: Mapping[str, Slot], refused: Collection[str] = ()) -> None:
        self.slots, self.refused = slots, refused
        self._slot_of: dict[str, Slot] = {}
        self._doubts = Doubts()

    def sign(self, model: nn.Module) -> None:
        """List the inputs in the signature of `model.forward`, and record the slot of each input, including unused modalities."""
        slots = self.slots.values()
        tensors = [name for slot in slots for name in slot.names if name not in self.refused]
        sign_forward(model, tensors, [flag for slot in slots for flag in slot.flags if flag not in self.refused])
        others = [Slot(name, modality) for name, modality in known().items() if name not in self.slots]
        names = ((name, slot) for slot in (*others, *slots) for name in (*slot.names, *slot.flags))
        self._slot_of = {name: slot for name, slot in names if name not in self.refused}

    def own(
        self, model: Any, given: Mapping[str, Any], wanted: Sequence[str], check_flag: Callable[[str, str], None] | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, bool]]]:
        """Sort the contents of a batch by slot, and check them.

        Args:
            model: A `FusionModel`, whose backbones read the inputs.
            given: The batch.
            wanted: Slots whose encoders have to run.
            check_flag: Function of (slot, flag) that raises ValueError if the encoder does not support the flag. None: every
                encoder supports every flag.

        Returns:
            For each slot, the inputs under the modality's own names, and the flags that are set under the encoder's names.

        Raises:
            TypeError: An input is not a tensor, or its name is unknown to all modalities.
            ValueError: An input is missing, or does not fit its encoder or the other inputs.
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
        """Check names and types of inputs. Tensors of modalities that the model does not have are ignored."""
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
            # torch.export would treat the result of len() as a constant.
            sizes.append(own[name][slot.modality.required].shape[0])
        if any(size != sizes[0] for size in sizes):
            found = ", ".join(f"{size} in {self.slots[name].required}" for size, name in zip(sizes, wanted, strict=True))
            raise ValueError(f"all inputs must hold the same number of items, got {found}")


def _check(slot: Slot, encoder: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Run `Modality.check`, which uses the modality's own names, and name the slot in its errors if it has a prefix."""
    if not slot.prefix:
        slot.modality.check(encoder, own)
        return
    try:
        slot.modality.check(encoder, own)
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}") from error


def as_encoder_knows(slot: Slot, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a slot, except the mask, renamed from the modality's names to the encoder's names."""
    return {of_encoder: own[of_batch] for of_batch, of_encoder in slot.modality.inputs.items() if of_batch in own}
