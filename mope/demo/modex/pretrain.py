"""Pre-train a small fusion model on captions that name the digit in a scan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mope.demo import pretrain
from mope.demo.data import Digits, statements, to_pixel_values
from mope.demo.pretrain import Backbones
from mope.finite import LossWatch, NotFiniteError
from mope.modex import AlbefModel

# The upper half of the text layers attends to the scan.
TEXT_LAYERS, FUSION_LAYER = 4, 2
MASKED_SHARE = 0.3
BATCH = 64


@dataclass(frozen=True)
class Fused:
    """A pre-trained fusion model, the encoders it was made from, and its accuracy in telling whether a caption fits a scan."""

    model: AlbefModel
    encoders: Backbones
    matching_accuracy: float


def captions() -> list[list[str]]:
    """Return the sentences that name each digit, in training wordings only, without negations or properties of numbers."""
    named = {digit: statement for statement in statements() for digit in statement.digits if len(statement.digits) == 1}
    return [named[digit].sentences() for digit in range(10)]


def pair(classes: NDArray[np.int64], rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Draw a caption for each scan -> captions, and whether each fits, (N,). About half of them fit."""
    fits = rng.integers(0, 2, len(classes))
    said = np.where(fits, classes, (classes + rng.integers(1, 10, len(classes))) % 10)
    known = captions()
    return [str(rng.choice(known[digit])) for digit in said], torch.from_numpy(fits)


def build(encoders: Backbones) -> AlbefModel:
    """Join copies of the encoders by new cross-attention."""
    model = AlbefModel.from_encoders(encoders.vision, encoders.text, fusion_layer=FUSION_LAYER)
    for name, module in model.named_modules():
        # BERT's initialization is meant for wide layers. With it, layers as narrow as these do not start to learn.
        if ".crossattention." in name and isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def pretrain_fusion(
    splits: dict[str, Digits], *, vision_epochs: int, text_epochs: int, steps: int, seed: int, device: torch.device
) -> Fused:
    """Pre-train both encoders as for MoPE, then the whole model on captions of the training scans.

    The model predicts whether a caption fits, from the last state of [CLS], and, for captions that fit, the masked words, from
    their own last states.

    Raises:
        NotFiniteError: the loss of a step is not finite.
    """
    encoders = pretrain.pretrain(
        splits, vision_epochs=vision_epochs, text_epochs=text_epochs, seed=seed, device=device, text_layers=TEXT_LAYERS
    )
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng((seed, 4))
    model, tokenizer = build(encoders), encoders.tokenizer
    nn.Module.to(model, device)
    model.train().requires_grad_(True)
    width = encoders.text.config.hidden_size
    matching, words = nn.Linear(width, 2, device=device), nn.Linear(width, len(tokenizer), device=device)
    pixels, classes = to_pixel_values(splits["train"].pixels), splits["train"].classes

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    def loss_of(batch: NDArray[np.int64]) -> Tensor:
        sentences, fits = pair(classes[batch], rng)
        scans = pretrain.augment(pixels[batch], generator)
        ids, mask = encode(sentences)
        is_word = mask.bool() & (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)
        true = fits.bool()
        hidden = is_word[true] & (torch.rand(ids[true].shape, generator=generator) < MASKED_SHARE)
        read = torch.cat([ids, ids[true].masked_fill(hidden, tokenizer.mask_token_id)])
        states = model(
            torch.cat([scans, scans[true]]).to(device), read.to(device), torch.cat([mask, mask[true]]).to(device)
        ).last_hidden_state
        loss = F.cross_entropy(matching(states[: len(batch), 0]), fits.to(device))
        if not hidden.any():
            return loss
        return loss + F.cross_entropy(words(states[len(batch) :][hidden.to(device)]), ids[true][hidden].to(device))

    parameters = [*model.parameters(), *matching.parameters(), *words.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2), pct_start=0.1)
    watch = LossWatch()
    for step in tqdm(range(steps), desc="fusion: captions"):
        loss = loss_of(rng.integers(0, len(classes), BATCH))
        watch.see(loss, step + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if (wrong := watch.first()) is not None:
        raise NotFiniteError(f"fusion: captions: loss is not finite at step {wrong}; lower the learning rate")

    model.eval().requires_grad_(False)
    scans = splits["validation"]
    sentences, fits = pair(scans.classes, rng)
    ids, mask = encode(sentences)
    with torch.no_grad():
        states = model(to_pixel_values(scans.pixels).to(device), ids.to(device), mask.to(device)).last_hidden_state
        right = matching(states[:, 0]).argmax(-1).cpu() == fits
    return Fused(model, encoders, float(right.float().mean()))
