"""Partial predictions of each process, with a record of their origin, so that a stopped run can be resumed.

PREDICTIONS.parts/identity.json    model, file, options and number of processes
PREDICTIONS.parts/0.jsonl          predictions of the first process, one line per row
PREDICTIONS.about.json             origin and metrics of complete predictions
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import SEEK_END, TextIOWrapper
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from mope.files import write_text

# Number of consecutive rows assigned to one process.
CHUNK = 64

Identity = Mapping[str, Any]


class Parts:
    """Parts of one file of predictions.

    Args:
        out: File for the complete predictions.
        identity: Model, file and options that determine the predictions, by name.
        process: Rank of this process.
        processes: Number of processes.

    Raises:
        ValueError: Complete or partial predictions with another identity exist.
    """

    def __init__(self, out: Path, identity: Identity, *, process: int = 0, processes: int = 1) -> None:
        self.out, self.identity, self.process, self.processes = out, dict(identity), process, processes
        self.folder, self.about = out.with_name(f"{out.name}.parts"), out.with_name(f"{out.name}.about.json")
        self.complete = out.exists()
        if self.complete:
            self._compare(self.about, {}, f"{out} exists")
        elif self.folder.exists():
            self._compare(self.folder / "identity.json", {"processes": processes}, f"{self.folder} exists")

    def _compare(self, file: Path, more: Identity, what: str) -> None:
        advice = f"use another --out, or remove {self.out.name}*"
        try:
            before = json.loads(file.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{what}, but the record of its origin cannot be read ({error}): {advice}") from error
        now = self.identity | dict(more)
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            raise ValueError(f"{what}, but does not match this run's {' and '.join(changed)}: {advice}")

    def begin(self) -> None:
        """Create the folder and record the identity. Only the first process calls it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"identity": self.identity | {"processes": self.processes}}
        write_text(self.folder / "identity.json", json.dumps(identity, indent=2) + "\n")

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[str], int]]:
        """Open this process's part for appending; yield the stream and the number of lines already written.

        An incomplete last line is dropped.

        Raises:
            ValueError: Another process is still writing the part.
        """
        file = self._part(self.process)
        with file.open("a+b") as binary:
            _lock(binary, file)
            rows = kept = 0
            binary.seek(0)
            for line in binary:
                if not line.endswith(b"\n"):
                    break
                rows, kept = rows + 1, kept + len(line)
            binary.truncate(kept)
            with TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
                stream.seek(0, SEEK_END)
                yield stream, rows

    def is_mine(self, index: int) -> bool:
        """Return whether this process handles the row with an index (from 0)."""
        return index // CHUNK % self.processes == self.process

    def place(self, index: int) -> int:
        """Return how many of this process's rows come before one of its own, given by its index in the file."""
        return index // (CHUNK * self.processes) * CHUNK + index % CHUNK

    def merged(self) -> Iterator[dict[str, Any]]:
        """Yield the records of all processes, in the order of the file."""
        with ExitStack() as stack:
            parts = [stack.enter_context(self._part(i).open(encoding="utf-8", newline="\n")) for i in range(self.processes)]
            for chunk in count():
                lines = list(islice(parts[chunk % self.processes], CHUNK))
                if not lines:
                    return
                yield from map(json.loads, lines)

    def finish(self, found: Mapping[str, Any]) -> None:
        """Record the origin of the complete predictions, with `found`, next to them, and remove the parts."""
        write_text(self.about, json.dumps({"identity": self.identity, **found}, indent=2) + "\n")
        shutil.rmtree(self.folder)

    def _part(self, process: int) -> Path:
        return self.folder / f"{process}.jsonl"


def _lock(stream: IO[bytes], file: Path) -> None:
    """Lock a file against other processes, if the system supports it. The lock ends with the process."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file} is being written by another process, perhaps from an earlier run: end it first") from None
    # The file system does not support locks.
    except OSError:
        return
