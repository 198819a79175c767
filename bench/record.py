"""Write down what a list of benchmark cases launches on a GPU: `python -m bench.record ARCH FILE`, where no GPU has to be.

A process of its own, as it has a stand-in for the device, which has to be there before torch is. It reads cases from its standard
input, a JSON list of the arguments of `Case` with a dtype each, and writes what they compile to FILE.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def stand_in_for_the_device() -> None:
    """Let torch take a device for a GPU that has none: it holds no memory and has one stream.

    Raises:
        RuntimeError: torch is loaded already, or the C++ compiler is missing or fails.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, and knows its devices")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    source = Path(__file__).with_name("stand_in_device.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "stand_in_device.so")
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", "-w", f"-I{home / 'include'}", str(source)]
        command += ["-o", str(library), f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"recording launches needs a C++ compiler: {error}") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{' '.join(command)} failed:\n{error.stderr}") from error
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    arch, target = sys.argv[1], Path(sys.argv[2])
    stand_in_for_the_device()
    # After the stand-in.
    from bench.recording import record

    record(json.load(sys.stdin), arch, target)


if __name__ == "__main__":
    main()
