"""Two small transformers models, each trained on its own modality, then frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

from mope.demo.data import Digits, facts, to_pixel_values, vocabulary
from mope.finite import NotFiniteError

Module = TypeVar("Module", bound=nn.Module)

WIDTH, HEADS, VISION_LAYERS, TEXT_LAYERS = 64, 4, 4, 2
MASKED_SHARE = 0.15
PIXEL_NOISE = 0.1


@dataclass(frozen=True)
class Backbones:
    """Frozen encoders, with the accuracy of each on what it was trained for."""

    vision: ViTModel
    text: BertModel
    tokenizer: PreTrainedTokenizerFast
    image_processor: ViTImageProcessorPil
    digit_accuracy: float
    word_accuracy: float


def build_tokenizer(known: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Give each known word a token, by default each word of the training sentences; everything else is [UNK]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + list(vocabulary(facts()) if known is None else known)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_image_processor() -> ViTImageProcessorPil:
    """Build a processor that does the same as `to_pixel_values`, for scans (8,8,1) from 0 to 16."""
    return ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5])


def build_vision() -> ViTModel:
    """Build a ViT for a grey 8 x 8 image: 16 patches of 2 x 2, and [CLS]."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
    )
    return ViTModel(config, add_pooling_layer=False)


def build_text(vocabulary_size: int, layers: int = TEXT_LAYERS) -> BertModel:
    """Build a BERT without dropout for sentences of at most 14 words."""
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=16,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Shift half of the scans (N,1,8,8) by at most one pixel in each direction, and add noise to all."""
    count = len(pixel_values)
    windows = F.pad(pixel_values, (1, 1, 1, 1), value=-1.0).unfold(2, 8, 1).unfold(3, 8, 1)
    moves = torch.rand(count, generator=generator) < 0.5
    down, right = torch.where(moves, torch.randint(0, 3, (2, count), generator=generator), 1)
    moved = windows[torch.arange(count), :, down, right]
    return moved + PIXEL_NOISE * torch.randn(moved.shape, generator=generator)


def optimize(
    parameters: list[nn.Parameter],
    loss_of_batch: Callable[[Tensor], Tensor],
    size: int,
    *,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
    title: str,
    batch_size: int = 64,
    clip: float | None = None,
) -> None:
    """Train by AdamW over shuffled batches of indices, with a warm-up and a cosine to zero; `clip` bounds the gradient's norm."""
    steps = epochs * -(-size // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1)
    with tqdm(total=steps, desc=title) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(size, generator=generator).split(batch_size):
                loss = loss_of_batch(batch)
                optimizer.zero_grad()
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                if not math.isfinite(now := loss.item()):
                    raise NotFiniteError(f"{title}: loss is not finite at step {bar.n + 1}; lower the learning rate")
                bar.set_postfix(loss=f"{now:.3f}", refresh=False)
                bar.update()


def pretrain_vision(splits: dict[str, Digits], *, epochs: int, seed: int, device: torch.device) -> tuple[ViTModel, float]:
    """Train on the ten classes of the training scans -> the encoder, and its accuracy on the validation scans.

    One head reads the class off [CLS] after each of the last three blocks: an encoder that knows the digit only at its very end has
    nothing to compare with a sentence before that.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vision, head = build_vision(), nn.Linear(WIDTH, 10, device=device)
    nn.Module.to(vision, device)
    pixels, classes = to_pixel_values(splits["train"].pixels), torch.from_numpy(splits["train"].classes)

    def classify(pixel_values: Tensor) -> list[Tensor]:
        output = vision(pixel_values=pixel_values.to(device), output_hidden_states=True)
        earlier = [vision.layernorm(states[:, 0]) for states in output.hidden_states[2:VISION_LAYERS]]
        return [head(states) for states in (*earlier, output.last_hidden_state[:, 0])]

    def loss_of_batch(batch: Tensor) -> Tensor:
        truth = classes[batch].to(device)
        return torch.stack([F.cross_entropy(scores, truth) for scores in classify(augment(pixels[batch], generator))]).mean()

    parameters = [*vision.parameters(), *head.parameters()]
    optimize(
        parameters, loss_of_batch, len(pixels), epochs=epochs, learning_rate=2e-3, generator=generator, title="ViT: digit classes"
    )
    vision.eval()
    with torch.no_grad():
        answers = classify(to_pixel_values(splits["validation"].pixels))[-1].argmax(-1).cpu().numpy()
    return freeze(vision), float((answers == splits["validation"].classes).mean())


def pretrain_text(
    tokenizer: PreTrainedTokenizerFast,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    layers: int = TEXT_LAYERS,
    sentences: Sequence[str] | None = None,
    drawn: int | None = None,
) -> tuple[BertModel, float]:
    """Train to predict masked words; return the encoder and its accuracy on masked words of the same sentences.

    A masked word is predicted from its own last state, and every word also from the last state of [CLS] and its position. Masked
    words alone would teach [CLS] nothing about the sentence, and [CLS] is all that a fusion model uses.

    Args:
        tokenizer: Splits sentences into words.
        epochs: Passes over the sentences, or steps with `drawn`.
        seed: Seed of the weights, the order and the masks.
        device: Device to train on.
        layers: Layers of the encoder.
        sentences: Sentences to train on, by default `facts()`.
        drawn: Number of sentences to draw at random in each step. By default, each pass takes all sentences in batches.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    text = build_text(len(tokenizer), layers)
    nn.Module.to(text, device)
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, len(tokenizer))).to(device)
    positions = nn.Embedding(text.config.max_position_embeddings, WIDTH).to(device)
    encoded = tokenizer(list(facts() if sentences is None else sentences), padding=True, return_tensors="pt")
    words, attention_mask = encoded["input_ids"], encoded["attention_mask"]
    is_word = attention_mask.bool() & (words != tokenizer.cls_token_id) & (words != tokenizer.sep_token_id)

    def predict(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of the masked words, scores of all words from [CLS], and the mask (B,L)."""
        masked = is_word[batch] & (torch.rand(words[batch].shape, generator=generator) < MASKED_SHARE)
        # At least one word of each sentence: all have a second one.
        masked[:, 2] |= ~masked.any(1)
        read = words[batch].masked_fill(masked, tokenizer.mask_token_id)
        states = text(input_ids=read.to(device), attention_mask=attention_mask[batch].to(device)).last_hidden_state
        from_summary = states[:, :1] + positions.weight[: states.shape[1]]
        return head(states[masked.to(device)]), head(from_summary[is_word[batch].to(device)]), masked

    def loss_of_batch(batch: Tensor) -> Tensor:
        if drawn is not None:
            batch = torch.randint(len(words), (drawn,), generator=generator)
        masked_scores, all_scores, masked = predict(batch)
        truth = torch.cat([words[batch][masked], words[batch][is_word[batch]]])
        return F.cross_entropy(torch.cat([masked_scores, all_scores]), truth.to(device))

    parameters = [*text.parameters(), *head.parameters(), *positions.parameters()]
    optimize(
        parameters,
        loss_of_batch,
        len(words) if drawn is None else 1,
        epochs=epochs,
        learning_rate=2e-3,
        generator=generator,
        title="BERT: masked words",
        batch_size=128,
    )
    text.eval()
    with torch.no_grad():
        scores, _, masked = predict(torch.arange(len(words)))
    return freeze(text), float((scores.argmax(-1).cpu() == words[masked]).float().mean())


def freeze(module: Module) -> Module:
    """Turn off gradients for all parameters of a module."""
    return module.requires_grad_(False)


def pretrain(
    splits: dict[str, Digits],
    *,
    vision_epochs: int,
    text_epochs: int,
    seed: int,
    device: torch.device,
    text_layers: int = TEXT_LAYERS,
) -> Backbones:
    """Train both encoders and build the tokenizer, from the training split alone."""
    tokenizer = build_tokenizer()
    vision, digit_accuracy = pretrain_vision(splits, epochs=vision_epochs, seed=seed, device=device)
    text, word_accuracy = pretrain_text(tokenizer, epochs=text_epochs, seed=seed, device=device, layers=text_layers)
    return Backbones(vision, text, tokenizer, build_image_processor(), digit_accuracy, word_accuracy)
