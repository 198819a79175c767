"""Test the contents of pictures and page, and that data on the page is always treated as text."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from mope.routes import About, Routes, draw, summarize, write_html
from mope.routes.about import quality, today
from mope.routes.page import POLICY, SCRIPT
from mope.routes.pictures import MOST_CLASSES, MOST_EXPERTS, draw_classes, draw_experts, draw_load, shown_classes, shown_experts
from mope.routes.thumbnails import GREY, SIZE, data_uri, thumbnail
from mope.training.metrics import Counts

from . import made

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{",
    "</style></title><base href=https://example.org>",
    "one\ntwo\x00\x1b[31m",
    "\u202eright to left",
    "犬 и 🐶",
    "_" + "long " * 100,
    "half of a character \ud83d",
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = self.styles = self.scripts = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif self.open and self.open[-1] == "script":
            self.scripts += data
        else:
            self.text += data


def test_pictures(tmp_path: Path) -> None:
    routes = made.routes(images=made.pictures(tmp_path, 9), texts=("cats purr", "dogs bark"))
    tables = summarize(routes)
    paths = draw(tables, routes, tmp_path / "out", blocks=[0, 1])
    stems = ("load", "classes_layer_0", "experts_layer_0", "classes_layer_1", "experts_layer_1")
    names = [f"{name}.{kind}" for name in stems for kind in ("png", "svg", "pdf")]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"%PDF-") for path in paths[2::3])
    assert all(ElementTree.parse(path).getroot().tag.endswith("}svg") for path in paths[1::3])
    for path in paths[::3]:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 10
    assert not plt.get_fignums()
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw(tables, routes, tmp_path / "out", blocks=[0, 1])] == first
    # By default, the block whose routing depends most on the example.
    best = tables.most_decided
    assert [path.name for path in draw(tables, routes, tmp_path / "one")] == [*names[:3], *names[3 + 6 * best : 9 + 6 * best]]


def with_an_unused_expert(folder: Path) -> Routes:
    """Return routes where expert 2 of layer 0 has a small probability for all examples and is never the first choice."""
    routes = made.routes(images=made.pictures(folder, 9), texts=("cats purr", "dogs bark"))
    probabilities = routes.probabilities.copy()
    others = probabilities[:, 0, [0, 1, 3]].max(-1)
    probabilities[:, 0, 2] = np.linspace(0, 0.125, len(routes), dtype=np.float32) * others
    return dataclasses.replace(routes, probabilities=probabilities / probabilities.sum(-1, keepdims=True))


def test_an_expert_that_is_never_taken_says_so(tmp_path: Path) -> None:
    """A note replaces the images of an unused expert; the other experts show theirs."""
    routes = with_an_unused_expert(tmp_path)
    tables = summarize(routes, top=2)
    assert [tables.never_taken(block, expert) for block in (0, 1) for expert in range(4)] == [i == 2 for i in range(8)]
    largest = routes.probabilities[:, 0, 2].max()
    said = f"never taken: first choice of no example, largest probability {largest:.2f}"
    figure = draw_experts(tables, routes, 0)
    assert [text.get_text() for text in figure.texts].count(said) == 1 and len(figure.axes) == 3
    write_html(tables, routes, tmp_path / "index.html", blocks=[0, 1])
    page = Page(tmp_path / "index.html")
    assert page.text.count(said) == 1 and page.text.count("never taken:") == 1
    assert sum("thumbnail" in (attributes.get("class") or "") for _, attributes in page.tags) == 7 * 2
    described = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg"]
    assert len(described) == 2 and all("Never taken: expert 2 in layer 0." in text for text in described)


def test_pictures_do_not_depend_on_the_users_style(tmp_path: Path) -> None:
    routes = made.routes()
    tables = summarize(routes)
    plain = draw(tables, routes, tmp_path / "a", blocks=[])
    with plt.style.context("dark_background"):
        before = dict(plt.rcParams)
        dark = draw(tables, routes, tmp_path / "b", blocks=[])
        assert dict(plt.rcParams) == before
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in dark]


def test_hostile_names_and_texts(tmp_path: Path) -> None:
    routes = made.routes(count=200, classes=(*HOSTILE, "unused"), texts=HOSTILE, images=made.pictures(tmp_path, 3))
    # Each text has its own expert, so that some words are characteristic.
    probabilities = np.eye(4, dtype=np.float32)[np.arange(200) % len(HOSTILE) % 4][:, None].repeat(2, axis=1)
    ids = tuple(f"{HOSTILE[i % 2]}{i}" for i in range(200))
    routes = dataclasses.replace(routes, probabilities=probabilities, ids=ids, blocks=("a<b>", HOSTILE[1]))
    tables = summarize(routes, top=20)
    draw(tables, routes, tmp_path, blocks=[0])
    about = About(*HOSTILE[:3], "2026-01-02")
    write_html(tables, routes, tmp_path / "index.html", blocks=[0, 1], about=about)
    page = Page(tmp_path / "index.html")
    assert not page.open
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body", "script", "h1", "h2", "h3", "h4", "p", "dl", "dt", "dd", "a"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "g", "text", "rect"),
        *("section", "div", "span", "bdi", "figure", "figcaption", "b", "br"),
    }
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "src" not in attributes
        assert "href" not in attributes or tag == "a"
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert all(re.fullmatch(r"#b\d+e\d+|(\.\./)?[\w.-]+", link) for link in links)
    assert page.scripts == SCRIPT.rstrip("\n") or page.scripts == SCRIPT
    assert all(url.startswith("data:image/jpeg;base64,") for url in re.findall(r"url\((.*?)\)", page.styles))
    assert page.styles.count("url(") == 3 and "base href" not in page.styles
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags
    # The texts appear unchanged.
    for text in (*HOSTILE[:4], *HOSTILE[5:7]):
        assert text in page.text
    titles = [attributes["title"] or "" for _, attributes in page.tags if "thumbnail" in (attributes.get("class") or "")]
    assert titles and all(any(name[:60] in title for name in HOSTILE[:2]) for title in titles)


def test_page(tmp_path: Path) -> None:
    routes = made.routes(images=(*made.pictures(tmp_path, 5), None), texts=("cats purr", "dogs bark"))
    tables = summarize(routes, top=3)
    write_html(tables, routes, tmp_path / "a.html")
    write_html(tables, routes, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    page = Page(tmp_path / "a.html")
    block = tables.most_decided
    assert f"Layer {block}" in page.text and f"Layer {1 - block}" not in page.text
    assert page.text.count("Expert ") == 4
    for expert in range(4):
        assert f"mean probability {tables.load[block, expert]:.1%}, first choice of {tables.top1[block, expert]:.1%}" in page.text
        for row in tables.top_examples[block, expert]:
            (truth,), (said,) = np.flatnonzero(routes.labels[row]), np.flatnonzero(routes.predictions[row])
            wrong = "" if truth == said else f", taken for {routes.classes[said]}"
            assert f"{routes.probabilities[row, block, expert]:.2f} {routes.classes[truth]}{wrong}{routes.texts[row]}" in page.text
    # Each image is embedded only once.
    used = {routes.images[row] for row in tables.top_examples[block].flat}
    assert page.styles.count("url(") == len(used)


def test_the_page_says_what_it_is_of(tmp_path: Path) -> None:
    """The page shows model, data, split, date and sizes, and the model's accuracy or F1 if labels are known."""
    routes = made.routes()
    routes = dataclasses.replace(routes, predictions=np.roll(routes.labels, 1, axis=0))
    right = (routes.labels == routes.predictions).all(1).mean()
    tables = summarize(routes)
    assert 0 < right < 1
    write_html(tables, routes, tmp_path / "a.html", about=About("runs/mine", "digits", "dev", "2026-01-02"))
    text = Page(tmp_path / "a.html").text
    facts = ("Model", "runs/mine", "Data", "digits", "Split", "dev", "Date", "2026-01-02", "Examples", "60", "Accuracy")
    assert "Routes of runs/mine" in text
    assert re.search(r"\s*".join((*facts[:-1], ".*?Accuracy", f"{right:.1%}")), text, flags=re.DOTALL)
    # With several labels, the page shows the same F1 as mope evaluate.
    several = dataclasses.replace(routes, labels=routes.labels | np.roll(routes.labels, 2, axis=1))
    counts = Counts("multi_label", 3)
    counts.add(torch.from_numpy(several.predictions).float() - 0.5, torch.from_numpy(several.labels).float())
    assert quality(several) == ("Micro F1", pytest.approx(counts.metrics()["f1_micro"]))
    # Unknown facts are not shown.
    unknown = dataclasses.replace(routes, labels=np.zeros_like(routes.labels))
    write_html(summarize(unknown), unknown, tmp_path / "b.html")
    text = Page(tmp_path / "b.html").text
    assert not any(name in text for name in ("Accuracy", "Micro F1", "Model\n", "Date"))


