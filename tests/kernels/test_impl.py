"""The choice of implementation is reported, can be overridden, and never falls back silently."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings

import pytest
import torch

import mope_kernels
from mope.info import examples
from mope_kernels import impl
from mope_kernels._extension import STATUS
from tests.environment import setenv

LOGITS = torch.zeros(2, 3)
MIX = (torch.zeros(3, 4, 8), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))


def test_explain_names_what_runs_and_why_others_do_not():
    explanation = mope_kernels.explain(mope_kernels.mix_prompts, *(t.double() for t in MIX[:2]), MIX[2])
    assert explanation.impl == "reference"
    assert "float64" in explanation.reasons["triton"][-1]
    assert explanation.reasons["xformers"] == ["mix_prompts has no xformers implementation"]
    assert not explanation.way and str(explanation).startswith("mix_prompts: reference would run\n  triton: ")


def test_explain_says_what_would_be_preferred():
    assert mope_kernels.explain("route", LOGITS, impl="reference").reasons.keys() == {"triton", "cpu", "sdpa", "xformers"}
    if STATUS.loaded and not impl.interpreting():
        explanation = mope_kernels.explain("mix_prompts", *MIX)
        assert explanation.impl == "cpu" and explanation.reasons["reference"] == ["cpu comes first"]


def test_an_explicit_choice_raises_with_every_reason():
    with pytest.raises(ValueError, match=r"(?s)route: no implementation can run.*route has no sdpa implementation.*reference"):
        mope_kernels.route(LOGITS, impl="sdpa")
    with pytest.raises(ValueError, match="float64"):
        mope_kernels.mix_prompts(MIX[0].double(), *MIX[1:], impl="triton")


def test_environment_replaces_auto_only(monkeypatch):
    setenv(monkeypatch, "MOPE_IMPL", "reference")
    assert mope_kernels.explain("mix_prompts", *MIX).impl == "reference"
    setenv(monkeypatch, "MOPE_IMPL", "sdpa")
    with pytest.raises(ValueError, match="route has no sdpa implementation"):
        mope_kernels.route(LOGITS)
    mope_kernels.route(LOGITS, impl="reference")
    setenv(monkeypatch, "MOPE_IMPL", "sdpa,reference")
    assert mope_kernels.explain("route", LOGITS).impl == "reference"
    setenv(monkeypatch, "MOPE_IMPL", "quick")
    with pytest.raises(ValueError, match=r"route: MOPE_IMPL=quick: impl must be 'auto' or one of .*, got 'quick'"):
        mope_kernels.route(LOGITS)


@pytest.mark.parametrize("op", impl._OPERATIONS)
def test_explain_takes_every_argument_of_a_call(op):
    arguments, options = examples(torch.device("cpu"), torch.float32)[op]
    signature = inspect.signature(getattr(mope_kernels, op))
    given = signature.bind(*arguments, **options)
    expected = mope_kernels.explain(op, *given.args, **given.kwargs).impl
    given.apply_defaults()
    named = {name: value for name, value in given.arguments.items() if name != "impl"}
    assert mope_kernels.explain(op, **named).impl == expected


class OnGPU(torch.Tensor):
    """A tensor that only claims to be on a GPU."""

    is_cuda = True


def test_a_gpu_tensor_on_the_definition_warns_once(monkeypatch):
    monkeypatch.setattr(impl, "_warned", set())
    logits = LOGITS.double().as_subclass(OnGPU)
    with pytest.warns(UserWarning, match="route runs in plain PyTorch on a GPU: .*float64"):
        mope_kernels.route(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mope_kernels.route(logits)


IMPORT_ONLY = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "xformers", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, mope_kernels
loaded = [n for n in sys.modules if n.split(".")[0] in ("triton", "xformers", "transformers")]
assert not loaded, loaded
weights, indices, _ = mope_kernels.route(torch.zeros(2, 3), top_k=2)
assert mope_kernels.mix_prompts(torch.ones(3, 4, 8), weights, indices).shape == (2, 4, 8)
print(mope_kernels.explain("mope_attention", *[torch.zeros(1, 1, 1, 16)] * 3, torch.zeros(1, 1),
      mope_kernels.ExpertBank(*[torch.zeros(1, 1, 1, 16)] * 2)))
"""


def test_imports_and_runs_with_torch_alone():
    environment = {**os.environ, "MOPE_DISABLE_EXTENSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", IMPORT_ONLY], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mope_attention: sdpa would run" in done.stdout
