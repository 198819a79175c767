"""Triton cache for the headline of `make gpu`, filled without a GPU: `python -m bench.cache FOLDER` describes its contents."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mope_kernels import warm
from mope_kernels.aot import Specialization

from . import plan, recording
from .recording import note


def specializations(arch: str) -> list[Specialization]:
    """Return the kernels that the headline compiles."""
    return recording.of_cases(plan.with_dtypes(), arch).kernels


def look(folder: Path, arch: str) -> tuple[list[str], list[Specialization] | None]:
    """Return messages about a cache, and the kernels that its manifest lists; None instead if it was made from other code."""
    try:
        manifest = warm.Manifest.read(folder)
    except ValueError as damaged:
        return [str(damaged)], None
    if manifest is None:
        return [f"{folder} has no manifest: make gpu-cache fills it without a GPU"], None
    if manifest.arch != arch:
        return [f"the cache was made for {manifest.arch}, this is {arch}"], None
    warm.settle(folder)
    lines = [f"the cache cannot be used: {each}" for each in manifest.made.differences(warm.Made.here(arch))]
    lines.append(str(warm.look(folder, manifest)))
    if manifest.note == note():
        return lines, list(manifest.kernels.values())
    return [*lines, "the cache was made from other sources: the launches are recorded again"], None


def complete(folder: Path, arch: str) -> list[str]:
    """Compile what a cache lacks, with one process per core, and return messages about what it had and has now."""
    lines, kernels = look(folder, arch)
    manifest = warm.fill(folder, specializations(arch) if kernels is None else kernels, arch, note=note(), jobs=jobs())
    return [*lines, f"now {warm.look(folder, manifest)}"]


def jobs() -> int:
    return min(os.cpu_count() or 1, 16)


if __name__ == "__main__":
    print(*look(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "sm_90")[0], sep="\n")
