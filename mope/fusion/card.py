"""Model card: the README.md of a saved model, which the hub displays."""

from __future__ import annotations

import html
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mope.printing import first_of

CARD = "README.md"
# Maximum number of class names to list.
SHOWN = 20
MARK = "<!-- written by mope on saving: remove this line to keep what you change -->"


def write_card(folder: Path, model: Any, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a model card that describes the model, its training data and accuracy, and how to load it.

    A failure to write it only causes a warning, because the checkpoint is complete without a card.

    Args:
        folder: Folder of the checkpoint. A card written by somebody else is not overwritten, and a symbolic link is not followed.
        model: Model that is saved.
        records: Records of its encoders by name, as in config.json.
    """
    file = folder / CARD
    try:
        if file.is_symlink() or (file.exists() and not _is_ours(file)):
            return
        # JSON may hold lone surrogates, which cannot be encoded.
        file.write_text("\n".join(_lines(model, records)) + "\n", encoding="utf-8", errors="replace")
    except OSError as error:
        warnings.warn(f"{file}: the model is saved, but its card could not be written ({error})", stacklevel=3)


def _is_ours(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    return not text or MARK in text


def _lines(model: Any, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    config, kind = model.config, type(model).__name__
    tags = dict.fromkeys(("mope", config.model_type, *sorted({slot.modality.name for slot in _slots(model)})))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = " and ".join(config.complementary)
    lines = ["---", "library_name: mope", "tags:", *(f"- {tag}" for tag in tags), "---", MARK, "", f"# {kind}", ""]
    lines += [f"Method `{config.method}`, main modality {config.main}{others and f', complementary {others}'}."]
    lines += [f"{trained:,} parameters train; the encoders {'are frozen' if not _trains(model) else 'train in part'}.", ""]
    lines += ["| encoder | class | from | dtype | fingerprint |", "|---|---|---|---|---|"]
    for name, record in records.items():
        source, copied = record["source"], record["stored"] == "copy"
        # If there is a copy, the path on the machine that saved the model is of no use to readers.
        where = "copied here" if copied and (not source or Path(source).is_absolute()) else _line(source) or "no name"
        lines += [f"| {name} | {record['class']} | {where} | {record['dtype']} | `{record['fingerprint'][:16]}` |"]
    names = [_line(config.id2label[i]) for i in range(config.num_labels)]
    lines += ["", f"{config.num_labels} classes ({config.problem_type}): {first_of(names, SHOWN, ', ')}.", ""]
    if model.card_data:
        lines += ["## Data and results", "", "```json", json.dumps(model.card_data, indent=2, default=str), "```", ""]
    else:
        lines += ["The training data and the accuracy are not recorded.", ""]
    given = "".join(f", {name}={name}" for name, record in records.items() if record["stored"] != "copy" and not record["source"])
    package = type(model).__module__.rpartition(".")[0]
    return [
        *lines,
        "## Loading",
        "",
        "```python",
        f"from {package} import {kind}",
        "",
        f'model = {kind}.from_pretrained("."{given})',
        "```",
    ]


def _slots(model: Any) -> list[Any]:
    from mope.modalities import slots_of

    return list(slots_of(model.config).values())


def _trains(model: Any) -> bool:
    return any(given.trains for given in model.given_encoders().values())


def _line(text: str) -> str:
    """Return a name as one line of plain text, with Markdown and HTML escaped so that it cannot break out of a table cell."""
    return re.sub(r"([\\`*_\[\]!|])", r"\\\1", html.escape(" ".join(str(text).split())))
