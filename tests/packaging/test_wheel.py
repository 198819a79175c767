"""Installed as by a user: wheels and the sdist are built, installed into an empty directory, and used from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mope_kernels
from mope_kernels import build

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.escape(mope_kernels.__version__)
PLATFORM = r"(linux|macosx|win)\w+"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the project's own files")]

# A mixture with a known result, by the C++ kernel if `loaded` is true, otherwise by the definition.
USE = """
import torch, mope_kernels
from mope_kernels import _extension
status = _extension.status()
experts = torch.arange(12.0).reshape(2, 2, 3)
mixed = mope_kernels.mix_prompts(experts, torch.tensor([[0.25, 0.75]]), torch.tensor([[0, 1]]))
assert torch.equal(mixed, 0.25 * experts[:1] + 0.75 * experts[1:]), mixed
print(status.loaded, status.path, status.reason)
print(mope_kernels.explain("mix_prompts", experts, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)).impl)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the packaged files, because a build leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "mope", "mope_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    return copy


def build_wheel(source: Path, directory: Path, **environment: str) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", directory, source),
        cwd=directory,
        **environment,
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def native_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if build.why_not():
        pytest.skip(build.why_not())
    return build_wheel(checkout, tmp_path_factory.mktemp("native"), MOPE_BUILD_NATIVE="1")


@pytest.fixture(scope="module")
def pure_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("pure"), MOPE_BUILD_NATIVE="0")


def install(wheel: Path, directory: Path) -> Path:
    site = directory / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=directory)
    return site


def use(site: Path, cwd: Path, **environment: str) -> tuple[str, str]:
    """Return the status line and the chosen implementation of the package in `site`."""
    cwd.mkdir(exist_ok=True)
    environment = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cwd / "cache"), "MOPE_DISABLE_EXTENSION": "", **environment}
    status, impl = run(sys.executable, "-c", USE, cwd=cwd, **environment).splitlines()
    return status, impl


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sources() -> set[str]:
    return {file.name for file in (ROOT / "csrc").iterdir()}


def test_native_wheel_is_for_any_python_on_one_platform(native_wheel):
    assert re.fullmatch(rf"mope_kernels-{VERSION}-py3-none-{PLATFORM}\.whl", native_wheel.name)
    assert {f"mope_kernels/{build.LIBRARY}", "mope_kernels/py.typed", "mope/py.typed"} <= contents(native_wheel)
    assert {f"mope_kernels/_csrc/{name}" for name in sources()} <= contents(native_wheel)


def test_pure_wheel_is_for_any_platform_and_carries_the_sources(pure_wheel):
    assert re.fullmatch(rf"mope_kernels-{VERSION}-py3-none-any\.whl", pure_wheel.name)
    assert f"mope_kernels/{build.LIBRARY}" not in contents(pure_wheel)
    assert {f"mope_kernels/_csrc/{name}" for name in sources()} <= contents(pure_wheel)
    assert {name.split("/")[0] for name in contents(pure_wheel)} == {
        "mope",
        "mope_kernels",
        f"mope_kernels-{mope_kernels.__version__}.dist-info",
    }


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm")
def test_library_needs_no_symbol_of_python_or_of_torchs_cpp_interface(native_wheel, tmp_path):
    zipfile.ZipFile(native_wheel).extract(f"mope_kernels/{build.LIBRARY}", tmp_path)
    symbols = run("nm", "-D", "--undefined-only", tmp_path / "mope_kernels" / build.LIBRARY, cwd=tmp_path)
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.match(r"_?Py[A-Z_]", name)]
    # Mangled names of at:: and c10:: functions, which change between versions of torch.
    assert not [name for name in names if re.match(r"_ZN?K?\d*(2at|3c10)", name)]


def test_native_wheel_runs_its_kernels(native_wheel, tmp_path):
    site = install(native_wheel, tmp_path)
    status, impl = use(site, tmp_path / "elsewhere")
    assert status.split() == ["True", str(site / "mope_kernels" / build.LIBRARY)] and impl == "cpu"


def pythons() -> list[object]:
    """Return this interpreter, and existing ones of the Makefile's other environments, which have another torch."""
    others = (os.environ.get("MOPE_TEST_PYTHONS") or f"{ROOT}/.venv-oldest/bin/python").split(":")
    return [sys.executable, *(pytest.param(p, marks=[] if Path(p).exists() else pytest.mark.skip(f"no {p}")) for p in others)]


def clean_environment(python: str, folder: Path, packages: str) -> Path:
    """Create an environment of `python`, link its torch and everything else these packages need, and return its python."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    environment = {"PYTHONPATH": "", "PACKAGES": packages}
    for path in run(python, "-c", FILES, cwd=folder.parent, **environment).splitlines():
        if not (link := site / Path(path).name).exists():
            link.symlink_to(path)
    return folder / "bin" / "python"


# Print the files and folders in site-packages of the packages and their dependencies.
FILES = """
import os
from importlib import metadata
from packaging.requirements import Requirement
wanted, found = [Requirement(text) for text in os.environ["PACKAGES"].splitlines()], {}
while wanted:
    requirement = wanted.pop()
    key = requirement.name.lower()
    extras = requirement.extras or {""}
    if found.get(key, set()) >= extras:
        continue
    found.setdefault(key, set()).update(extras)
    distribution = metadata.distribution(requirement.name)
    for file in distribution.files:
        if file.parts[0] != "..":
            print(distribution.locate_file(file.parts[0]))
    needed = map(Requirement, distribution.requires or ())
    wanted += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
