"""Build the C++ kernels into the wheel; the metadata is in pyproject.toml.

MOPE_BUILD_NATIVE=0 builds a pure wheel; MOPE_BUILD_NATIVE=1 fails if the kernels cannot be built. By default they are built if
torch and a C++ compiler are found; otherwise the wheel is pure. It contains the sources, so `mope build` can compile them later.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _load_builder():
    # Loaded by path, because importing the package would import torch, which may not be installed here.
    spec = importlib.util.spec_from_file_location("_mope_build", ROOT / "mope_kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _load_builder()


def build_native() -> bool:
    """Return whether to build the C++ kernels; exit if they are required but cannot be built."""
    wish = os.environ.get("MOPE_BUILD_NATIVE", "")
    if wish == "0":
        return False
    reason = builder.why_not()
    if reason and wish == "1":
        raise SystemExit(f"MOPE_BUILD_NATIVE=1, but the C++ kernels cannot be built: {reason}")
    if reason:
        print(f"mope-kernels: building without the C++ kernels: {reason}. `mope build` compiles them later.", file=sys.stderr)
    return not reason


class BuildKernels(build_ext):
    """Compile with `mope_kernels.build`, which needs no Python headers and puts no Python version into the file name."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], builder.LIBRARY)

    def build_extension(self, ext):
        builder.compile_library(Path(self.get_ext_fullpath(ext.name)), ROOT / "csrc")


class BuildWithSources(build_py):
    """Copy csrc/ into the wheel as mope_kernels/_csrc. An editable install uses csrc/ in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mope_kernels" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)

    def get_outputs(self, include_bytecode=True):
        sources = [str(Path(self.build_lib, "mope_kernels", "_csrc", file.name)) for file in sorted((ROOT / "csrc").iterdir())]
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else sources)]


class AnyPythonWheel(bdist_wheel):
    """Tag the wheel for any Python version: the kernels use no Python symbols, so it depends only on the platform."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[Extension("mope_kernels._C", [f"csrc/{file.name}" for file in sorted((ROOT / "csrc").glob("*.cpp"))])]
    if build_native()
    else [],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithSources, "bdist_wheel": AnyPythonWheel},
)
