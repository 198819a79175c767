"""Load a checkpoint of the released code, compare its two modes, and save it as a model of this library.

    python examples/released_checkpoint.py last.ckpt --vision microsoft/swin-base-patch4-window7-224-in22k --text bert-base-uncased

The checkpoint contains prompts, routers and head; attention and MLPs come from the encoders. No code in the file is executed.
To accelerate a live model of the released code in place instead, call `mope.accelerate(model)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import BertModel, SwinModel

import mope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vision", required=True, help="folder or name of the Swin Transformer that it was trained with")
    parser.add_argument("--text", required=True, help="folder or name of the BERT that it was trained with")
    parser.add_argument("--out", type=Path, default=Path("converted"))
    options = parser.parse_args()

    vision = SwinModel.from_pretrained(options.vision, add_pooling_layer=False)
    text = BertModel.from_pretrained(options.text, add_pooling_layer=False)
    size, words = vision.config.image_size, text.config.vocab_size
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(2, 3, size, size), "input_ids": torch.randint(1, words, (2, 9))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    # "released" gives some windows the prompts of another image in the batch, like the code that trained the model; "instance"
    # gives each window the prompts of its own image.
    for mode in ("released", "instance"):
        model = mope.load_released_checkpoint(options.checkpoint, vision=vision, text=text, mode=mode)
        with model.serving() as predict:
            together = predict(**batch).logits
            alone = torch.cat([predict(**{name: t[i : i + 1] for name, t in batch.items()}).logits for i in range(2)])
        print(f"{mode}: logits in a batch and alone differ by {(together - alone).abs().max().item():.0e}")
        if mode == "instance":
            model.save_pretrained(options.out, backbones="copy")
            print(f"saved to {options.out}; load it with MoPEForClassification.from_pretrained")
        model.detach()


if __name__ == "__main__":
    main()
