"""Record the GPU launches of benchmark cases without a GPU: `python -m bench.record ARCH FILE`.

This is a separate process, because it uses a fake device, which must be loaded before torch. It reads cases from standard
input, a JSON list of pairs (arguments of `Case`, dtype), and writes the kernels that they compile to FILE.
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
    """Make torch believe that there is a GPU: a fake device without memory and with one stream.

    Raises:
        RuntimeError: torch is already loaded, or the C++ compiler is missing or fails.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is already imported and has detected its devices: call this before importing torch")
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
    # Imports torch, so it must come after the fake device.
    from bench.recording import record

    record(json.load(sys.stdin), arch, target)


if __name__ == "__main__":
    main()
