"""Run the first stage of `make gpu`: the most informative numbers first, in less than seven minutes.

Each step (`bench.steps`) reports its rows as soon as they are ready; they go into the files that the other stages continue. Failed
rows are stored as such and retried by the next call. After each step headline-<device>.md is updated: which targets are met, what
failed, and why.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mope.benchmark import problems, rows, show
from mope.benchmark.baselines import Unavailable
from mope.benchmark.cases import Case
from mope.benchmark.measure import Ceilings, Clock, Failed, WrongResult, check, measure, reason
from mope_kernels.impl import HAS_TRITON

from . import cache, plan, targets, timeline
from .steps import Channel, Event, Outcome, Runner, Step

DTYPES = (torch.bfloat16, torch.float32)
# Seconds for the timing rounds of a row.
SECONDS, DRY_SECONDS = 0.3, 0.02
# Blocks of a model are compiled one by one; beyond this many, torch runs the rest uncompiled.
RECOMPILE_LIMIT = 256
# Compiler threads for each opponent that is compiled concurrently with other steps.
COMPILE_THREADS = 4
# Source files of the Triton kernels.
KERNELS = [
    path for path in sorted((rows.ROOT / "mope_kernels").glob("*_details/_[!_]*.py")) if path.stem not in ("_launch", "_libraries")
]
# Exit status on a machine without a GPU.
NO_DEVICE = 2
COLD_START = {True: "tiny-swin", False: "swin-b+bert-base-b16"}
PAGE = """\
# The headline: {device}

{date}, commit {commit}, sources {sources}; {versions}. Copies ran at {copy} GB/s, products at {products}.

{targets}

{failed}

## Steps

