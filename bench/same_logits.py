"""Check that the digit model computes bit for bit the same as at another commit.

    python -m bench.same_logits HEAD~1

Both run on this machine, one after the other, each in its own single-threaded process. In evaluation they compute the logits and
features of 64 held-out scans, each with a sentence; in training, the loss and the gradients of the trained parameters.
`--record FILE` writes the logits instead of comparing them; on every machine, tests compare with those in tests/data within 1e-5.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
ITEMS = 64
# Also runs at other commits, so it uses only names that all of them have.
PROGRAM = f"""
import sys, torch
from safetensors.torch import save_file
import mope
from mope.demo import digit_model
from mope.demo.data import load_digits, statements, to_pixel_values
model = mope.MoPEForClassification.from_pretrained(digit_model())
sentences = [s for statement in statements() for s in statement.sentences(held_out=True)]
scans = load_digits(seed=0)["test"]
pixels = to_pixel_values(scans.pixels[:{ITEMS}])
texts = model.tokenizer([sentences[i % len(sentences)] for i in range({ITEMS})], padding=True, return_tensors="pt")
batch = dict(pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
with torch.no_grad():
    out = model(**batch)
found = {{"logits": out.logits, "features": out.features}}
torch.manual_seed(0)
model.train()
loss = model(**batch, labels=torch.arange({ITEMS}) % 2).loss
loss.backward()
found["loss"] = loss.detach()
found |= {{f"gradient of {{n}}": p.grad for n, p in model.named_parameters() if p.grad is not None}}
save_file({{n: t.contiguous() for n, t in found.items()}}, sys.argv[1])
"""


def run(tree: Path, file: Path) -> dict[str, torch.Tensor]:
    """Run the program in a source tree and return its tensors by name."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(file)], cwd=tree, env=environment, check=True)
    return load_file(file)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Check out a commit into a temporary folder, with the C++ kernels of the current tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT, check=True)
        try:
            if (library := ROOT / "mope_kernels" / "_C.so").exists():
                shutil.copy(library, tree / "mope_kernels")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD", help="commit to compare with (HEAD)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the logits to a file instead of comparing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        now = run(ROOT, Path(folder) / "now.safetensors")
        if options.record:
            save_file({"logits": now["logits"]}, options.record)
            return 0
        with checked_out(options.revision) as tree:
            before = run(tree, Path(folder) / "before.safetensors")
    differing = sorted(name for name in before.keys() | now.keys() if not _same(before.get(name), now.get(name)))
    for name in differing:
        print(f"{name} differs")
    print(f"{len(now) - len(differing)} of {len(now)} tensors are bit for bit those of {options.revision}")
    return bool(differing)


def _same(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    return before is not None and now is not None and torch.equal(before, now)


if __name__ == "__main__":
    raise SystemExit(main())
