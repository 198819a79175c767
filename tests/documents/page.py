"""Run the blocks of a Markdown page, both Python and shell, in order in one namespace and one folder.

bash reads the shell blocks, with functions in place of the commands to record the calls, which are then made in this process,
where torch is already imported. (Libraries that run Markdown make each block a test, which pytest-xdist may run in any order.)
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

LANGUAGES = ("python", "sh", "text", "json")
# Reasons for not running a block on the page, as in ```sh not-run="needs a network". The only other reason is
# "tested by tests/x.py", for a test that does what the block shows.
REASONS = ("needs a network", "needs a GPU", "needs several GPUs")
_FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"(\d+\.\d+)")
_NOT_RUN = re.compile(r' not-run="([^"]+)"')

Tool = Callable[[list[str]], None]


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the number of its first line, `not_run` the page's reason for not running it."""

    language: str
    code: str
    line: int
    not_run: str | None
    info: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and not self.not_run


def blocks(text: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        language, info, code = match.groups()
        reason = _NOT_RUN.fullmatch(info)
        found.append(Block(language, code, text[: match.start(3)].count("\n") + 1, reason and reason[1], info))
    return found


def run(path: Path, tools: Mapping[str, Tool], scope: dict[str, Any]) -> int:
    """Run every block of a page in the current folder, and return their number.

    A text block directly after a Python block must match the output of that block.

    Args:
        path: the page.
        tools: commands that shell blocks may call, by name; each is called with its arguments.
        scope: names that the page attributes to the reader's own code.
    """
    count, printed = 0, None
    for block in blocks(path.read_text()):
        where = f"{path.name}:{block.line}"
        if block.language == "text" and printed is not None:
            assert _alike(printed, block.code), f"{where}: {printed}"
        printed = None
        if not block.runs:
            continue
        try:
            if block.language == "python":
                out = StringIO()
                with redirect_stdout(out):
                    # Line numbers in tracebacks are those of the page.
                    exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), scope)
                printed = out.getvalue()
            else:
                for name, arguments in commands(block.code, list(tools)):
                    tools[name](arguments)
        except Exception as error:
            error.add_note(f"in the block at {where}")
            raise
        count += 1
    return count


def _alike(printed: str, said: str) -> bool:
    """Return whether the words are equal; the last digit of numbers may be rounded differently on another processor."""
    words, numbers = ([split[start::2] for split in (_NUMBER.split(printed), _NUMBER.split(said))] for start in (0, 1))
    return words[0] == words[1] and all(abs(float(a) - float(b)) < 0.011 for a, b in zip(*numbers, strict=True))


def commands(code: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """Let bash read a block, and return the calls of `names` in it, with their arguments."""
    functions = "".join(f'{name}() {{ printf "%s\\0" {name} "$#" "$@"; }}\n' for name in names)
    # Without a search path, commands other than our functions are not found.
    bash = shutil.which("bash")
    done = subprocess.run([str(bash), "-eu", "-c", functions + code], capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0 and not done.stderr, done.stderr
    found, rest = [], done.stdout.split("\0")[:-1]
    while rest:
        end = 2 + int(rest[1])
        found.append((rest[0], rest[2:end]))
        rest = rest[end:]
    return found
