"""Run steps one after the other, each in its own process with its own time limit, so that failures stay isolated.

A step is forked from a process that has imported everything and never touched the device, so that imports run only once. It ends
when it returns, raises, is killed by a signal, or reaches its limit; then all processes that it started are killed too. It reports
the parts that it begins and their results through a pipe; only the parent stores them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Exit status of a step that lost the device.
DEVICE_LOST = 70
# Option of prctl: orphans of a step become children of this process, which then finds them.
PR_SET_CHILD_SUBREAPER = 36
# Seconds between checks whether a step has ended or reached its limit.
LOOK_AGAIN = 0.05

Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """Unit of work.

    run: function (channel for reports, remaining parts) that the process executes. It must report each part that it begins.
    limit: maximum seconds with the device.
    parts: names of its results. If the process dies, the part in progress has failed, and the others run in another process.
    beside: start immediately, concurrently with other steps, and request the device when ready, within `prepare` seconds.
    group: steps of the same group share the device.
    """

    name: str
    run: Callable[[Channel, Sequence[str]], None]
    limit: float
    parts: tuple[str, ...] = ()
    beside: bool = False
    prepare: float = 0.0
    group: str = ""


@dataclasses.dataclass
class Outcome:
    """Outcome of a process.

    parts: the requested parts. why: reason of the failure, or "". started: seconds until its first statement ran. device: seconds
    until the device responded, if reported. seconds: total time.
    """

    step: str
    parts: tuple[str, ...]
    why: str
    started: float
    device: float | None
    seconds: float


class Channel:
    """Channel from a step to its parent."""

    def __init__(self, reports: int, permission: int, has_device: bool) -> None:
        self._reports, self._permission, self._has_device = reports, permission, has_device

    def send(self, kind: str, **content: Any) -> None:
        os.write(self._reports, (json.dumps({"kind": kind, **content}) + "\n").encode())

    def begin(self, part: str) -> None:
        self.send("begin", part=part)

    def wait_for_device(self) -> None:
        """Block until no other step is measuring."""
        if not self._has_device:
            self.send("ready")
            os.read(self._permission, 1)
            self._has_device = True


@dataclasses.dataclass
class _Process:
    """Running step. deadline: time at which it is killed."""

    step: Step
    pid: int
    reports: int
    permission: int
    start: float
    deadline: float
    has_device: bool
    ready: bool = False
    buffer: bytes = b""
    begun: str = ""
    settled: list[str] = dataclasses.field(default_factory=list)
    why: str = ""
    started: float = 0.0
    device: float | None = None


class Runner:
    """Runner of steps.

    Args:
        on_event: Receives each result that a step reports, and {"kind": "failed", "part", "why"} for each failed part.
        on_end: Receives the outcome of each process.
        log: File that receives the output of steps.
        at_once: Maximum number of steps of a group that run at the same time.
    """

    def __init__(
        self,
        on_event: Callable[[Step, Event], None],
        on_end: Callable[[Outcome], None],
        log: Path,
        at_once: int = 8,
    ) -> None:
        self.on_event, self.on_end, self.log, self.at_once = on_event, on_end, log, at_once
        self._running: list[_Process] = []
        self._waiting: list[Step] = []
        self._strangers: set[int] = set()
        self._selector = selectors.DefaultSelector()

    def run(self, steps: Sequence[Step], until: float) -> list[Step]:
        """Run steps in order; a `beside` step waits at its turn until it is ready.

        Return the steps that did not finish by `until`, a `time.monotonic()` value.
        """
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._waiting, self._strangers = list(steps), _children(os.getpid())
        for step in [step for step in steps if step.beside]:
            self._start(step, has_device=False)
        try:
            while self._waiting or self._running:
                now = time.monotonic()
                if now >= until:
                    break
                for process in [p for p in self._running if now >= p.deadline]:
                    process.why = f"killed after {now - process.start:.0f} s, its limit"
                    self._end(process)
                self._give_the_device()
                self._listen()
            running = [process.step for process in self._running]
            return running + [step for step in self._waiting if step not in running]
        finally:
            for process in list(self._running):
                process.why = "cut off"
                self._forget(process)

    def _process_of(self, step: Step) -> _Process | None:
        return next((p for p in self._running if p.step is step), None)

    def _give_the_device(self) -> None:
        """Start the next step, or as many of its group as fit, or let a ready `beside` step continue."""
        have = [p for p in self._running if p.has_device]
        for step in list(self._waiting):
            process = self._process_of(step)
            joins = bool(step.group) and all(p.step.group == step.group for p in have) and len(have) < self.at_once
            if have and not joins:
                return
            if process is None and step.beside:
                # The step ended before its turn.
                self._waiting.remove(step)
            elif process is None:
                self._waiting.remove(step)
                have.append(self._start(step, has_device=True))
            elif process.ready:
                self._waiting.remove(step)
                process.has_device, process.deadline = True, time.monotonic() + step.limit
                os.write(process.permission, b"\n")
                have.append(process)

    def _start(self, step: Step, has_device: bool) -> _Process:
        from_child, reports = os.pipe()
        permission, to_child = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _become(step, Channel(reports, permission, has_device), self.log, start)
        os.close(reports)
        os.close(permission)
        deadline = start + (step.limit if has_device else step.prepare)
        os.set_blocking(from_child, False)
        process = _Process(step, pid, from_child, to_child, start, deadline, has_device)
        self._running.append(process)
        self._selector.register(from_child, selectors.EVENT_READ, process)
        return process

    def _listen(self) -> None:
        """Handle reports for up to LOOK_AGAIN seconds, then handle processes that have ended."""
        for key, _ in self._selector.select(LOOK_AGAIN):
            self._read(key.data)
        for process in list(self._running):
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                # Check the process, not the pipe: its children may hold the pipe open.
                self._read(process)
                self._end(process)

    def _read(self, process: _Process) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(process.reports, 1 << 16):
                *lines, process.buffer = (process.buffer + data).split(b"\n")
                for line in lines:
                    self._hear(process, json.loads(line))

    def _hear(self, process: _Process, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            process.started = event["seconds"]
        elif kind == "device":
            process.device = event["seconds"]
        elif kind == "ready":
            process.ready = True
        elif kind == "begin":
            process.begun = event["part"]
        elif kind == "error":
            process.why = event["why"]
        else:
            if "part" in event:
                process.settled.append(event["part"])
                process.begun = ""
            self.on_event(process.step, event)

    def _end(self, process: _Process) -> None:
        """Report the failed parts of an ended process, and queue its remaining parts for another process."""
        step, status = process.step, self._forget(process)
        why = process.why or _reason(status)
        seconds = time.monotonic() - process.start
        self.on_end(Outcome(step.name, step.parts, why, process.started, process.device, seconds))
        if step in self._waiting:
            self._waiting.remove(step)
        left = [part for part in step.parts if part not in process.settled]
        # If no part was in progress, the failure affects all parts.
        failed = [process.begun] if process.begun in left else left
        for part in failed:
            self.on_event(step, {"kind": "failed", "part": part, "why": why or "ended without a result"})
        if again := tuple(part for part in left if part not in failed):
            self._waiting.insert(0, dataclasses.replace(step, parts=again, beside=False))

    def _forget(self, process: _Process) -> int:
        """Kill a process and everything that it started, and return its status as from `os.waitpid`."""
        self._running.remove(process)
        self._selector.unregister(process.reports)
        family = _descendants(process.pid)
        # Kill its group first, to catch processes started meanwhile. It may have died before it created a group.
        with _already_gone():
            os.killpg(process.pid, signal.SIGKILL)
        for pid in (process.pid, *family):
            with _already_gone():
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(process.pid, 0)
        self._end_orphans()
        os.close(process.reports)
        os.close(process.permission)
        return status

    def _end_orphans(self) -> None:
        """Kill orphans: new children of this process that are not steps."""
        for pid in _children(os.getpid()) - self._strangers - {p.pid for p in self._running}:
            with _already_gone():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class _already_gone:
    """Ignore errors because a process to kill is gone or is not a child of this one."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ProcessLookupError | ChildProcessError)


def _become(step: Step, channel: Channel, log: Path, start: float) -> NoReturn:
    """Run a step in the process forked for it, and exit."""
    status = 1
    try:
        # Its own process group, so that it can be killed with all processes that it starts.
        os.setsid()
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        # On a crash, write the traceback to the log.
        faulthandler.enable(sys.stdout)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        channel.send("start", seconds=time.monotonic() - start)
        print(f"=== {step.name}", flush=True)
        step.run(channel, step.parts)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        channel.send("error", why=f"{type(error).__name__}: {lines[0][:200]}")
        status = DEVICE_LOST if type(error).__name__ == "AcceleratorError" else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Skip exit handlers of the parent and of the device, which may hang.
        os._exit(status)


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code else ""


def _children(pid: int) -> set[int]:
    """Return the children of a process on Linux, and none on other systems."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The process name before the last ")" may contain any characters.
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == pid:
            found.add(int(stat.parent.name))
    return found


def _descendants(pid: int) -> set[int]:
    found, new = set[int](), {pid}
    while new:
        new = {child for parent in new for child in _children(parent)} - found
        found |= new
    return found
