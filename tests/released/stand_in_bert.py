"""A prompted BERT classifier with the parts and state-dict keys of the released code, implemented plainly.

Prompts are rows between [CLS] and the text, inserted before every layer and removed after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel


class Tokenizer:
    """Stand-in tokenizer; texts are rows of ids, padded with 0."""

    def __init__(self, padding_side: str = "right") -> None:
        self.padding_side = padding_side

    def __call__(self, texts: Tensor, **_: Any) -> Mapping[str, Tensor]:
        return {"input_ids": texts, "token_type_ids": torch.zeros_like(texts), "attention_mask": (texts != 0).long()}


class TextClassifier(nn.Module):
    def __init__(self, config: BertConfig, num_classes: int = 5, prompt_length: int = 4, use_prompt: bool = True) -> None:
        super().__init__()
        config._attn_implementation = "eager"
        self.bert_encoder, self.tokenizer = BertModel(config), Tokenizer()
        self.heads = nn.Linear(config.hidden_size, num_classes)
        self.use_prompt, self.prompt_length, self.prompt_vector = use_prompt, prompt_length, None
        layers = config.num_hidden_layers
        if use_prompt:
            self.prompt_depth, self.prompt_dropout = layers, nn.Dropout(0.1)
            self.prompt_vector = nn.Parameter(torch.empty(layers, prompt_length, config.hidden_size).uniform_(-0.3, 0.3))
            self.bert_encoder.requires_grad_(False)
        unused = [nn.Parameter(torch.empty(2, prompt_length, config.hidden_size).uniform_(-0.3, 0.3)) for _ in range(layers)]
        self.prompt_vectors = nn.ParameterList(unused)

    def forward(
        self,
        text_input: Tensor,
        return_features: bool = False,
        prompt_embeddings: Sequence[Tensor] | None = None,
        prompt_length_override: int | None = None,
        vision_embedding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        encoded = self.tokenizer(text_input)
        if not self.use_prompt:
            features = self.bert_encoder(**encoded).pooler_output
        else:
            x = self.bert_encoder.embeddings(encoded["input_ids"], encoded["token_type_ids"])
            length = prompt_length_override or self.prompt_length
            mask = nn.functional.pad(encoded["attention_mask"], (length, 0), value=1)[:, None, None].to(x.dtype)
            # If [CLS] is masked out, the mask of [CLS] is the one after the prompts.
            mask = torch.cat([mask[..., length : length + 1], mask[..., :length], mask[..., length + 1 :]], dim=-1)
            for i, layer in enumerate(self.bert_encoder.encoder.layer):
                if prompt_embeddings is None:
                    prompts = self.prompt_dropout(self.prompt_vector[i].repeat(len(x), 1, 1))
                elif vision_embedding is None:
                    prompts = self.prompt_dropout(prompt_embeddings[i])
                else:
                    mapped = self.prompt_dropout(vision_embedding)[:, None]
                    prompts = torch.cat([mapped, prompt_embeddings[i].squeeze(1)], dim=1)
                rows = layer(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1), (1 - mask) * -10000.0)
                x = torch.cat([rows[:, :1], rows[:, 1 + length :]], dim=1)
            features = x[:, 0]
        logits = self.heads(features)
        return (logits, features) if return_features else logits
