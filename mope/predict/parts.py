"""Files that each process has written so far, with a record of their origin, so that a stopped run can continue them.

PREDICTIONS.parts/identity.json    model, file, options and number of processes
PREDICTIONS.parts/0.jsonl          of the first process, a line for each of its rows
PREDICTIONS.about.json             beside complete predictions
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

# Rows that follow each other in one part.
CHUNK = 64

Identity = Mapping[str, Any]


class Parts:
    """The parts of one file of predictions.

    Args:
        out: the file.
        identity: what the predictions follow from, by name.
        process, processes: rank and world size.

    Raises:
        ValueError: there are predictions, complete or not, of something else.
    """

    def __init__(self, out: Path, identity: Identity, *, process: int = 0, processes: int = 1) -> None:
        self.out, self.identity, self.process, self.processes = out, dict(identity), process, processes
        self.folder, self.about = out.with_name(f"{out.name}.parts"), out.with_name(f"{out.name}.about.json")
        self.complete = out.exists()
        if self.complete:
            self._compare(self.about, {}, f"{out} exists")
        elif self.folder.exists():
            self._compare(self.folder / "identity.json", {"processes": processes}, f"{self.folder} was begun")

    def _compare(self, file: Path, more: Identity, what: str) -> None:
        advice = f"take another --out, or remove {self.out.name}*"
        try:
            before = json.loads(file.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{what}, and nothing says what it was made of ({error}): {advice}") from error
        now = self.identity | dict(more)
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            raise ValueError(f"{what} with another {' and another '.join(changed)}: {advice}")

    def begin(self) -> None:
        """Make the folder; the first process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"identity": self.identity | {"processes": self.processes}}
        write_text(self.folder / "identity.json", json.dumps(identity, indent=2) + "\n")

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[str], int]]:
        """Open the part of this process -> a stream, to write behind what it has, and how many lines that are.

        A half-written last line is dropped.

        Raises:
            ValueError: a process that was left over still writes.
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
        """Return whether a row, by its index from 0, is for this process."""
        return index // CHUNK % self.processes == self.process

    def place(self, index: int) -> int:
        """Return how many rows this process has in front of one of its own."""
        return index // (CHUNK * self.processes) * CHUNK + index % CHUNK

    def merged(self) -> Iterator[dict[str, Any]]:
        """Yield what all processes have written, in the order of the file."""
        with ExitStack() as stack:
            parts = [stack.enter_context(self._part(i).open(encoding="utf-8", newline="\n")) for i in range(self.processes)]
            for chunk in count():
                lines = list(islice(parts[chunk % self.processes], CHUNK))
                if not lines:
                    return
                yield from map(json.loads, lines)

    def finish(self, found: Mapping[str, Any]) -> None:
        """Say beside the predictions what they are of, and remove the parts."""
        write_text(self.about, json.dumps({"identity": self.identity, **found}, indent=2) + "\n")
        shutil.rmtree(self.folder)

    def _part(self, process: int) -> Path:
        return self.folder / f"{process}.jsonl"


def _lock(stream: IO[bytes], file: Path) -> None:
    """Let no other process write, where the system has such locks; they end with the process."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file} is being written by another process, perhaps one that was left over: end it first") from None
    # Of file systems without locks.
    except OSError:
        return
