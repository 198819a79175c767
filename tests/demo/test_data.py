"""The questions of the demo: correct labels, balance, and no overlap between training and test."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mope.demo.data import NAMES, Examples, draw_examples, facts, load_digits, statements, to_pixel_values
from mope.demo.pretrain import build_image_processor, build_tokenizer


def means(sentence: str, digit: int) -> bool:
    """Return whether the sentence holds for the digit, judging only by its words."""
    number = {name: value for value, name in enumerate(NAMES)}
    negated = bool(re.search(r"\b(not|none)\b", sentence))
    found = [number[word] for word in sentence.split() if word in number]
    # In "is one of the" and "the power of two", the number words do not name a digit.
    if re.search(r"\bone of\b", sentence):
        found = found[1:]
    if "at most" in sentence:
        return digit <= found[0]
    if re.search(r"larger|greater|more|above", sentence):
        truth = digit > found[0]
    elif "prime" in sentence:
        truth = digit > 1 and all(digit % i for i in range(2, digit))
    elif "square" in sentence:
        truth = round(digit**0.5) ** 2 == digit
    elif "power" in sentence:
        truth = digit > 0 and digit & (digit - 1) == 0
    elif "multiple" in sentence:
        truth = digit % 3 == 0
    elif "even" in sentence.split():
        truth = digit % 2 == 0
    elif "odd" in sentence:
        truth = digit % 2 == 1
    elif re.search(r"between|from", sentence):
        truth = found[0] <= digit <= found[1]
    else:
        truth = digit in found
    return truth != negated


@pytest.fixture(scope="module")
def splits():  # type: ignore[no-untyped-def]
    return load_digits(seed=0)


@pytest.fixture(scope="module")
def examples(splits) -> Examples:  # type: ignore[no-untyped-def]
    return draw_examples(splits["train"], 40, np.random.default_rng(0))


def test_every_sentence_means_what_its_statement_says() -> None:
    for statement in statements():
        for held_out in (False, True):
            for sentence in statement.sentences(held_out=held_out):
                assert {d for d in range(10) if means(sentence, d)} == statement.digits, sentence


def test_labels_are_true(splits, examples: Examples) -> None:  # type: ignore[no-untyped-def]
    for scan, sentence, label in zip(examples.scan, examples.sentence, examples.label, strict=True):
        assert means(sentence, int(splits["train"].classes[scan])) == bool(label), sentence


def test_statements_come_in_pairs_of_opposites() -> None:
    known = statements()
    assert len(known) == 38
    for one, other in zip(known[::2], known[1::2], strict=True):
        assert one.digits | other.digits == set(range(10))
        assert not one.digits & other.digits


def test_neither_the_scan_nor_the_statement_tells_the_label(examples: Examples) -> None:
    """Exactly half of the examples with each value are true, so a classifier of a single input cannot beat chance."""
    for column in (examples.scan, examples.statement):
        for value in np.unique(column):
            assert examples.label[column == value].mean() == 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_no_scan_is_in_two_splits(seed: int) -> None:
    splits = load_digits(seed=seed)
    index = np.concatenate([split.index for split in splits.values()])
    assert sorted(index) == list(range(1797))
    for split in splits.values():
        shares = np.bincount(split.classes, minlength=10) / len(split)
        assert np.allclose(shares, 0.1, atol=0.02)


def test_held_out_phrasings_are_never_seen_before_the_test(splits) -> None:  # type: ignore[no-untyped-def]
    held_out = {sentence for statement in statements() for sentence in statement.sentences(held_out=True)}
    wordings = [wording for statement in statements() for wording in statement.predicates(held_out=True)]
    rng = np.random.default_rng(1)
    assert held_out.isdisjoint(draw_examples(splits["train"], 200, rng).sentence)
    assert set(draw_examples(splits["test"], 40, rng, held_out_phrasings=True).sentence) <= held_out
    for fact in facts():
        assert not any(fact.endswith(f" {wording}") for wording in wordings), fact
    assert {title.title for title in statements()}.isdisjoint(wordings)


def test_words_of_held_out_phrasings_are_known() -> None:
    tokenizer = build_tokenizer()
    for statement in statements():
        for sentence in statement.sentences(held_out=True):
            assert tokenizer.unk_token_id not in tokenizer(sentence)["input_ids"], sentence


def test_draws_depend_on_the_seed_only(splits) -> None:  # type: ignore[no-untyped-def]
    first, again, other = (draw_examples(splits["test"], 3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.sentence == again.sentence and (first.scan == again.scan).all()
    assert first.sentence != other.sentence


def test_tokenizer_round_trip(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    sentences = [sentence for statement in statements() for sentence in statement.sentences()]
    for sentence in sentences:
        ids = tokenizer(sentence)["input_ids"]
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
        assert loaded(sentence)["input_ids"] == ids
    batch = loaded(["it is odd", "the digit is one of the prime numbers"], padding=True)
    assert batch["attention_mask"][0] == [1] * 5 + [0] * 5
    assert loaded("it is a hexagon")["input_ids"][-2] == loaded.unk_token_id


def test_image_processor_is_the_training_scaling(splits) -> None:  # type: ignore[no-untyped-def]
    pixels = splits["test"].pixels[:4]
    processed = build_image_processor()(list(pixels[..., None]), input_data_format="channels_last", return_tensors="pt")
    assert np.allclose(processed["pixel_values"], to_pixel_values(pixels), atol=1e-6)