{steps}
"""


def import_everything() -> None:
    """Import the modules that steps need, so that forked steps have them.

    Nothing here may query the number of GPUs, because a process that has done so cannot fork one that uses a GPU.
    """
    names = ["torch._dynamo", "torch._inductor.config", "transformers"]
    if HAS_TRITON:
        names += ["triton", *(f"mope_kernels.{path.parent.name}.{path.stem}" for path in KERNELS)]
    for name in names:
        importlib.import_module(name)


class Headline:
    """Single run of the headline stage.

    Args:
        out: Folder of the results.
        dry: Do a dry run on the CPU, with small cases.
        cache_folder: Triton's cache, filled earlier or by the first step.
        take_over: Function (slug of a device, digest of the sources) that copies existing results into `out`.
    """

    def __init__(self, out: Path, dry: bool, cache_folder: Path, take_over: Callable[[str, str], None]) -> None:
        self.out, self.dry, self.cache_folder, self.take_over = out, dry, cache_folder, take_over
        self.device = torch.device("cpu" if dry else "cuda")
        self.arch, self.slug = "sm_90", "dry"
        self.is_absent = False
        self.header: dict[str, Any] = {}
        self.files: dict[str, rows.Rows] = {}
        self.ceilings: dict[str, Any] = {}
        self.ended: list[Outcome] = []
        self.notes: list[str] = []
        self.log = out / "gpu.log"

    def run(self, seconds: float) -> int:
        """Run everything that has no result yet, for at most `seconds`, and return the exit status."""
        until = time.monotonic() + seconds
        self.log.unlink(missing_ok=True)
        begun = time.monotonic()
        import_everything()
        print(f"imports: {time.monotonic() - begun:.1f} s, once for all steps", flush=True)
        runner = Runner(self.on_event, self.on_end, self.log)
        runner.run([Step("device", self.look, 60)], until)
        if self.is_absent:
            return NO_DEVICE
        if not self.header:
            print(f"make gpu: the device does not respond: {self.ended[-1].why}; see {self.log}", file=sys.stderr)
            return 1
        self.take_over(self.slug, self.header["sources"])
        for stage in ("smoke", "ops", "model"):
            self.files[stage] = rows.Rows(self.out / f"{stage}-{self.slug}.jsonl", {"stage": stage} | self.header)
        self.ceilings = next((file.header["ceilings"] for file in self.files.values() if "ceilings" in file.header), {})
        first = [Step("cache", self.fill_cache, 150, group="before")]
        if not self.ceilings:
            first.append(Step("ceilings", self.measure_ceilings, 60, group="before"))
        runner.run(first, until)
        if not self.ceilings:
            print(f"make gpu: nothing can be measured without ceilings: {self.ended[-1].why}; see {self.log}", file=sys.stderr)
            return 1
        for file in self.files.values():
            file.begin(date=time.strftime("%Y-%m-%d"), ceilings=self.ceilings)
        unfinished = runner.run(self.steps(), until)
        for step in unfinished:
            self.notes.append(f"{step.name}: no time was left")
        self.write_page()
        failed = [row for _, row in self.failed()]
        print(self.targets(), f"{len(failed)} rows failed, {len(unfinished)} steps had no time", sep="\n\n")
        return 1 if failed or unfinished or any(outcome.why for outcome in self.ended) else 0

    def steps(self) -> list[Step]:
        """Return the steps that have something left to do, in order."""
        found = []
        for op, of_op in plan.smoke(self.dry).items():
            parts = self.left("smoke", op, [(str(case), "ours") for case in of_op])
            run = functools.partial(self.smoke, cases={str(case): case for case in of_op})
            found.append(Step(f"smoke {op}", run, 60, tuple(case for case, _ in parts), group="smoke"))
        for planned in plan.plan(self.dry):
            parts = self.left(planned.stage, planned.case.op, [(str(planned.case), way) for way in planned.ways])
            run = functools.partial(self.measure, planned=planned)
            found.append(Step(planned.name, run, planned.limit, tuple(way for _, way in parts), beside=planned.beside, prepare=300))
        cold = f"{COLD_START[self.dry]} training"
        parts = self.left("model", "cold start", [(cold, "ours")])
        found.append(Step("cold start", self.cold_start, 0, tuple(case for case, _ in parts), beside=True, prepare=200))
        found = [step for step in found if step.parts]
        if not (self.out / f"timeline-{self.slug}.json").exists():
            found.append(Step("timeline", self.trace, 60))
        return found

    def left(self, stage: str, op: str, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the pairs (case, way) that have no row yet, or a failed one."""
        return [(case, way) for case, way in wanted if not self.files[stage].has(op=op, case=case, way=way)]

    # The following methods run in the processes of the steps.

    def wake(self, channel: Channel) -> None:
        """Initialize the device and report how long that took."""
        start = time.monotonic()
        if not self.dry:
            torch.zeros(1, device=self.device)
            torch.cuda.synchronize()
        channel.send("device", seconds=time.monotonic() - start)

    def look(self, channel: Channel, parts: Sequence[str]) -> None:
        if not self.dry and not torch.cuda.is_available():
            channel.send("absent")
            return
        self.wake(channel)
        found = {"header": rows.header(self.device)}
        if not self.dry:
            found |= {"slug": rows.slug(self.device), "arch": "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))}
        channel.send("look", **found)

    def fill_cache(self, channel: Channel, parts: Sequence[str]) -> None:
        """Compile what the cache lacks. A dry run only inspects it."""
        lines = cache.look(self.cache_folder, self.arch)[0] if self.dry else cache.complete(self.cache_folder, self.arch)
        for line in lines:
            channel.send("note", text=line)

    def measure_ceilings(self, channel: Channel, parts: Sequence[str]) -> None:
        self.wake(channel)
        channel.send("ceilings", ceilings=vars(Ceilings.measure(self.device, DTYPES)))

    def smoke(self, channel: Channel, parts: Sequence[str], cases: dict[str, Case]) -> None:
        """Check our results against float64."""
        self.wake(channel)
        for part in parts:
            channel.begin(part)
            problem = problems.build(cases[part], self.device, torch.float32)
            error = check(problem, "ours", problem.prepare("ours")())
            row = {"error": float(f"{error:.4g}"), "implementation": problem.implementation}
            self.send_row(channel, "smoke", part, {"op": cases[part].op, "case": part, "way": "ours"} | row)

    def measure(self, channel: Channel, parts: Sequence[str], planned: plan.Rows) -> None:
        """Measure ways of a case, one after the other."""
        self.wake(channel)
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        torch._dynamo.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
        if planned.beside:
            torch._inductor.config.compile_threads = COMPILE_THREADS
        problem = problems.build(planned.case, self.device, torch.float32 if self.dry else torch.bfloat16)
        if self.dry:
            # The model is traced but not compiled.
            problem.compiler = "eager"
        for way in parts:
            channel.begin(way)
            key = {"op": planned.case.op, "case": str(planned.case), "way": way}
            self.send_row(channel, planned.stage, way, key | self.row(problem, way, channel.wait_for_device))
            # Free the memory that compiled or recorded ways hold on to.
            gc.collect()
            if not self.dry:
                torch.cuda.empty_cache()

    def row(self, problem: problems.Problem, way: str, when_ready: Callable[[], None]) -> dict[str, Any]:
        """Measure a way and return its results, or the reason why there are none.

        Device errors are raised, because the process cannot compute anything after one.
        """
        seconds = DRY_SECONDS if self.dry else SECONDS
        try:
            return measure(
                problem, way, self.device, Ceilings(**self.ceilings), Clock.of(self.device), seconds, when_ready=when_ready
            )
        except Unavailable as why:
            return {"unavailable": str(why)}
        except WrongResult as wrong:
            # Timing an opponent with wrong results is meaningless, and a retry would not help.
            return {"failed" if way.startswith("ours") else "unavailable": f"wrong: {wrong}"}
        except Failed as failed:
            return {"failed": str(failed)}
        except torch.OutOfMemoryError as error:
            return {"failed": reason(error)}

    def cold_start(self, channel: Channel, parts: Sequence[str]) -> None:
        """Time the first training step of a fresh process with an empty cache, concurrently with other steps."""
        for part in parts:
            channel.begin(part)
            with tempfile.TemporaryDirectory() as empty:
                done = subprocess.run(
                    [sys.executable, "-m", "bench.first_step", COLD_START[self.dry]],
                    cwd=rows.ROOT,
                    env={**os.environ, "TRITON_CACHE_DIR": empty},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            row = {"op": "cold start", "case": part, "way": "ours", "seconds": json.loads(done.stdout), "beside": "other steps"}
            self.send_row(channel, "model", part, row)

    def trace(self, channel: Channel, parts: Sequence[str]) -> None:
        self.wake(channel)
        timeline.main(["--out", str(self.out), *(["--tiny"] if self.dry else [])])

    @staticmethod
    def send_row(channel: Channel, stage: str, part: str, row: dict[str, Any]) -> None:
        channel.send("row", stage=stage, part=part, row=row)

    # The following methods run in the parent process.

    def on_event(self, step: Step, event: Event) -> None:
        kind = event["kind"]
        if kind == "row":
            self.files[event["stage"]].add(event["row"])
        elif kind == "failed":
            stage, key = self.row_of(step, event["part"])
            self.files[stage].add(key | {"failed": event["why"]})
        elif kind == "note":
            self.notes.append(event["text"])
            print(event["text"], flush=True)
        elif kind == "ceilings":
            self.ceilings = event["ceilings"]
        elif kind == "absent":
            self.is_absent = True
        elif kind == "look":
            self.header = event["header"]
            self.slug, self.arch = event.get("slug", self.slug), event.get("arch", self.arch)

    def row_of(self, step: Step, part: str) -> tuple[str, dict[str, Any]]:
        """Return the stage and key of the row that a part of a step would have written."""
        if step.name == "cold start":
            return "model", {"op": "cold start", "case": part, "way": "ours"}
        if step.group == "smoke":
            return "smoke", {"op": step.name.removeprefix("smoke "), "case": part, "way": "ours"}
        planned = next(each for each in plan.plan(self.dry) if each.name == step.name)
        return planned.stage, {"op": planned.case.op, "case": str(planned.case), "way": part}

    def on_end(self, outcome: Outcome) -> None:
        self.ended.append(outcome)
        device = "" if outcome.device is None else f", device after {outcome.device:.2f} s"
        how = outcome.why or "done"
        print(f"{outcome.step}: {how}, {outcome.seconds:.1f} s, started in {outcome.started:.2f} s{device}", flush=True)
        if self.files:
            self.write_page()

    def failed(self) -> list[tuple[str, dict[str, Any]]]:
        return [(stage, row) for stage, file in self.files.items() for row in file.rows if "failed" in row]

    def targets(self) -> str:
        measured = [row for stage in ("ops", "model") for row in self.files[stage].rows]
        return targets.table({self.header["device"]: measured}, sides=True)

    def write_page(self) -> None:
        lines = [f"- {stage}: {row['op']} {row['case']}, {row['way']}: {row['failed']}" for stage, row in self.failed()]
        lines += [f"- {outcome.step}: {outcome.why}" for outcome in self.ended if outcome.why and not outcome.parts]
        smoke = self.files["smoke"].rows
        right = sum("error" in row for row in smoke)
        said = [f"Against float64: {right} of {len(smoke)} small cases are correct.", *self.notes]
        failed = "\n".join(["## Failed (retried by the next call)", "", *lines]) if lines else "Nothing failed."
        products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in self.ceilings.get("matmul", {}).items())
        versions = ", ".join(f"{name} {v}" for name, v in self.header["versions"].items() if v != "not installed")
        steps = ["| step | came out | seconds | start | device |", "|---|---|---|---|---|"]
        for each in self.ended:
            device = "" if each.device is None else f"{each.device:.2f}"
            steps.append(f"| {each.step} | {each.why or 'done'} | {each.seconds:.1f} | {each.started:.2f} | {device} |")
        text = PAGE.format(
            device=self.header["device"],
            date=time.strftime("%Y-%m-%d"),
            commit=self.header["commit"] or "unknown",
            sources=self.header["sources"],
            versions=versions,
            copy=show.digits(self.ceilings.get("copy", 0.0) / 1e9, 4),
            products=products,
            targets=self.targets(),
            failed="\n\n".join([*said, failed]),
            steps="\n".join(steps),
        )
        (self.out / f"headline-{self.slug}.md").write_text(text)