def test_the_date_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert today() == "1970-01-02"
    for wrong in ("yesterday", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(ValueError, match=f"SOURCE_DATE_EPOCH='{wrong}' is not a number of seconds"):
            today()


def test_experts_and_blocks_count_from_0(tmp_path: Path) -> None:
    """Numbers on the page and in the pictures start at 0 and end at one less than the count."""
    routes = made.routes(blocks=3, experts=5)
    tables = summarize(routes)
    write_html(tables, routes, tmp_path / "index.html", blocks=[0, 1, 2])
    # Replace tags with spaces, so that numbers in neighboring cells stay separate.
    text = re.sub("<[^>]*>", " ", (tmp_path / "index.html").read_text())
    for pattern, count in ((r"\b[Ee]xpert (\d+)\b", 5), (r"\b[Ll]ayer (\d+)\b", 3)):
        assert {int(number) for number in re.findall(pattern, text)} == set(range(count)), pattern
    drawn = {text.get_text() for text in draw_experts(tables, routes, 0).texts}
    assert {f"expert {i}" for i in range(5)} <= drawn and "expert 5" not in drawn
    for figure in (draw_classes(tables, 0), draw_load(tables)):
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [str(i) for i in range(5)]


def test_many_experts_and_classes(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(150))
    routes = made.routes(count=2000, blocks=1, experts=256, classes=classes, images=made.pictures(tmp_path, 3))
    tables = summarize(routes, top=2)
    experts, rows = shown_experts(tables, 0), shown_classes(tables, 0)
    assert len(experts) == MOST_EXPERTS and len(rows) == MOST_CLASSES
    assert tables.load[0, experts].min() >= np.delete(tables.load[0], experts).max()
    assert tables.class_counts[rows].min() >= np.delete(tables.class_counts, rows).max()
    # Each picture states what it omits.
    for figure, cut in (
        (draw_experts(tables, routes, 0), "the 32 of 256 experts"),
        (draw_classes(tables, 0), "the 128 of 150 classes"),
    ):
        assert any(cut in text.get_text() for text in figure.texts)
    write_html(tables, routes, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert page.text.count("Expert ") == MOST_EXPERTS and "Shown are the 32 of 256 experts with the largest load" in page.text
    assert (tmp_path / "index.html").stat().st_size < 2e6


@pytest.mark.parametrize("count, experts", [(1, 1), (3, 2)])
def test_little(count: int, experts: int, tmp_path: Path) -> None:
    routes = made.routes(count=count, blocks=1, experts=experts)
    # With multi_label, an example may have no class.
    routes = dataclasses.replace(routes, labels=np.zeros_like(routes.labels))
    tables = summarize(routes)
    assert len(draw(tables, routes, tmp_path, blocks=[0])) == 9
    write_html(tables, routes, tmp_path / "index.html")
    assert "nothing, taken for" in Page(tmp_path / "index.html").text


def test_a_line_is_a_thumbnail_too(tmp_path: Path) -> None:
    for size, shown in (((3000, 1), (SIZE, 1)), ((1, 500), (1, SIZE)), ((1, 1), (SIZE, SIZE))):
        Image.new("L", size).save(tmp_path / "line.png")
        assert thumbnail(tmp_path / "line.png").size == shown


def test_thumbnails(tmp_path: Path) -> None:
    assert thumbnail(None).getpixel((0, 0)) == GREY
    levels = np.array([[0, 240], [120, 60]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "small.png")
    enlarged = np.asarray(thumbnail(tmp_path / "small.png"))
    assert enlarged.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(enlarged[:: SIZE // 2, :: SIZE // 2, 0], levels)
    Image.new("RGBA", (900, 300), (10, 200, 30, 255)).save(tmp_path / "wide.png")
    wide = thumbnail(tmp_path / "wide.png")
    assert wide.size == (SIZE, SIZE // 3) and wide.getpixel((40, 10)) == (10, 200, 30)
    kind, _, data = data_uri(wide).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        assert image.size == wide.size
