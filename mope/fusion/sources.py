"""Record where an encoder came from, so that it is found from another directory or on another machine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def source_of(encoder: Any) -> str:
    """Return where an encoder was loaded from: an absolute folder, a name on the hub, or "" if it came from neither."""
    name = getattr(getattr(encoder, "config", None), "_name_or_path", "") or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def source_record(source: str, folder: Path) -> dict[str, str]:
    """Return what a checkpoint in `folder` says of a source; of a folder also the way from there, as both may move together."""
    if not Path(source).is_absolute():
        return {"source": source}
    return {"source": source, "folder": os.path.relpath(source, folder.resolve())}


def find_source(folder: Path, record: Mapping[str, Any], what: str, ask: str) -> tuple[str, bool]:
    """Return the source of an encoder that the checkpoint in `folder` does not hold, and whether it is a folder here.

    Args:
        folder: of the checkpoint.
        record: what `source_record` wrote.
        what: the encoder, for an error.
        ask: what else the user can do, for an error.

    Raises:
        FileNotFoundError: the encoder came from nowhere, or from a folder that is not here.
    """
    source = record["source"]
    if not source:
        raise FileNotFoundError(f"{folder} has no copy of {what}, which came from no file: {ask}")
    places = [(folder / record["folder"]).resolve()] if isinstance(record.get("folder"), str) else []
    places += [Path(source)] if Path(source).is_absolute() else []
    for place in places:
        if place.is_dir():
            return str(place), True
    if places:
        looked = " and ".join(dict.fromkeys(str(place) for place in places))
        raise FileNotFoundError(
            f"{folder} has no copy of {what}, and the folder that it was loaded from is not here (looked for {looked}): "
            f"put it there, or {ask}. Saving with backbones='copy' keeps the encoders in the checkpoint"
        )
    return source, False


def warn_of_missing(what: str, source: str, argument: str) -> None:
    """Tell whoever saves a checkpoint without an encoder what another person will need, unless that is on the hub."""
    if source and not Path(source).is_absolute():
        return
    needed = f"the folder {source}, at this path or at the same place beside the checkpoint" if source else "the encoder itself"
    warnings.warn(
        f"this checkpoint does not hold {what}: to load it one needs {needed}, or gives it as "
        f"from_pretrained(..., {argument}=...). Save with backbones='copy' to keep it in the checkpoint",
        stacklevel=4,
    )
