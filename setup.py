"""Builds the C++ kernels into the wheel; the metadata stands in pyproject.toml.

MOPE_BUILD_NATIVE=0 builds a pure wheel, =1 insists on the kernels. Otherwise they are built where torch and a C++ compiler are
found, and the wheel is pure where not; it carries the sources, and `mope build` compiles them later.
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
    # By its path: importing the package would import torch, which need not be installed here.
    spec = importlib.util.spec_from_file_location("_mope_build", ROOT / "mope_kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _load_builder()


def build_native() -> bool:
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
    """Compiles with `mope_kernels.build`, which wants no Python headers and puts no Python version into the file's name."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], builder.LIBRARY)

    def build_extension(self, ext):
        builder.compile_library(Path(self.get_ext_fullpath(ext.name)), ROOT / "csrc")


class BuildWithSources(build_py):
    """Puts csrc/ into the wheel as mope_kernels/_csrc. An editable install finds the checkout's own."""

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
    """The kernels use no Python symbol, so that only the platform limits a wheel that holds them."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[Extension("mope_kernels._C", [f"csrc/{file.name}" for file in sorted((ROOT / "csrc").glob("*.cpp"))])]
    if build_native()
    else [],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithSources, "bdist_wheel": AnyPythonWheel},
)
