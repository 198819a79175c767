from pathlib import Path
from typing import NamedTuple


class ExtensionStatus(NamedTuple):
    loaded: bool
    path: Path | None
    reason: str


STATUS = ExtensionStatus(False, None, "the C++ extension is not built")
