"""Compare the tables with the same numbers computed one by one."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import mope_kernels
from mope.routes import Routes, summarize, summary
from mope.routes.words import LEAST_SCORE, Corpus, log_odds, words_of

from . import made


@pytest.fixture(params=[3, 10**6], ids=["small chunks", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each example has 8 numbers.
    monkeypatch.setattr(summary, "CHUNK", 8 * request.param)


def test_load_and_balance(chunks: None) -> None:
    routes = made.routes()
    tables = summarize(routes)
    for block in range(2):
        p = [[float(v) for v in row] for row in routes.probabilities[:, block]]
        load = [sum(row[k] for row in p) / len(p) for k in range(4)]
        np.testing.assert_allclose(tables.load[block], load, rtol=1e-12)
        top1 = [sum(row.index(max(row)) == k for row in p) / len(p) for k in range(4)]
        np.testing.assert_allclose(tables.top1[block], top1, rtol=1e-12)
        probs = torch.from_numpy(routes.probabilities[:, block]).double()
        expected = mope_kernels.importance_loss(probs, threshold=0.0, impl="reference").item()
        assert tables.cv_squared[block] == pytest.approx(expected, rel=1e-9)
        assert tables.load_entropy[block] == pytest.approx(-sum(v * math.log(v, 4) for v in load), rel=1e-9)
        entropies = [-sum(v * math.log(v, 4) for v in row) for row in p]
        assert tables.example_entropy[block] == pytest.approx(sum(entropies) / len(p), rel=1e-9)
        assert tables.example_entropy[block] < tables.load_entropy[block]


def test_classes(chunks: None) -> None:
    routes = made.routes()
    labels = routes.labels.copy()
    # These examples have two classes.
    labels[:5, :2] = True
    tables = summarize(dataclasses.replace(routes, labels=labels))
    assert tables.class_counts.tolist() == [int(labels[:, 0].sum()), int(labels[:, 1].sum()), 0]
    for c in (0, 1):
        np.testing.assert_allclose(tables.by_class[:, c], routes.probabilities[labels[:, c]].astype(float).mean(0), rtol=1e-12)
    assert np.isnan(tables.by_class[:, 2]).all()


def test_class_information() -> None:
    """Check that it is 0 if all classes are routed alike, and 1 if each class has its own expert."""
    routes = made.routes(count=8, blocks=2, experts=4, classes=("a", "b", "c", "d", "e"))
    owner = np.arange(8) % 4
    apart, alike = np.eye(4)[owner], np.full((8, 4), 0.25)
    routes = dataclasses.replace(
        routes, probabilities=np.stack([apart, alike], 1).astype(np.float32), labels=np.eye(5, dtype=bool)[owner]
    )
    tables = summarize(routes)
    np.testing.assert_allclose(tables.class_information, [1, 0], atol=1e-9)
    np.testing.assert_allclose(tables.example_entropy, [0, 1], atol=1e-9)
    np.testing.assert_allclose(tables.cv_squared, 0, atol=1e-9)
    assert tables.most_decided == 0
    # Among equal probabilities, the first is chosen.
    assert tables.first[1].tolist() == [0] * 8


def test_top_examples_have_different_images(chunks: None, tmp_path: Path) -> None:
    routes = made.routes(images=made.pictures(tmp_path, 7))
    p = routes.probabilities.copy()
    # Among equal probabilities, the earlier example is chosen.
    p[20:40] = p[20]
    routes = dataclasses.replace(routes, probabilities=p)
    tables = summarize(routes, top=5)
    for block in range(2):
        for expert in range(4):
            expected: list[int] = []
            for row in sorted(range(60), key=lambda row: (-p[row, block, expert], row)):
                if routes.images[row] not in [routes.images[other] for other in expected]:
                    expected.append(row)
            assert tables.top_examples[block, expert].tolist() == expected[:5]
            np.testing.assert_array_equal(tables.top_probabilities[block, expert], p[expected[:5], block, expert])


def test_fewer_images_than_asked_for(chunks: None, tmp_path: Path) -> None:
    tables = summarize(made.routes(images=made.pictures(tmp_path, 2)), top=4)
    assert (tables.top_examples[..., :2] >= 0).all() and (tables.top_examples[..., 2:] == -1).all()
    assert (tables.top_probabilities[..., 2:] == 0).all()
    # Without images, all examples count as different.
    assert (summarize(made.routes(), top=50).top_examples >= 0).all()


@pytest.mark.parametrize("count, experts", [(1, 1), (5, 1), (1, 4), (3, 256)])
def test_small_and_large(count: int, experts: int) -> None:
    tables = summarize(made.routes(count=count, experts=experts), top=3)
    assert tables.load.shape == (2, experts) and tables.top_examples.shape == (2, experts, 3)
    np.testing.assert_allclose(tables.load.sum(-1), 1, rtol=1e-6)
    for values in (tables.cv_squared, tables.load_entropy, tables.example_entropy, tables.class_information):
        assert np.isfinite(values).all()
    if experts == 1:
        assert not tables.cv_squared.any() and not tables.load_entropy.any()


@pytest.mark.parametrize("options", [{"top": 0}, {"words": 0}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        summarize(made.routes(), **options)


def test_file(tmp_path: Path) -> None:
    """Check that every table is stored by name, without pickle, and that the bytes are the same each time."""
    routes = made.routes(texts=("cats purr", "dogs bark"))
    tables = summarize(routes)
    for name in ("a.npz", "b.npz"):
        tables.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file.files) == {field.name for field in dataclasses.fields(tables)}
        np.testing.assert_array_equal(file["load"], tables.load)
        assert file["ids"][7] == "id7" and file["classes"].tolist() == ["cat", "dog", "bird"]


def test_memory_does_not_grow_with_the_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, experts = 20_000, 128
    monkeypatch.setattr(summary, "CHUNK", 2**16)
    stored = np.lib.format.open_memmap(tmp_path / "p.npy", mode="w+", dtype=np.float32, shape=(count, 2, experts))
    stored[:] = 1 / experts
    routes = dataclasses.replace(made.routes(count=count), probabilities=stored)
    tracemalloc.start()
    summarize(routes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored.nbytes > 20e6
    assert peak < stored.nbytes / 2


def test_words() -> None:
    assert words_of("It's a DOG, a dog's life: 3D café … don’t!") == {"it's", "a", "dog", "dog's", "life", "3d", "café", "don’t"}
    assert words_of("x" * 31 + " short") == {"short"}
    assert words_of("<b>&amp;</b>") == {"b", "amp"}


def test_log_odds_is_the_formula() -> None:
    inside, outside = np.array([5, 0, 3, 10]), np.array([1, 4, 3, 20])
    total = inside + outside
    expected = []
    for w in range(4):
        a0 = 4.0
        a = a0 * total[w] / total.sum()
        y, n, other, others = inside[w], inside.sum(), outside[w], outside.sum()
        difference = math.log((y + a) / (n + a0 - y - a)) - math.log((other + a) / (others + a0 - other - a))
        expected.append(difference / math.sqrt(1 / (y + a) + 1 / (other + a)))
    np.testing.assert_allclose(log_odds(inside, outside), expected, rtol=1e-12)
    np.testing.assert_allclose(log_odds(outside, inside), -np.array(expected), rtol=1e-12)
    # The score is 0 if there is nothing to compare with.
    for pair in ((inside, 0 * inside), (0 * inside, inside), (inside[:1], outside[:1])):
        assert not log_odds(*pair).any()


def planted() -> Routes:
    """Return routes where all texts contain "the", and only those of expert 1 contain "boat", three times each."""
    rng = np.random.default_rng(0)
    filler = ["red", "green", "blue", "old", "new"]
    owner = np.arange(200) % 4
    texts = tuple(f"the {rng.choice(filler)} {'boat boat boat' if k == 1 else 'thing'}" for k in owner)
    probabilities = np.eye(4, dtype=np.float32)[owner][:, None]
    return dataclasses.replace(made.routes(count=200, blocks=1), texts=texts, probabilities=probabilities)


def test_words_of_an_expert() -> None:
    tables = summarize(planted())
    assert [word for word in tables.words[0, 1] if word] == ["boat"]
    assert tables.word_scores[0, 1, 0] > LEAST_SCORE
    assert "the" not in tables.words and "boat" not in tables.words[0, [0, 2, 3]]
    # A word counts once per text.
    routes = planted()
    once = dataclasses.replace(routes, texts=tuple(text.replace("boat boat boat", "boat") for text in routes.texts))
    np.testing.assert_array_equal(summarize(once).word_scores, tables.word_scores)


def test_texts_without_words() -> None:
    for texts in (("",), ("!?",), ("same",)):
        assert not any(word for row in Corpus(texts * 5).characteristic(np.arange(5) % 2, 2, 3) for word in row)