"""


def requirements(wheel: Path) -> str:
    """Return the requirements of a wheel, one per line, without extras."""
    (name,) = (name for name in contents(wheel) if name.endswith(".dist-info/METADATA"))
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    found = re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)
    return "\n".join(line for line in found if "extra ==" not in line)


@pytest.mark.parametrize("python", pythons())
def test_one_wheel_is_all_that_is_installed(native_wheel, python, tmp_path):
    """Install the wheel with pip into an environment with only its requirements, and run part of the contract tests."""
    clean = clean_environment(python, tmp_path / "clean", requirements(native_wheel))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"PYTHONPATH": "", "MOPE_DISABLE_EXTENSION": "", "MOPE_EXTENSION": "", "XDG_CACHE_HOME": str(elsewhere)}
    run(clean, "-m", "pip", "install", "--no-index", native_wheel, cwd=elsewhere, **environment)
    (installed,) = (tmp_path / "clean").glob(f"lib/python*/site-packages/mope_kernels/{build.LIBRARY}")
    status, impl = run(clean, "-c", USE, cwd=elsewhere, **environment).splitlines()
    assert status.split() == ["True", str(installed)] and impl == "cpu"
    torch = run(python, "-c", "import torch; print(torch.__version__)", cwd=elsewhere, PYTHONPATH="").strip()
    command = tmp_path / "clean" / "bin" / "mope"
    assert run(command, "--version", cwd=elsewhere, **environment) == f"mope {mope_kernels.__version__}\n"
    said = run(command, "info", cwd=elsewhere, **environment)
    assert torch in said and str(installed) in said
    parts = ("fusion", "encoders", "backbones", "serving", "modex", "data", "fused", "released")
    every = f"import mope_kernels.aot, {', '.join(f'mope.{part}' for part in parts)}"
    run(clean, "-c", every, cwd=elsewhere, **environment)
    without = subprocess.run([command, "demo"], cwd=elsewhere, env={**os.environ, **environment}, capture_output=True, text=True)
    assert without.returncode == 1 and " is needed: pip install accelerate pillow " in without.stderr

    # pytest comes from this environment; the tests are copied without the sources.
    tools = tmp_path / "tools"
    tools.mkdir()
    for path in run(python, "-c", FILES, cwd=elsewhere, PYTHONPATH="", PACKAGES="pytest\nhypothesis").splitlines():
        if not (link := tools / Path(path).name).exists():
            link.symlink_to(path)
    shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    part = ["tests/contract/test_accuracy.py", "-k", "cpu", "-m", "not slow", "-p", "no:cacheprovider"]
    said = run(clean, "-m", "pytest", "-q", *part, cwd=elsewhere, **environment | {"PYTHONPATH": str(tools)})
    assert int(re.search(r"(\d+) passed", said)[1]) > 50 and "failed" not in said


def test_pure_wheel_works_and_then_builds_its_kernels(pure_wheel, tmp_path):
    site, cwd = install(pure_wheel, tmp_path), tmp_path / "elsewhere"
    status, impl = use(site, cwd)
    assert status.startswith("False None") and "not built" in status and impl == "reference"

    if build.why_not():
        pytest.skip(build.why_not())
    environment = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cwd / "cache")}
    command = "from mope_kernels import build; print(build.build())"
    library = run(sys.executable, "-c", command, cwd=cwd, **environment).strip()
    assert Path(library).is_relative_to(cwd / "cache" / "mope_kernels")
    built = Path(library).stat().st_mtime_ns
    run(sys.executable, "-c", command, cwd=cwd, **environment)
    assert Path(library).stat().st_mtime_ns == built, "built twice for the same sources"
    status, impl = use(site, cwd)
    assert status.split() == ["True", library] and impl == "cpu"


def test_sdist_builds_a_pure_wheel_without_torch(checkout, tmp_path):
    # As with build isolation: setup.py does not find torch, reports it, and builds the pure wheel.
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, checkout, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    assert {file.name for file in (unpacked / "csrc").iterdir()} == sources()

    without_torch = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'bdist_wheel']"
    said = subprocess.run(
        [sys.executable, "-c", f"{without_torch}; runpy.run_path('setup.py', run_name='__main__')"],
        cwd=unpacked,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert "building without the C++ kernels: torch is not installed" in said.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")


def test_insisting_on_the_kernels_without_a_compiler_is_an_error(checkout, tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=checkout,
        env={**os.environ, "MOPE_BUILD_NATIVE": "1", "CXX": "", "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode and "no C++ compiler was found" in result.stderr


def test_compiler_error_is_told(monkeypatch, tmp_path):
    if build.why_not():
        pytest.skip(build.why_not())
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "library.cpp").write_text("int main() { return wrong; }")
    monkeypatch.setattr(build, "source_directory", lambda: broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"error.*wrong"):
        build.build()
    assert not build.cached_library().exists()
