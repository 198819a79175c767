"""`model.predict`: from PIL images and texts to classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mope.data import Collator, Examples, Split
from mope.fusion.predicting import Prediction, predictions
from mope.modex import AlbefConfig, AlbefModel, ModeXConfig, ModeXForClassification
from tests.models import made_up
from tests.models.tiny import fusion
from tests.training.brightness import image_processor, make_model, read_splits, tokenizer, write_data


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    return read_splits(write_data(tmp_path_factory.mktemp("one") / "data"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    return read_splits(write_data(tmp_path_factory.mktemp("several") / "data", several_labels=True))


def raw(split: Split) -> dict[str, list[Any]]:
    images = [Image.open(example.inputs["vision"]) for example in split.examples]
    return {"images": images, "texts": [example.inputs["text"] for example in split.examples]}


def outputs(model: Any, split: Split) -> Any:
    """Run all examples at once."""
    items = Examples(split, model)
    batch = Collator(model)([items[i] for i in range(len(items))])
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch)


def modex_model(split: Split) -> ModeXForClassification:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 16}
    config = AlbefConfig(
        vision_config={**sizes, "image_size": 8, "patch_size": 4, "num_channels": 1}, text_config=text, fusion_layer=1
    )
    adapters = ModeXConfig.preset("albef", fusion_layer=1, bottleneck=4)
    model = ModeXForClassification(AlbefModel(config), adapters, id2label=split.names, problem_type=split.problem_type)
    model.tokenizer, model.image_processor = tokenizer(), image_processor()
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_scores_are_those_of_the_model(splits: dict[str, Split], batch_size: int) -> None:
    model = make_model(splits, dtype=torch.float64, noise_std=0.1).train()
    found = model.predict(**raw(splits["dev"]), batch_size=batch_size)
    assert model.training
    expected = outputs(model, splits["dev"]).logits.softmax(-1)
    assert [list(p.scores) for p in found] == [["no", "yes"]] * 9
    torch.testing.assert_close(torch.tensor([list(p.scores.values()) for p in found]), expected.float())
    assert [p.label for p in found] == [splits["dev"].names[k] for k in expected.argmax(-1)]
    assert {len(p.labels) for p in found} == {1}
    assert found[0].experts is None


def test_several_labels(several: dict[str, Split]) -> None:
    model = make_model(several, dtype=torch.float64)
    found = model.predict(**raw(several["dev"]))
    expected = outputs(model, several["dev"]).logits.sigmoid()
    torch.testing.assert_close(torch.tensor([list(p.scores.values()) for p in found]), expected.float())
    for prediction in found:
        assert set(prediction.labels) == {name for name, score in prediction.scores.items() if score > 0.5}
        assert list(prediction.labels) == sorted(prediction.labels, key=lambda name: -prediction.scores[name])


def test_what_logits_mean(several: dict[str, Split]) -> None:
    config = make_model(several).config
    assert predictions(config, torch.tensor([[-1.0, -2, -3], [1, -1, 2]]), {}) == [
        Prediction((), pytest.approx({"bright": 0.26894, "dark": 0.11920, "true": 0.04743}, abs=1e-4)),
        Prediction(("true", "bright"), pytest.approx({"bright": 0.73106, "dark": 0.26894, "true": 0.88080}, abs=1e-4)),
    ]
    assert Prediction((), {}).label is None


@pytest.mark.parametrize("top_k", [None, 2])
def test_experts(splits: dict[str, Split], top_k: int | None) -> None:
    model = make_model(splits, dtype=torch.float64, eval_top_k=top_k)
    found = model.predict(**raw(splits["dev"]), experts=True, batch_size=4)
    routing = outputs(model, splits["dev"]).routing
    for i, prediction in enumerate(found):
        assert prediction.experts is not None and list(prediction.experts) == list(model.routed_blocks())
        for taken, of_layer in zip(prediction.experts.values(), routing, strict=True):
            pairs = dict(zip(of_layer.indices[i].tolist(), of_layer.weights[i].tolist(), strict=True))
            assert taken == pytest.approx(pairs) and len(taken) == (top_k or 4)
            assert list(taken.values()) == sorted(taken.values(), reverse=True)
    with pytest.raises(ValueError, match=r"experts: this model routes nothing \(method 'late_concat'\)"):
        make_model(splits, method="late_concat").predict(**raw(splits["dev"]), experts=True)


def test_modex(splits: dict[str, Split]) -> None:
    """The experts of an item do not depend on the padding of its batch."""
    model = modex_model(splits["dev"])
    given = raw(splits["dev"])
    found, alone = model.predict(**given, experts=True), model.predict(**given, experts=True, batch_size=1)
    expected = outputs(model, splits["dev"]).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor([list(p.scores.values()) for p in found]), expected)
    for together, single in zip(found, alone, strict=True):
        assert together.experts and single.experts and any(name.endswith(", run 2") for name in together.experts)
        for name, taken in together.experts.items():
            assert taken == pytest.approx(single.experts[name], abs=1e-5)
            assert sum(taken.values()) == pytest.approx(1)
    assert model.predict(**given)[0].experts is None
    plain = ModeXForClassification(model.encoder, None, 2)
    plain.tokenizer, plain.image_processor = model.tokenizer, model.image_processor
    with pytest.raises(ValueError, match="no adapters, so there are none to name"):
        plain.predict(**given, experts=True)


def test_what_cannot_be_predicted(splits: dict[str, Split], tmp_path: Path) -> None:
    model = make_model(splits)
    image = Image.new("L", (8, 8))
    for given, error, says in (
        ({"images": [image]}, TypeError, r"predict needs texts=\[\.\.\.\]: this model reads images, texts"),
        ({"image": [image], "texts": ["it"]}, TypeError, r"no argument image; did you mean images\?"),
        ({"images": image, "texts": ["it"]}, TypeError, r"images must be a list, got Image: predict\(images=\[\.\.\.\]\)"),
        ({"images": [image], "texts": "it"}, TypeError, "texts must be a list, got str"),
        ({"images": [image], "texts": ["it", "is"]}, ValueError, "the same number of items of each kind, got 1 images, 2 texts"),
        ({"images": [image] * 3, "texts": ["it", "is", 5]}, ValueError, r"texts\[2\] cannot be read \(int\): "),
        ({"images": [image, tmp_path / "a.png"], "texts": ["it", "is"]}, ValueError, r"images\[1\] cannot be read: .*No such file"),
        ({"images": [image], "texts": ["it"], "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=says):
            model.predict(**given)
    assert model.predict(images=[], texts=[]) == []
    with pytest.raises(ValueError, match=r"the model has no image_processor: set model\.image_processor, for example to that"):
        fusion(dtype=torch.float32).predict(images=[image], texts=["it"])


def test_images_may_be_paths_or_missing(splits: dict[str, Split]) -> None:
    model, path = make_model(splits), splits["dev"].examples[0].inputs["vision"]
    one, other, third = model.predict(images=[path, str(path), Image.open(path)], texts=["it is"] * 3)
    assert one == other == third
    grey, same = model.predict(images=[None, Image.new("L", (8, 8), 128)], texts=["it is"] * 2)
    assert grey == same != one


@pytest.fixture
def _registered() -> Iterator[None]:
    with made_up.registered():
        yield


@pytest.mark.usefixtures("_registered")
def test_other_modalities_have_their_names() -> None:
    from tests.training.test_modalities import build

    model = build(main="text", complementary=("series", "second"), named={"second": "series"})
    series = [[1.0, 2.0], [3.0, 4.0]]
    found = model.predict(texts=["it", "is bright"], series=series, second=series[::-1])
    batch = {"series_values": torch.tensor(series), "second_series_values": torch.tensor(series[::-1])}
    batch |= model.tokenizer(["it", "is bright"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(**batch).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor([list(p.scores.values()) for p in found]), expected)
