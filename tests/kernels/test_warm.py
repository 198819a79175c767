"""A cache that was filled without a GPU contains the kernels that a launch looks up, under the same keys."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from mope_kernels import aot, warm
from mope_kernels._triton import compiling_for, record_launches
from mope_kernels.impl import interpreting

from .test_aot import needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")]
SMALL = "importance_loss K=16"


def launches(arch: str):
    """Yield every launch of the short list."""
    for name, run in aot.variants(short=True):
        with FakeTensorMode(), compiling_for(arch), record_launches() as found:
            run()
        yield from ((name, *launch) for launch in found)


def key_of_the_jit(kernel, args, constants, arch: str) -> str:
    """Return the key under which the JIT looks up this launch in its cache."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    keys = []

    def compile(source, target, options):
        # Build the key as `triton.compile` does.
        backend = make_backend(target)
        text = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
        keys.append(hashlib.sha256(text.encode()).hexdigest())

    with aot._device_of(arch):
        kernel.device_caches[arch] = kernel.create_binder()
        real, kernel.compile = kernel.compile, compile
        try:
            kernel.run(*map(aot._as_pointers, args), grid=(1,), warmup=True, **constants)
        finally:
            kernel.compile = real
            del kernel.device_caches[arch]
    (key,) = keys
    return key


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_every_key_is_the_jits_also_after_a_way_through_a_file(arch):
    count = 0
    for name, kernel, args, constants in launches(arch):
        found = aot.Specialization.of(kernel, args, constants, arch)
        (read,) = warm.decoded(json.loads(json.dumps(warm.encoded([found]))))
        assert read == found
        assert read.key(arch) == key_of_the_jit(kernel, args, constants, arch), f"{name}: {found.kernel}"
        count += 1
    assert count > 300


HASHES = """
import importlib, sys
from mope_kernels._triton import hash_callees_first
found = []
for place in sys.argv[1:]:
    module, name = place.split(":")
    found.append(getattr(importlib.import_module(f"mope_kernels.expert_adapter_details.{module}"), name))
for kernel in found:
    hash_callees_first(kernel)
print(*sorted(f"{kernel.__name__} {kernel.cache_key}" for kernel in found))
"""


def test_a_key_does_not_depend_on_what_was_launched_before():
    """Guard against Triton 3.6, where a kernel's hash lacks constants of functions that were not hashed before it."""
    names = ["_forward:adapter_forward", *(f"_backward:{name}" for name in ("parameter_products", "sum_parts", "adapter_backward"))]
    command = [sys.executable, "-c", HASHES]
    forwards, backwards = (
        subprocess.run([*command, *order], capture_output=True, text=True, check=True).stdout for order in (names, names[::-1])
    )
    assert forwards == backwards and forwards.count("adapter_backward") == 1


# Run in a separate process with a cache in TRITON_CACHE_DIR; print whether the JIT found each kernel there.
HITS = """
import sys
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from mope_kernels import aot
from mope_kernels._triton import compiling_for, record_launches
hits = []
knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
for name, run in aot.variants(short=True):
    if sys.argv[1] in name:
        with FakeTensorMode(), compiling_for("sm_90"), record_launches() as found:
            run()
        for kernel, args, constants in found:
            with aot._device_of("sm_90"):
                kernel.run(*map(aot._as_pointers, args), grid=(1,), warmup=True, **constants)
print(hits)
"""


def hits(cache: Path) -> list[bool]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", HITS, SMALL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.lower())


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "made"
    kernels = [kernel for _, kernel in aot.specializations(SMALL, short=True)]
    warm.fill(folder, kernels, "sm_90", note="a note", jobs=1)
    return folder


@pytest.fixture
def moved(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "moved"))


def test_the_jit_compiles_nothing_where_the_cache_is_filled(filled):
    assert hits(filled) == [True, True]


def test_a_cache_that_was_moved_is_used_once_it_has_settled(filled, moved, tmp_path):
    elsewhere = filled.with_name("elsewhere")
    filled.rename(elsewhere)
    try:
        # Triton looks for the files at their original path.
        assert hits(moved) == [False, False]
        shutil.rmtree(moved)
        shutil.copytree(elsewhere, moved)
        assert warm.look(moved, warm.Manifest.read(moved)).kernels == 0
        warm.settle(moved)
        assert hits(moved) == [True, True]
    finally:
        elsewhere.rename(filled)


def test_the_manifest_says_what_is_there_and_what_is_missing(moved):
    warm.settle(moved)
    manifest = warm.Manifest.read(moved)
    assert manifest.note == "a note" and manifest.arch == "sm_90" and manifest.made == warm.Made.here("sm_90")
    modules = len(manifest.modules)
    # Triton 3.6 caches a driver module and one per signature; later versions only the former, which cannot be moved.
    is_3_6 = importlib.metadata.version("triton").startswith("3.6.")
    assert modules == (3 if is_3_6 else 0) and all((moved / name).suffix == ".so" for name in manifest.modules)
    assert str(warm.look(moved, manifest)) == f"2 of 2 kernels and {modules} of {modules} stubs found"
    shutil.rmtree(moved / next(iter(manifest.kernels)))
    assert str(warm.look(moved, manifest)) == f"1 of 2 kernels and {modules} of {modules} stubs found"
    # Only the missing kernel is compiled.
    compiled = []
    real = aot.Specialization.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot.Specialization, "compile", lambda self, arch: compiled.append(self) or real(self, arch))
        for expected in (1, 1):
            again = warm.fill(moved, manifest.kernels.values(), "sm_90")
            assert len(compiled) == expected
            assert str(warm.look(moved, again)) == f"2 of 2 kernels and {modules} of {modules} stubs found"
    if not modules:
        return
    (moved / manifest.modules[0]).unlink()
    assert str(warm.look(moved, manifest)) == f"2 of 2 kernels and {modules - 1} of {modules} stubs found"
    warm.fill(moved, manifest.kernels.values(), "sm_90")
    assert str(warm.look(moved, manifest)) == f"2 of 2 kernels and {modules} of {modules} stubs found"


def test_a_cache_of_another_triton_or_python_is_of_no_use_and_says_why(moved):
    warm.settle(moved)
    manifest = warm.Manifest.read(moved)
    manifest.made = warm.Made("3.5.0 abc", manifest.made.ptxas, ".cpython-310.so")
    here = warm.Made.here("sm_90")
    assert manifest.made.differences(here) == [
        f"triton is {here.triton} here, the cache was made with 3.5.0 abc",
        f"suffix is {here.suffix} here, the cache was made with .cpython-310.so",
    ]
    assert warm.look(moved, manifest).kernels == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"arch": "sm_90"}', '{"arch": 1, "made": {}, "note": "", "kernels": 3, "modules": []}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / warm.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=rf"{warm.MANIFEST} is damaged .*: remove the folder and fill the cache again"):
        warm.Manifest.read(tmp_path)


def test_without_a_manifest_there_is_none(tmp_path):
    assert warm.Manifest.read(tmp_path) is None


def test_the_command_fills_a_cache_and_says_what_is_in_it(tmp_path, capsys):
    assert aot.main(["--warm", str(tmp_path), "--arch", "sm_90", "--short", "--only", SMALL, "--jobs", "1"]) == 0
    assert "2 of 2 kernels" in capsys.readouterr().out
    for arguments, said in ((["--arch", "sm_90", "sm_80"], "--warm takes one --arch, got sm_90 sm_80"), ([], "takes one --arch")):
        with pytest.raises(SystemExit):
            aot.main(["--warm", str(tmp_path), *arguments])
        assert said in capsys.readouterr().err
