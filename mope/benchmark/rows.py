"""Result files: a header, then one JSON line for each row, which is appended as soon as it is measured so that nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from mope import environment
from mope_kernels import _extension

ROOT = Path(__file__).resolve().parents[2]


def header(device: torch.device) -> dict[str, Any]:
    """Return what all rows of a file have in common: device, versions and sources."""
    return {
        "device": environment.device_name(device) + (f", {lower} only" if (lower := lower_target(device)) else ""),
        "slug": slug(device),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "extension": _extension.STATUS.target or _extension.STATUS.reason,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "sources": sources("mope", "mope_kernels", "csrc"),
    }


def sources(*folders: str) -> str:
    """Return a digest of the sources in folders.

    Unlike a commit, it is known without git, covers uncommitted changes, and ignores changes of other files.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def slug(device: torch.device) -> str:
    """Return the device's name in a form for file names."""
    if device.type == "cuda":
        return re.sub(r"[^A-Za-z0-9.]+", "-", torch.cuda.get_device_name(device))
    threads, lower = torch.get_num_threads(), lower_target(device)
    return f"cpu-{threads}-thread{'s' if threads > 1 else ''}{f'-{lower}' if lower else ''}"


def lower_target(device: torch.device) -> str:
    """Return the instruction set that MOPE_CPU_TARGET restricts the C++ kernels to, or "" if it is not set."""
    return os.environ.get("MOPE_CPU_TARGET", "") if device.type == "cpu" else ""


class Rows:
    """The rows of one file, including those of earlier runs, which come first.

    A file with the same header is continued. A file with another header is renamed to `<name>.old`. The comparison ignores the
    values that `begin` adds, which keep their first values, and the commit, because the digest of the sources is more precise.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.header = json.loads(json.dumps(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found, rows = read(path)
            if all(found.get(name) == value for name, value in self.header.items() if name != "commit"):
                self.header, self.rows = found, rows
                # Rewrite the file without a line that was only partly written.
                path.write_text("".join(json.dumps(line) + "\n" for line in (found, *rows)))
            else:
                path.rename(path.with_name(path.name + ".old"))

    def begin(self, **measured: Any) -> None:
        """Write the header unless the file has one. `measured`: values that take time to measure, added to the header."""
        if not self.path.exists():
            self.header |= measured
            self._append(self.header)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. It replaces failed rows with the same key."""
        self.begin()
        self.rows = [r for r in self.rows if "failed" not in r or key_of(r) != key_of(row)]
        self.rows.append(row)
        self._append(row)

    def has(self, **key: Any) -> bool:
        """Return whether there is a row with these values that did not fail."""
        return any(key.items() <= row.items() and "failed" not in row for row in self.rows)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of a row. A failed row is ignored if a later row has the same key."""
    return tuple(row.get(name) for name in ("op", "case", "way", "test", "step"))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the rows, without failed ones that were tried again.

    The last line is dropped if it is incomplete because the writer was killed.
    """
    header: dict[str, Any] = {}
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True)):
        if not line.endswith("\n"):
            break
        if number == 0:
            header = json.loads(line)
        else:
            rows.append(json.loads(line))
    last = {key_of(row): number for number, row in enumerate(rows)}
    return header, [row for number, row in enumerate(rows) if "failed" not in row or last[key_of(row)] == number]
