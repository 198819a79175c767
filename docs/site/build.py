"""Build the documentation as a site: `python docs/site/build.py OUT`.

The pages are those in `docs/`, README, CONTRIBUTING, CHANGELOG and the list of examples. They are copied into one folder with links
that hold on the site, and Sphinx makes HTML of them. Any warning is an error.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site by their files in the repository, beside those in docs/.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
MODULES = (
    "mope",
    "mope.fused",
    "mope.modex",
    "mope.data",
    "mope.training",
    "mope.backbones",
    "mope.modalities",
    "mope_kernels",
)
CONTENTS = {
    "Begin": ("demo", "data", "training", "predicting", "examples", "Choosing a method <methods>", "encoders"),
    "Use": (
        *("Routes <routes>", "serving", "Speed <performance>", "ops", "numerics", "ModeX <modex>"),
        *("Coming from the released code <migrate>", "systems", "support"),
    ),
    "Extend": ("An encoder, a modality, a method <contributing>", "An op <adding_an_op>", "design"),
    "Reference": tuple(f"reference/{module}" for module in MODULES),
    "Measured": (
        *("measured", "benchmarks", "Results of the demo <demo_results>", "Results, one digit <demo_digits_results>"),
        *("Results, ModeX <demo_modex_results>", "resources", "Resources, Triton 3.6 <resources-triton-3.6>"),
        *("Resources, Triton 3.9 <resources-triton-3.9>", "Measuring on a GPU <gpu>", "changelog"),
    ),
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# Marks blocks that the tests do not run.
NOT_RUN = re.compile(r"^(\s*```\w+) not-run=\"[^\"]*\"$", re.MULTILINE)


def pages() -> dict[str, str]:
    """Return the pages of the site by their names there, with links that hold there."""
    sources = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))} | ELSEWHERE
    found = {page: on_site((ROOT / source).read_text(), source, sources) for source, page in sources.items()}
    for module in MODULES:
        # mope.data re-exports an error of mope.modalities.
        again = "\n   :exclude-members: DataError" if module == "mope.data" else ""
        directive = f".. automodule:: {module}\n   :members:\n   :imported-members:\n   :show-inheritance:{again}"
        found[f"reference/{module}.md"] = f"# {module}\n\n```{{eval-rst}}\n{directive}\n```\n"
    for caption, names in CONTENTS.items():
        found["index.md"] += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(names) + "\n```\n"
    return found


def on_site(text: str, source: str, sources: dict[str, str]) -> str:
    """Point links at pages of the site; of a file that only the repository has, give the name."""

    def point(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match.group()
        in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if in_repository in sources:
            return f"{picture}[{label}]({sources[in_repository]}{mark}{anchor})"
        if in_repository.startswith("docs/images/"):
            return f"{picture}[{label}]({in_repository.removeprefix('docs/')})"
        if not (ROOT / in_repository).exists():
            raise SystemExit(f"{source}: there is no {target}")
        return label if label.strip("`") in in_repository else f"{label} (`{in_repository}`)"

    return NOT_RUN.sub(r"\1", LINK.sub(point, text))


def main(out: Path) -> int:
    """Build the site into a folder -> exit status."""
    source = out / "source"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", source / "images")
    for name, text in pages().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    status: int = sphinx(["-W", "--keep-going", "-q", "-c", str(Path(__file__).parent), str(source), str(out / "html")])
    if status == 0:
        print(out / "html" / "index.html")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
