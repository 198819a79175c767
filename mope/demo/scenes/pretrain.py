"""Pretrain a ViT on scenes and a BERT on sentences, each on its own modality, and freeze them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

from mope.demo.data import Digits, vocabulary
from mope.demo.pretrain import (
    HEADS,
    PIXEL_NOISE,
    VISION_LAYERS,
    WIDTH,
    build_tokenizer,
    freeze,
    optimize,
    pretrain_text,
)
from mope.demo.scenes.data import PLACES, SENTENCES, Scenes, compose, to_pixel_values

PATCH = (4, 8)
BATCH = 128
VISION_STEPS, TEXT_STEPS = 700, 500
# Weight of the loss that trains each patch token on the class of its digit.
TOKEN_WEIGHT = 0.5


@dataclass(frozen=True)
class SceneEncoders:
    """Frozen encoders, with their pretraining accuracies (None for the encoders that come with the package)."""

    vision: ViTModel
    text: BertModel
    tokenizer: PreTrainedTokenizerFast
    image_processor: ViTImageProcessorPil
    tag_accuracy: float | None = None
    word_accuracy: float | None = None


def build_image_processor() -> ViTImageProcessorPil:
    """Build an image processor equivalent to `to_pixel_values`, for scenes (16,16,1) from 0 to 16."""
    return ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5])


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return fixed positions (1, 1 + rows * columns, width): zero for [CLS], sines and cosines of row and column for patches."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")

    def waves(places: Tensor) -> Tensor:
        angles = places.flatten()[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
        return torch.cat([angles.sin(), angles.cos()], 1)

    return torch.cat([torch.zeros(1, width), torch.cat([waves(row), waves(column)], 1)])[None]


def build_vision() -> ViTModel:
    """Build a ViT for gray images of 16 x 16, with 8 patches of 4 x 8, fixed positions, and [CLS]."""
    config = ViTConfig(
        image_size=16,
        patch_size=list(PATCH),
        num_channels=1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
    )
    vision: Any = ViTModel(config, add_pooling_layer=False)
    positions = grid_positions(16 // PATCH[0], 16 // PATCH[1], WIDTH)
    vision.embeddings.position_embeddings.requires_grad_(False).copy_(positions)
    return vision


def draw_scenes(digits: Digits, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw augmented scenes; return pixel values (count,1,16,16) and classes (count,4).

    Half of the scans are shifted by at most one pixel in each direction, and noise is added to all pixels.
    """
    scans = rng.integers(0, len(digits), (count, len(PLACES)))
    padded = np.pad(digits.pixels, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), (1, 2))
    moved = rng.random(scans.shape) < 0.5
    down, right = (np.where(moved, rng.integers(0, 3, scans.shape), 1) for _ in range(2))
    tiles = windows[scans, down, right].reshape(-1, 8, 8)
    pixels = compose(tiles, np.arange(scans.size).reshape(scans.shape))
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    values = to_pixel_values(pixels) + PIXEL_NOISE * torch.from_numpy(noise)[:, None]
    return values, torch.from_numpy(digits.classes[scans])


def tags(classes: Tensor) -> Tensor:
    """Mark which of the ten digits are in a scene: (N,4) -> (N,10) of 0 and 1."""
    return torch.zeros(len(classes), 10).scatter_(1, classes, 1.0)


def pretrain_vision(digits: Digits, validation: Scenes, *, steps: int, seed: int, device: torch.device) -> tuple[ViTModel, float]:
    """Train to recognize digits; return the encoder and the share of correct tags on the validation scenes.

    After each of the last three blocks, [CLS] predicts which digits are in the scene, but not where. Each patch token predicts the
    class of its digit.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 99))
    vision, head, token_head = build_vision(), nn.Linear(WIDTH, 10, device=device), nn.Linear(WIDTH, 10, device=device)
    nn.Module.to(vision, device)
    # Index in PLACES for each patch.
    rows, columns = np.meshgrid(np.arange(16 // PATCH[0]) * PATCH[0] // 8, np.arange(16 // PATCH[1]) * PATCH[1] // 8, indexing="ij")
    place_of_patch = torch.from_numpy(2 * rows + columns).flatten()

    def read(pixel_values: Tensor) -> tuple[list[Tensor], Tensor]:
        output = vision(pixel_values=pixel_values.to(device), output_hidden_states=True)
        earlier = [vision.layernorm(states[:, 0]) for states in output.hidden_states[2:VISION_LAYERS]]
        return [head(states) for states in (*earlier, output.last_hidden_state[:, 0])], output.last_hidden_state[:, 1:]

    def loss_of_batch(_: Tensor) -> Tensor:
        pixel_values, classes = draw_scenes(digits, BATCH, rng)
        scores, tokens = read(pixel_values)
        truth = tags(classes).to(device)
        of_tags = torch.stack([F.binary_cross_entropy_with_logits(each, truth) for each in scores]).mean()
        of_tokens = F.cross_entropy(token_head(tokens).flatten(0, 1), classes[:, place_of_patch].flatten().to(device))
        return of_tags + TOKEN_WEIGHT * of_tokens

    parameters = [p for module in (vision, head, token_head) for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    optimize(
        parameters, loss_of_batch, 1, epochs=steps, learning_rate=2e-3, generator=generator, title="ViT: digits of a scene",
        clip=1.0,
    )  # fmt: skip
    vision.eval()
    with torch.no_grad():
        found = read(to_pixel_values(validation.pixels))[0][-1].cpu() > 0
    truth = tags(torch.from_numpy(validation.classes)).bool()
    return freeze(vision), float((found == truth).float().mean())


def pretrain(
    scans: dict[str, Digits], scenes: dict[str, Scenes], *, seed: int, device: torch.device, share: float = 1.0
) -> SceneEncoders:
    """Train the encoders on the training scans and on the sentences, for a fraction `share` of the full number of steps."""
    tokenizer = build_tokenizer(vocabulary(SENTENCES))
    vision_steps, text_steps = (max(2, round(share * steps)) for steps in (VISION_STEPS, TEXT_STEPS))
    vision, tag_accuracy = pretrain_vision(scans["train"], scenes["validation"], steps=vision_steps, seed=seed, device=device)
    text, word_accuracy = pretrain_text(
        tokenizer, epochs=text_steps, seed=seed, device=device, sentences=SENTENCES, drawn=BATCH // 2
    )
    return SceneEncoders(vision, text, tokenizer, build_image_processor(), tag_accuracy, word_accuracy)


def save_encoders(encoders: SceneEncoders, folder: Path) -> None:
    """Save the encoders to `vision` and `text` in half precision, with image processor and tokenizer."""
    for name, model, companion in (
        ("vision", encoders.vision, encoders.image_processor),
        ("text", encoders.text, encoders.tokenizer),
    ):
        half: Any = copy.deepcopy(model).half()
        for part in (half, companion):
            part.save_pretrained(folder / name)


def load_encoders(folder: Path, device: torch.device) -> SceneEncoders:
    """Load encoders saved by `save_encoders`, in float32."""
    models = (
        kind.from_pretrained(folder / name, add_pooling_layer=False, dtype=torch.float32)
        for kind, name in ((ViTModel, "vision"), (BertModel, "text"))
    )
    vision, text = (freeze(nn.Module.to(model, device)).eval() for model in models)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "text")
    return SceneEncoders(vision, text, tokenizer, ViTImageProcessorPil.from_pretrained(folder / "vision"))
