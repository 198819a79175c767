"""A step cannot affect other steps, however it ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench.steps import Channel, Runner, Step

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="steps need fork")


class Notebook:
    """Records the events that the parent receives."""

    def __init__(self, log):
        self.rows, self.failed, self.ended = [], {}, []
        self.runner = Runner(self.on_event, self.ended.append, log, at_once=3)

    def on_event(self, step, event):
        if event["kind"] == "failed":
            self.failed[step.name, event["part"]] = event["why"]
        else:
            self.rows.append((step.name, event["part"], event["value"]))

    def run(self, *steps, seconds=60.0):
        return self.runner.run(steps, time.monotonic() + seconds)

    def why(self, step):
        return [outcome.why for outcome in self.ended if outcome.step == step]


@pytest.fixture
def notebook(tmp_path):
    return Notebook(tmp_path / "log")


def report(channel: Channel, part: str) -> None:
    channel.begin(part)
    channel.send("row", part=part, value=os.getpid())


def work(channel, parts, bad=None):
    """Report each part, but call `bad` at the part "bad"."""
    for part in parts:
        channel.begin(part)
        if part == "bad":
            bad()
        channel.send("row", part=part, value=os.getpid())


def hang():
    while True:
        time.sleep(1)


def lose_the_device():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def exhaust_the_host():
    torch.empty(1 << 60, dtype=torch.uint8)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


ENDS = {
    "aborts": (os.abort, "SIGABRT"),
    "is killed": (segfault, "SIGSEGV"),
    "hangs": (hang, "its limit"),
    "loses the device": (lose_the_device, "AcceleratorError: CUDA error: an illegal memory access"),
    "has no memory": (run_out_of_memory, "OutOfMemoryError: CUDA out of memory"),
    "has no memory on the host": (exhaust_the_host, "allocate"),
    "leaves": (leave, "exit status 3"),
}


def test_whatever_becomes_of_a_part_the_others_are_whole(notebook):
    """Check earlier and later parts of the same step, and the steps before and after it."""
    steps = [Step("before", work, 60, ("a", "b"))]
    for name, (bad, _) in ENDS.items():
        steps.append(Step(name, functools.partial(work, bad=bad), 2 if bad is hang else 60, ("first", "bad", "last")))
    steps.append(Step("after", work, 60, ("a",)))
    assert notebook.run(*steps) == []
    assert {(step, part) for step, part, _ in notebook.rows} == {
        *(("before", "a"), ("before", "b"), ("after", "a")),
        *((name, part) for name in ENDS for part in ("first", "last")),
    }
    assert notebook.failed.keys() == {(name, "bad") for name in ENDS}
    for name, (_, why) in ENDS.items():
        assert why in notebook.failed[name, "bad"]
        # The remaining parts ran in another process.
        pids = {part: pid for step, part, pid in notebook.rows if step == name}
        assert pids["first"] != pids["last"] and len(notebook.why(name)) == 2 and notebook.why(name)[1] == ""


def test_what_fails_before_a_part_was_begun_fails_for_all_of_them_once(notebook):
    def build(channel, parts):
        raise ValueError("no such shape")

    notebook.run(Step("built", build, 60, ("a", "b")), Step("after", work, 60, ("c",)))
    assert notebook.failed == dict.fromkeys((("built", "a"), ("built", "b")), "ValueError: no such shape")
    assert len(notebook.why("built")) == 1 and len(notebook.rows) == 1


def test_a_part_that_is_never_reported_has_failed(notebook):
    notebook.run(Step("silent", lambda channel, parts: None, 60, ("a",)))
    assert notebook.failed == {("silent", "a"): "ended without a result"}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start_something(channel, parts, end):
    """Start a process in the step's group, one in its own session, and one whose parent has ended."""
    forever = [sys.executable, "-c", "import time\nwhile True: time.sleep(1)"]
    pids = [subprocess.Popen(forever).pid, subprocess.Popen(forever, start_new_session=True).pid]
    orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=subprocess.DEVNULL).pid)"
    done = subprocess.run([sys.executable, "-c", orphan, *forever], stdout=subprocess.PIPE, text=True, check=True)
    pids.append(int(done.stdout))
    for pid in pids:
        channel.send("row", part=str(pid), value=pid)
    end()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to find child processes")
@pytest.mark.parametrize("end", [lambda: None, os.abort, hang], ids=["returns", "aborts", "hangs"])
def test_what_a_step_started_ends_with_it(notebook, end):
    notebook.run(Step("parent", functools.partial(start_something, end=end), 5))
    started = [pid for *_, pid in notebook.rows]
    assert len(started) == 3 and not any(map(is_alive, started))


def test_a_step_beside_others_measures_after_them_though_it_began_before(notebook):
    def compile_and_measure(channel, parts):
        channel.begin("compiled")
        channel.send("row", part="compiled", value=0)
        channel.wait_for_device()
        report(channel, "measured")

    steps = (
        Step("first", work, 60, ("a",)),
        Step("beside", compile_and_measure, 60, ("compiled", "measured"), beside=True, prepare=60),
        Step("last", work, 60, ("b",)),
    )
    assert notebook.run(*steps) == []
    order = [part for _, part, _ in notebook.rows]
    assert order.index("compiled") < order.index("measured") > order.index("a") and "b" in order and notebook.failed == {}


def test_a_step_that_dies_beside_others_costs_itself(notebook):
    bad = Step("beside", functools.partial(work, bad=os.abort), 60, ("bad", "good"), beside=True, prepare=60)
    slow = Step("slow", functools.partial(work, bad=hang), 60, ("bad",), beside=True, prepare=1)
    notebook.run(Step("first", work, 60, ("a",)), bad, slow, Step("last", work, 60, ("b",)))
    assert {part for _, part, _ in notebook.rows} == {"a", "b", "good"}
    assert notebook.failed.keys() == {("beside", "bad"), ("slow", "bad")}


def test_steps_of_a_group_run_at_the_same_time_and_no_other_beside_them(notebook, tmp_path):
    """Each member waits for the others; the next step checks that none of them is still running."""

    def meet(channel, parts):
        (tmp_path / parts[0]).touch()
        while len(list(tmp_path.glob("*member*"))) < 3:
            time.sleep(0.01)
        report(channel, parts[0])
        (tmp_path / parts[0]).rename(tmp_path / f"gone {parts[0]}")

    def look(channel, parts):
        channel.begin("alone")
        channel.send("row", part="alone", value=len(list(tmp_path.glob("member*"))))

    # The members wait until all three are running, so they cannot run one after another.
    members = [Step(f"member {i}", meet, 60, (f"member {i}",), group="g") for i in range(3)]
    notebook.run(*members, Step("alone", look, 60, ("alone",)))
    assert len(notebook.rows) == 4 and notebook.rows[-1] == ("alone", "alone", 0)


def test_when_time_is_up_it_says_what_was_left(notebook):
    left = notebook.run(
        Step("hangs", functools.partial(work, bad=hang), 60, ("a", "bad")), Step("next", work, 60, ("b",)), seconds=2
    )
    assert [step.name for step in left] == ["hangs", "next"]
    # Finished parts remain; an interrupted one has not failed.
    assert [part for _, part, _ in notebook.rows] == ["a"] and notebook.failed == {}


def test_what_steps_print_is_kept(notebook, tmp_path):
    notebook.run(Step("talks", lambda channel, parts: print("some words"), 60))
    assert "=== talks\nsome words\n" in (tmp_path / "log").read_text()
