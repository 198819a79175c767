"""Describe the environment in which a result was computed."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mope

PACKAGES = ("triton", "transformers", "safetensors", "einops", "numpy", "scikit-learn", "xformers")


def versions() -> dict[str, str]:
    """Return the versions of this library, Python and relevant packages, or "not installed"."""
    # torch.__version__ includes the CUDA version it was built for, which the package metadata lacks.
    found = {"mope-kernels": mope.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Return the date, device, versions and commit with which a result is computed, to be stored with the result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
        "commit": commit() or f"release {mope.__version__}",
    }


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """Return the git commit of a checkout, with "+" if files differ from it; empty for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
