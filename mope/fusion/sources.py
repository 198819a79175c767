"""Record where an encoder came from, so that it can be found from another directory or on another machine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def source_of(encoder: Any) -> str:
    """Return the source of an encoder: an absolute folder, a name on the hub, or "" if there is neither."""
    name = getattr(getattr(encoder, "config", None), "_name_or_path", "") or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def source_record(source: str, folder: Path) -> dict[str, str]:
    """Return the record of a source for a checkpoint in `folder`.

    If the source is a folder, its path relative to the checkpoint is recorded too, because both may move together.
    """
    if not Path(source).is_absolute():
        return {"source": source}
    return {"source": source, "folder": os.path.relpath(source, folder.resolve())}


def find_source(folder: Path, record: Mapping[str, Any], what: str, ask: str) -> tuple[str, bool]:
    """Return the source of an encoder that the checkpoint in `folder` does not hold, and whether it is a local folder.

    Args:
        folder: Folder of the checkpoint.
        record: Record written by `source_record`.
        what: Name of the encoder, for the error.
        ask: Advice to the user, for the error.

    Raises:
        FileNotFoundError: The encoder has no source, or its source is a folder that does not exist.
    """
    source = record["source"]
    if not source:
        raise FileNotFoundError(f"{folder} has no copy of {what}, which was not loaded from a file: {ask}")
    places = [(folder / record["folder"]).resolve()] if isinstance(record.get("folder"), str) else []
    places += [Path(source)] if Path(source).is_absolute() else []
    for place in places:
        if place.is_dir():
            return str(place), True
    if places:
        looked = " and ".join(dict.fromkeys(str(place) for place in places))
        raise FileNotFoundError(
            f"{folder} has no copy of {what}, and the folder that it was loaded from does not exist (looked for {looked}): "
            f"put it there, or {ask}. Saving with backbones='copy' keeps the encoders in the checkpoint"
        )
    return source, False


def warn_of_missing(what: str, source: str, argument: str) -> None:
    """Warn about what is needed to load a checkpoint that is saved without an encoder, unless the encoder is on the hub."""
    if source and not Path(source).is_absolute():
        return
    needed = f"the folder {source}, at this path or at the same place beside the checkpoint" if source else "the encoder itself"
    warnings.warn(
        f"this checkpoint does not hold {what}: to load it one needs {needed}, or passes it as "
        f"from_pretrained(..., {argument}=...). Save with backbones='copy' to keep it in the checkpoint",
        stacklevel=4,
    )
