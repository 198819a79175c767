"""Train on your own images, texts and labels with transformers' Trainer.

The folder contains train.jsonl and dev.jsonl with lines such as {"image": "images/1.png", "text": "a sentence", "label": "yes"}:

    python examples/train_your_data.py my_data --vision google/vit-base-patch16-224-in21k --text bert-base-uncased

Without arguments, the script writes a small data folder and uses small encoders.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

from mope import MoPEConfig, MoPEForClassification
from mope.data import Collator, Examples, read_split
from mope.demo.export import export


def main() -> None:
    options = arguments()
    data, out = options.data, options.out
    if data is None:
        data = out / "data"
        export(data)
    vision, text = options.vision or data / "vision", options.text or data / "text"

    splits = {name: read_split(data, "jsonl", name) for name in ("train", "dev")}
    config = MoPEConfig(
        id2label=splits["train"].names, num_experts=options.experts, temperature=1.0, problem_type=splits["train"].problem_type
    )
    model = MoPEForClassification(config, vision=AutoModel.from_pretrained(vision), text=AutoModel.from_pretrained(text))
    model.image_processor = AutoImageProcessor.from_pretrained(vision)
    model.tokenizer = AutoTokenizer.from_pretrained(text)
    model.print_trainable_parameters()

    items = {name: Examples(split, model) for name, split in splits.items()}
    training = TrainingArguments(
        str(out / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(model, training, Collator(model), items["train"], items["dev"], compute_metrics=accuracy)
    trainer.train()
    print("best accuracy on dev:", trainer.evaluate()["eval_accuracy"])

    model.save_pretrained(out / "model", backbones="copy")
    model = MoPEForClassification.from_pretrained(out / "model")
    batch = Collator(model)([items["dev"][i] for i in range(4)])
    batch.pop("labels")
    with model.serving() as predict:
        answers = predict(**batch).logits.argmax(-1)
    print("predictions for the first four of dev:", [config.id2label[i] for i in answers.tolist()])


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Compute the accuracy of predictions."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--vision", help="folder of the vision encoder, or its name on the hub")
    parser.add_argument("--text", help="folder of the text encoder, or its name on the hub")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "mope_train_your_data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
