"""Test the page in a real browser: narrow and wide, light and dark, printed, and without its script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mope.routes import About, Routes, draw, summarize, write_html

from . import chromium, made

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on the PATH: apt-get install chromium")

WIDE = "document.documentElement.scrollWidth"
# A name without line breaks, markup, non-Latin text, and a right-to-left override.
CLASSES = ("a" * 300, "<img src=x onerror=document.title=1>", "犬 и 🐶", "\u202eright to left", *(f"class {i}" for i in range(9)))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    with chromium.tab(tmp_path_factory.mktemp("profile")) as found:
        yield found


def routed(folder: Path, experts: int) -> Routes:
    """Return routes where expert 1 of layer 0 is never taken, with a long text without spaces and a very long class name."""
    texts = ("cats purr", "x" * 400, "<script>document.title = 1</script>")
    routes = made.routes(300, 12, experts, classes=CLASSES, images=made.pictures(folder, 9), texts=texts)
    routes.probabilities[:, 0, 1] = 0
    return routes


@pytest.fixture(scope="module", params=[8, 64], ids=["8 experts", "64 experts"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "a folder"
    folder.mkdir()
    routes = routed(folder, request.param)
    tables = summarize(routes, top=5)
    pictures = draw(tables, routes, folder, blocks=[0]) if request.param == 8 else []
    about = About("runs/" + "long-name-" * 30, "data", "test", "2026-01-02")
    write_html(tables, routes, folder / "index.html", blocks=[0, 11], about=about, pictures=pictures)
    return folder / "index.html"


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("MOPE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def brightness(path: Path) -> float:
    with Image.open(path) as picture:
        return float(np.median(np.asarray(picture.convert("L"))))


@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_as_wide_as_the_window(width: int, tab: chromium.Tab, page: Path, screenshots: Path) -> None:
    for scheme in ("light", "dark"):
        tab.open(page, width, prefers_color_scheme=scheme)
        assert tab.value("innerWidth") == width
        assert tab.value(WIDE) <= width
        path = screenshots / f"routes-{page.parent.parent.name}-{width}-{scheme}.png"
        tab.screenshot(path)
        assert (brightness(path) > 200) == (scheme == "light")
    assert tab.problems == []
    assert tab.value("document.title").startswith("Routes of runs/long-name-")


def test_nothing_is_drawn_smaller(tab: chromium.Tab, page: Path) -> None:
    """A drawing that does not fit scrolls in its frame."""
    tab.open(page, 400)
    shrunk = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < s.width.baseVal.value - 1).length"
    assert tab.value("document.querySelectorAll('svg').length") == 2
    assert tab.value(shrunk) == 0


def test_what_stands_in_a_cell_can_be_read(tab: chromium.Tab, page: Path) -> None:
    """Each number in a heat map has enough WCAG contrast with its background, in both color schemes."""
    for scheme in ("light", "dark"):
        tab.open(page, 1280, prefers_color_scheme=scheme)
        pairs = tab.value(
            """(() => {
              const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
              const rgb = color => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
                                     return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
              return [...document.querySelectorAll("td[class^=h]")].map(cell => {
                const style = getComputedStyle(cell); return [rgb(style.color), rgb(style.backgroundColor)]; });
            })()"""
        )
        grounds = {tuple(ground) for _, ground in pairs}
        assert len(grounds) > 20
        assert min(contrast(ink, ground) for ink, ground in pairs) > 4.5, scheme


def contrast(one: list[int], other: list[int]) -> float:
    def luminance(color: list[int]) -> float:
        part = np.array(color) / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLUMN = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map(r => r.cells[{}].textContent)"


def test_columns_sort(tab: chromium.Tab, page: Path) -> None:
    tab.open(page, 1280)
    names, numbers = (tab.value(COLUMN.format(i)) for i in (0, 1))
    assert names == [f"layer {i}" for i in range(12)]
    press = "document.querySelectorAll('table')[0].querySelectorAll('th button')[{}].click()"
    tab.value(press.format(1))
    assert tab.value(COLUMN.format(1)) == sorted(numbers, key=float) != numbers
    tab.value(press.format(1))
    assert tab.value(COLUMN.format(1)) == sorted(numbers, key=float, reverse=True)
    assert tab.value("document.querySelectorAll('[aria-sort=descending]').length") == 1
    # Names sort by number: layer 2 comes before layer 10.
    tab.value(press.format(0))
    assert tab.value(COLUMN.format(0)) == names


def test_without_scripts_all_is_there(tab: chromium.Tab, page: Path) -> None:
    tab.open(page, 1280)
    assert tab.value("document.querySelectorAll('button').length") > 5
    tab.open(page, 1280, scripts=False)
    # Expressions sent by the test are still evaluated.
    assert tab.value("document.querySelectorAll('button').length") == 0
    assert "Expert 7\n" in tab.value("document.body.innerText")
    assert tab.value("document.querySelectorAll('section.expert .thumbnail').length") > 50


def test_printed_it_is_dark_on_white(tab: chromium.Tab, page: Path) -> None:
    tab.open(page, 700, prefers_color_scheme="dark")
    tab.media("print", prefers_color_scheme="dark")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().right <= innerWidth)")
    assert tab.pdf().startswith(b"%PDF-")


def test_links_lead_to_files_and_sections(tab: chromium.Tab, page: Path) -> None:
    tab.open(page, 1280)
    addresses = tab.value("[...document.querySelectorAll('a')].map(a => a.href)")
    assert len(addresses) > 10
    for address in addresses:
        place, _, section = address.partition("#")
        if section:
            assert tab.value(f"document.getElementById('{section}') !== null"), address
        path = tab.value(f"decodeURIComponent(new URL({place!r}).pathname)")
        assert Path(path).is_file(), address
