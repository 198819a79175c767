"""Features of the complementary encoder are computed once and match those computed in training."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mope import MoPEForClassification
from mope.data import FORMATS, Collator, DataError, Example, Examples, FeatureCache, Split, cached_features, features, read_split
from tests.models.test_swin_classification import swin
from tests.training.test_examples import grey_processor, model_of, tokenizer

TEXTS = ("a b c", "d", "a a b b c", "c d", "b", "a b c")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Return six examples, two with the same text and two with the same image; one has no image."""
    rng = np.random.default_rng(0)
    # In this format, images of the same shape have files of the same size.
    paths: list[Path | None] = [tmp_path / f"{i}.bmp" for i in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)  # type: ignore[arg-type]
    images = [*paths, paths[0], None]
    examples = [
        Example(str(i), {"text": text, "vision": image}, (i % 3,))
        for i, (text, image) in enumerate(zip(TEXTS, images, strict=True))
    ]
    return Split("train", tuple(examples), ("x", "y", "z"), "single_label")


def psi_of(model: MoPEForClassification, split: Split) -> torch.Tensor:
    """Return psi (N,Cc), computed one example at a time."""
    examples, collate = Examples(split, model), Collator(model)
    with torch.no_grad():
        rows = []
        for i in range(len(split)):
            batch = collate([examples[i]])
            batch.pop("labels")
            rows.append(model.encode_complementary(**batch))
    return torch.cat(rows)


def rows_of(cache: FeatureCache) -> torch.Tensor:
    return torch.stack([cache[i] for i in range(len(cache))])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of inputs in each encoder call."""
    calls: list[int] = []
    encode = MoPEForClassification.encode_complementary

    def counting(self: MoPEForClassification, **inputs: torch.Tensor) -> torch.Tensor:
        calls.append(len(next(iter(inputs.values()))))
        return encode(self, **inputs)

    monkeypatch.setattr(MoPEForClassification, "encode_complementary", counting)
    return calls


@pytest.mark.parametrize("main, unique", [("vision", 5), ("text", 5)])
@pytest.mark.parametrize("batch_size, workers", [(4, 0), (2, 1)])
def test_features_are_those_of_the_encoder(
    split: Split, tmp_path: Path, counted: list[int], main: str, unique: int, batch_size: int, workers: int
) -> None:
    model = model_of(main=main).train()
    cache = cached_features(model, split, tmp_path / "cache", batch_size=batch_size, num_workers=workers)
    assert sum(counted) == cache.computed == unique and max(counted) <= batch_size
    assert model.training
    assert rows_of(cache).dtype == torch.float32
    torch.testing.assert_close(rows_of(cache), psi_of(model.eval(), split), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("main", ["vision", "text"])
def test_training_with_features_is_training_without(split: Split, tmp_path: Path, main: str) -> None:
    """Compare logits, loss and gradients up to float32 rounding."""
    model = model_of(main=main)
    cache = cached_features(model, split, tmp_path / "cache")
    results = []
    for given in (None, cache):
        examples = Examples(split, model, features=given)
        batch = Collator(model)([examples[i] for i in range(len(examples))])
        assert ("cross_features" in batch) == (given is not None)
        assert ("input_ids" in batch and "pixel_values" in batch) == (given is None)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 5
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-4, atol=1e-5 * max(1, float(wanted.abs().max())), msg=name)


def test_a_second_run_computes_nothing(split: Split, tmp_path: Path, counted: list[int]) -> None:
    model = model_of()
    first = cached_features(model, split, tmp_path / "cache")
    counted.clear()
    second = cached_features(model, split, tmp_path / "cache")
    assert counted == [] and second.computed == 0
    assert torch.equal(rows_of(first), rows_of(second))
    part = dataclasses.replace(split, examples=split.examples[1:3])
    assert torch.equal(rows_of(cached_features(model, part, tmp_path / "cache")), rows_of(first)[1:3])
    assert counted == []


def test_random_numbers_of_a_run_stay_what_they_were(split: Split, tmp_path: Path) -> None:
    model = model_of()
    before = torch.get_rng_state()
    cached_features(model, split, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_text_recomputes_itself(split: Split, tmp_path: Path, counted: list[int]) -> None:
    model = model_of()
    cached_features(model, split, tmp_path / "cache")
    counted.clear()
    examples = list(split.examples)
    examples[1] = dataclasses.replace(examples[1], inputs={**examples[1].inputs, "text": "d d"})
    changed = dataclasses.replace(split, examples=tuple(examples))
    cache = cached_features(model, changed, tmp_path / "cache")
    assert counted == [1] and cache.computed == 1
    torch.testing.assert_close(rows_of(cache), psi_of(model, changed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_changed_image_recomputes_itself(split: Split, tmp_path: Path, counted: list[int], what: str) -> None:
    model = model_of(main="text")
    cached_features(model, split, tmp_path / "cache")
    counted.clear()
    path = split.examples[1].inputs["vision"]
    assert path is not None
    stat = path.stat()
    Image.fromarray(np.full((8, 9 if what == "size" else 8), 200, np.uint8)).save(path)
    # Set the time instead of waiting, because a file system may store coarse times.
    later = 0 if what == "size" else 10**9
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))
    assert (path.stat().st_size != stat.st_size, path.stat().st_mtime_ns != stat.st_mtime_ns) == (what == "size", what == "time")
    cache = cached_features(model, split, tmp_path / "cache")
    assert counted == [1]
    torch.testing.assert_close(rows_of(cache), psi_of(model, split), rtol=1e-5, atol=1e-5)


def variants() -> Iterator[tuple[str, Any]]:
    """Yield changes of everything else that the features depend on."""

    def weights(model: MoPEForClassification) -> None:
        with torch.no_grad():
            model.text.embeddings.word_embeddings.weight[4] += 0.1  # type: ignore[union-attr]

    def words(model: MoPEForClassification) -> None:
        model.tokenizer = tokenizer(model_max_length=4)

    def prompts(model: MoPEForClassification) -> None:
        with torch.no_grad():
            model.cross_blocks[0].static.add_(0.1)  # type: ignore[union-attr, operator]

    yield "weights", weights
    yield "words", words
    yield "prompts", prompts


@pytest.mark.parametrize("change", [c for _, c in variants()], ids=[name for name, _ in variants()])
def test_another_encoder_or_tokenizer_has_other_features(split: Split, tmp_path: Path, change: Any) -> None:
    """The encoder may have frozen prompts."""
    model = model_of(cross_prompt_length=2)
    model.cross_blocks.requires_grad_(False)
    cached_features(model, split, tmp_path / "cache")
    change(model)
    cache = cached_features(model, split, tmp_path / "cache")
    assert cache.computed == 5
    torch.testing.assert_close(rows_of(cache), psi_of(model, split), rtol=1e-5, atol=1e-5)


def test_another_image_processor_has_other_features(split: Split, tmp_path: Path) -> None:
    model = model_of(main="text")
    cached_features(model, split, tmp_path / "cache")
    model.image_processor = grey_processor()
    assert cached_features(model, split, tmp_path / "cache").computed == 0
    model.image_processor.image_mean = [0.4]
    assert cached_features(model, split, tmp_path / "cache").computed == 5


def test_use_of_the_tokenizer_changes_nothing(split: Split, tmp_path: Path) -> None:
    """Fast tokenizers store the truncation and padding of the last call."""
    model = model_of()
    cached_features(model, split, tmp_path / "cache")
    model.tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)
    assert cached_features(model, split, tmp_path / "cache").computed == 0


def test_a_swin_transformer_as_the_complementary_encoder(split: Split, tmp_path: Path) -> None:
    from mope.data import published_image_processor

    def build() -> MoPEForClassification:
        torch.manual_seed(0)
        plain = model_of(method="text_only")
        plain.detach()
        vision = swin(torch.float32)
        model = MoPEForClassification(plain.config.replace(method="mope", main="text"), vision=vision, text=plain.text).eval()
        model.tokenizer, model.image_processor = tokenizer(), published_image_processor(vision.config.image_size)
        return model

    model = build()
    cache = cached_features(model, split, tmp_path / "cache")
    torch.testing.assert_close(rows_of(cache), psi_of(model, split), rtol=1e-5, atol=1e-5)
    assert cached_features(build(), split, tmp_path / "cache").computed == 0


def test_what_trains_has_no_cache(split: Split, tmp_path: Path) -> None:
    model = model_of(cross_prompt_length=2)
    with pytest.raises(ValueError, match="the text encoder is trained, or prompts in it"):
        cached_features(model, split, tmp_path / "cache")
    with pytest.raises(ValueError, match="'image_only' has no complementary encoder"):
        cached_features(model_of(method="image_only"), split, tmp_path / "cache")


def test_features_must_fit(split: Split, tmp_path: Path) -> None:
    model, other = model_of(), model_of(main="text")
    cache, images = cached_features(model, split, tmp_path / "cache"), cached_features(other, split, tmp_path / "cache")
    for others in (split.examples[:1], split.examples[::-1]):
        with pytest.raises(ValueError, match=f"features of another split were given: these are {len(others)} examples of train"):
            Examples(dataclasses.replace(split, examples=others), model, features=cache)
    again = dataclasses.replace(split, examples=tuple(map(dataclasses.replace, split.examples)))
    assert len(Examples(again, model, features=cache)) == 6
    with pytest.raises(ValueError, match="features of the text encoder were given, but vision is complementary"):
        Examples(split, other, features=cache)
    with pytest.raises(ValueError, match="do not change with augmentation"):
        Examples(split, other, features=images, training=True, augment=True)
    # Augmentation is allowed for modalities that are not cached, and where it is not applied.
    Examples(split, model, features=cache, training=True, augment=True)
    Examples(split, other, features=images, augment=True)
    trained = model_of(cross_prompt_length=2)
    with pytest.raises(ValueError, match="features change while the text encoder trains"):
        Examples(split, trained, features=cache)


def test_workers_open_the_files_themselves(split: Split, tmp_path: Path) -> None:
    model = model_of()
    cache = cached_features(model, split, tmp_path / "cache")
    wanted = rows_of(cache)
    assert torch.equal(rows_of(pickle.loads(pickle.dumps(cache))), wanted)
    # The pickle holds no features; a single one would add 128 bytes.
    assert len(pickle.dumps(cache)) < len(pickle.dumps(dataclasses.astuple(split))) + 1000
    loader = DataLoader(Examples(split, model, features=cache), 6, collate_fn=Collator(model), num_workers=1)
    (batch,) = loader
    assert torch.equal(batch["cross_features"], wanted)


class Stopped(BaseException):
    """A stop at any point, as by Ctrl-C or a power failure."""


@pytest.mark.parametrize("save", range(4))
def test_a_run_that_is_stopped_leaves_nothing_half(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int], save: int
) -> None:
    """Stop while writing any of the four files of two parts."""
    monkeypatch.setattr(features, "PART", 3)
    model, folder = model_of(), tmp_path / "cache"
    saved, write = [], np.save

    def stopping(stream: Any, array: Any) -> None:
        write(stream, array)
        saved.append(stream)
        if len(saved) == save + 1:
            stream.truncate(stream.tell() // 2)
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(np, "save", stopping)
        cached_features(model, split, folder, batch_size=3)
    assert not list(folder.rglob("*.unfinished"))
    counted.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = cached_features(model, split, folder, batch_size=3)
    # The first part counts once both of its files exist.
    assert sum(counted) == (5 if save < 2 else 2)
    torch.testing.assert_close(rows_of(cache), psi_of(model, split), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["features", "index"])
def test_a_broken_file_is_named_and_replaced(split: Split, tmp_path: Path, kind: str) -> None:
    model, folder = model_of(), tmp_path / "cache"
    wanted = rows_of(cached_features(model, split, folder))
    (file,) = folder.rglob(f"*.{kind}.npy")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=rf"{file.name.split('.')[0]}.* cannot be used \(.*\): remove both"):
        cache = cached_features(model, split, folder)
    assert cache.computed == 5
    torch.testing.assert_close(rows_of(cache), wanted)


def test_two_runs_at_once(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one run do all its work just as another one starts: both write, and both are right."""
    model, folder = model_of(), tmp_path / "cache"
    compute, others = features._compute, []

    def late(*arguments: Any) -> int:
        if not others:
            others.append(None)
            others[0] = cached_features(model, split, folder)
        return compute(*arguments)

    monkeypatch.setattr(features, "_compute", late)
    cache = cached_features(model, split, folder)
    assert cache.computed == others[0].computed == 5
    wanted = psi_of(model, split)
    for found in (cache, others[0], cached_features(model, split, folder)):
        torch.testing.assert_close(rows_of(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("same_disk", [True, False])
def test_processes_compute_a_part_each(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int], same_disk: bool
) -> None:
    """Threads stand in for two processes. With separate disks, both must compute everything."""
    models = [model_of()]
    torch.manual_seed(0)
    models.append(model_of())
    played = threading.local()
    monkeypatch.setattr(features, "rank_and_world", lambda: (played.rank, 2))
    # The timeout only serves to end a deadlock.
    monkeypatch.setattr(features, "wait_for_all", threading.Barrier(2, timeout=1800).wait)

    def run(rank: int) -> FeatureCache:
        played.rank = rank
        return cached_features(models[rank], split, tmp_path / ("cache" if same_disk else f"cache {rank}"))

    with ThreadPoolExecutor(2) as processes:
        caches = list(processes.map(run, range(2)))
    assert [cache.computed for cache in caches] == ([3, 2] if same_disk else [5, 5])
    assert sum(counted) == sum(cache.computed for cache in caches)
    for cache in caches:
        torch.testing.assert_close(rows_of(cache), psi_of(models[0], split), rtol=1e-5, atol=1e-5)


def test_time_spent_and_saved(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock that advances only in the encoder, by 2 seconds for each of two batches (5 texts in total)."""
    now = [0.0]
    encode = MoPEForClassification.encode_complementary

    def slow(self: MoPEForClassification, **inputs: torch.Tensor) -> torch.Tensor:
        now[0] += 2
        return encode(self, **inputs)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(MoPEForClassification, "encode_complementary", slow)
    model = model_of()
    cache = cached_features(model, split, tmp_path / "cache", batch_size=3)
    assert cache.seconds == 4 and cache.seconds_per_epoch == pytest.approx(6 * 4 / 5)
    assert cache.saved(10) == pytest.approx(44)
    line = "features of the text encoder: 5 computed for 6 examples in 4.0 s; 10 epochs without it save 44.0 s"
    assert cache.describe(10) == line
    again = cached_features(model, split, tmp_path / "cache")
    assert again.seconds == 0 and again.saved(10) == pytest.approx(48)


def test_an_empty_split(split: Split, tmp_path: Path) -> None:
    cache = cached_features(model_of(), dataclasses.replace(split, examples=()), tmp_path / "cache")
    assert len(cache) == cache.computed == 0


ROOT = Path(__file__).parents[2]


def test_the_page_about_data_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that docs/data.md's example lines can be read and its bad ones give its error; tests/documents runs its Python."""
    page = (ROOT / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    rows = re.findall(r"^\| `([\w-]+)` \| `(\{.*\})` \| (one|several) \|$", page, flags=re.MULTILINE)
    assert {format for format, _, _ in rows} == set(FORMATS)
    for format, line, classes in rows:
        record = json.loads(line)
        image = data / record.get("image", record.get("img", "Flickr30K/flickr30k_images/36979.jpg"))
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(image)
        (data / "train.jsonl").write_text(line)
        split = read_split("data", format, "train")
        assert split.examples[0].inputs["vision"] == image.relative_to(tmp_path)
        assert split.problem_type == {"one": "single_label", "several": "multi_label"}[classes]

    (data / "labels.txt").write_text("apple_pie\nwaffles\n")
    (lines,) = re.findall(r"^```json\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    _, error, table = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (data / "train.jsonl").write_text(lines)
    with pytest.raises(DataError) as raised:
        read_split("data", "jsonl", "train")
    assert f"{raised.value}\n" == error

    (data / "train.jsonl").unlink()
    (data / "train.csv").write_text(table)
    split = read_split("data", "jsonl", "train", on_missing_image="grey")
    assert [(example.inputs["text"], example.labels) for example in split.examples] == [
        ("how to bake", (0,)),
        ("flour, eggs and milk", (1,)),
    ]
