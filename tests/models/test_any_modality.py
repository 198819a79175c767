"""A registered modality and encoder work like built-in ones: as main or complementary encoder, several at once, saved, served."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import mope
from mope import MoPEConfig, MoPEForClassification
from mope.backbones import BertAdapter, ViTAdapter, known
from mope.encoders.layerwise import LayerPrompts
from mope.fusion.model import ARGUMENTS, OWN
from mope.modalities import find_modality, unregister_modality
from mope.serving import MoPEServer

from . import made_up, tiny

SIZES: dict[str, Any] = {"num_labels": 3, "num_experts": 3, "prompt_length": 2, "static_length": 2, "mapper_hidden": 8}
BATCH = tiny.BATCH


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with made_up.registered():
        yield


def encoder(name: str) -> nn.Module:
    if name not in ("vision", "text"):
        return made_up.SeriesModel(made_up.SeriesConfig()).double()
    return tiny.backbone("vit" if name == "vision" else "bert")


def batch_of(model: MoPEForClassification) -> dict[str, Tensor]:
    made = tiny.inputs()
    found = {name: made[name] for slot in model.slots.values() for name in slot.names if name in made}
    for slot in model.slots.values():
        if slot.modality.name == "series":
            found[slot.required] = torch.randn(BATCH, 6, dtype=torch.float64)
    return found


def build(**options: Any) -> MoPEForClassification:
    config = MoPEConfig(**{**SIZES, **options})
    return MoPEForClassification(config, **{name: encoder(config.slots[name].modality.name) for name in config.modalities}).double()


CASES: dict[str, dict[str, Any]] = {
    "main": {"main": "series"},
    "main, two complementary": {"main": "series", "complementary": ("vision", "text"), "cross_prompt_length": 2},
    "one of two complementary": {"complementary": ("text", "series"), "cross_prompt_length": 1},
    "alone": {"main": "series", "method": "main_only", "static_length": 2},
    "twice": {"main": "series", "complementary": ("other", "text"), "named": {"other": "series"}, "cross_prompt_length": 1},
    "two of one kind": {"main": "text", "complementary": ("left", "right"), "named": {"left": "series", "right": "series"}},
    "summed": {
        "main": "text",
        "complementary": ("left", "right"),
        "named": {"left": "series", "right": "series"},
        "combine": "sum",
    },
    "a mapper for each": {"complementary": ("text", "series"), "mapper_each": True},
    "late": {"method": "late_concat", "complementary": ("text", "series"), "static_length": 2},
    "ensemble": {"method": "ensemble", "main": "series", "complementary": ("text", "vision")},
    "shallow": {"method": "static_mapped", "main": "series", "prompt_depth": "shallow", "complementary": ("text", "vision")},
}


@pytest.mark.parametrize("case", CASES)
def test_everything_that_trains_learns_and_comes_back(case: str, tmp_path: Path) -> None:
    model = build(**CASES[case])
    batch = batch_of(model)
    model(**batch, labels=torch.arange(BATCH) % 3).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle, idle
    model.eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, backbones="copy")
    loaded = MoPEForClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-12, atol=1e-12)
    if model.config.complementary:
        psi = model.encode_complementary(**batch)
        torch.testing.assert_close(model(**batch, cross_features=psi).logits, expected, rtol=1e-12, atol=1e-12)
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, expected, rtol=1e-9, atol=1e-10)
    assert len(model.routed_blocks()) == len(model(**batch).routing or ())


@pytest.mark.parametrize("case", [name for name, options in CASES.items() if options.get("method", "mope") == "mope"])
def test_a_server_gives_what_the_model_gives(case: str, tmp_path: Path) -> None:
    model = build(**CASES[case]).eval()
    batch = batch_of(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, backbones="copy")
    server = MoPEServer(capacity=2)
    server.load("one", tmp_path)
    server.load("two", tmp_path)
    found = server(["one", "two"] * 2 + ["one"], **batch)
    torch.testing.assert_close(torch.stack([each.logits for each in found]), expected, rtol=1e-9, atol=1e-10)
    server.close()


def test_psi_is_what_the_encoders_say_side_by_side_or_summed() -> None:
    model = build(**CASES["one of two complementary"]).eval()
    batch = batch_of(model)
    of_text, of_series = model.encode_complementary(**batch).split([model.widths["text"], model.widths["series"]], -1)
    alone = build(main="vision", complementary=("series",), cross_prompt_length=1)
    # The same encoder and prompts on their own.
    alone.load_state_dict({n: t for n, t in model.state_dict().items() if n.startswith("series.")}, strict=False)
    for own, theirs in zip(alone.cross_blocks, list(model.cross_blocks)[3:], strict=True):
        own.load_state_dict(theirs.state_dict())
    values = {"series_values": batch["series_values"]}
    torch.testing.assert_close(alone.eval().encode_complementary(**values), of_series, rtol=1e-12, atol=1e-12)
    assert of_text.shape[1] != of_series.shape[1]

    summed = build(**CASES["summed"]).eval()
    batch = batch_of(summed)
    parts = [summed.encoder(m).encode(*summed.read(batch, [m])[m], LayerPrompts()) for m in ("left", "right")]
    torch.testing.assert_close(summed.encode_complementary(**batch), parts[0][0] + parts[1][0], rtol=1e-12, atol=1e-12)


def test_the_signature_names_the_inputs_of_the_instance(tmp_path: Path) -> None:
    model = build(**CASES["twice"])
    names = list(inspect.signature(model.forward).parameters)
    of_text = ["input_ids", "token_type_ids", "position_ids", "attention_mask"]
    assert names[:6] == ["series_values", "other_series_values", *of_text]
    assert "labels" in names and "inputs" not in names and "pixel_values" not in names
    other = build(**CASES["alone"])
    assert "input_ids" not in inspect.signature(other.forward).parameters
    # The signature also survives copying and pickling, and the class can be imported.
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(inspect.signature(twin.forward).parameters) == names
        assert isinstance(twin, MoPEForClassification) and type(twin).__qualname__ == "MoPEForClassification"
    assert list(inspect.signature(MoPEForClassification.forward).parameters)[-1] == "inputs"


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"modality 'sound' is not known; known are .*'series'"):
        MoPEConfig(num_labels=2, main="sound")
    with pytest.raises(ValueError, match=r"one of them twice: .*named="):
        MoPEConfig(num_labels=2, main="series", complementary=("series",))
    with pytest.raises(ValueError, match="named defines left"):
        MoPEConfig(num_labels=2, named={"left": "series"})
    with pytest.raises(ValueError, match="cannot redefine text"):
        MoPEConfig(num_labels=2, complementary=("text",), named={"text": "series"})
    with pytest.raises(ValueError, match="already used by inputs of 'text'"):
        mope.register_modality(type("Clash", (made_up.Series,), {"name": "clash", "inputs": {"input_ids": "x"}})())
    with pytest.raises(ValueError, match=r"combine='sum' adds features of one width, these are 32 of text, 16 of series"):
        build(complementary=("text", "series"), combine="sum")
    with pytest.raises(TypeError, match=r"serie, which name no modality; did you mean series"):
        MoPEForClassification(MoPEConfig(**SIZES, main="series", method="main_only"), serie=encoder("series"))
    model = build(**CASES["main, two complementary"])
    batch = batch_of(model)
    with pytest.raises(ValueError, match="series_values must be given"):
        model(**{**batch, "series_values": None})
    with pytest.raises(TypeError, match=r"no encoder reads serie_values; did you mean series_values"):
        model(**batch, serie_values=batch["series_values"])
    with pytest.raises(TypeError, match="series_values must be a tensor, got list"):
        model(**{**batch, "series_values": [1.0]})
    with pytest.raises(ValueError, match=r"got 3 in series_values, 5 in pixel_values, 5 in input_ids"):
        model(**{**batch, "series_values": batch["series_values"][:3]})
    named = build(main="series", complementary=("words",), named={"words": "text"})
    with pytest.raises(ValueError, match=r"words: input_ids must lie in 0\.\.49"):
        named(series_values=batch["series_values"], words_input_ids=batch["input_ids"] + 49)


@pytest.mark.parametrize("name", ["head", "blocks", "mapper", "dtype", "device", "encoder"])
def test_an_encoder_is_not_called_like_something_else_in_a_model(name: str) -> None:
    config = MoPEConfig(**SIZES, main="vision", complementary=(name,), named={name: "series"})
    with pytest.raises(ValueError, match=f"something else that is called {name}"):
        MoPEForClassification(config, vision=encoder("vision"), **{name: encoder("series")})
    with pytest.raises(ValueError, match="cannot redefine"):
        MoPEConfig(**SIZES, complementary=("forward",), named={"forward": "series"})


@pytest.mark.parametrize("name", ["config", "device", "training", "train", "forward", "labels"])
def test_a_modality_with_an_unlucky_name_leaves_other_models_alone(name: str) -> None:
    mope.register_modality(type("Unlucky", (made_up.Series,), {"name": name, "inputs": {"unlucky_values": "values"}})())
    try:
        model = tiny.fusion().eval()
        assert model(**tiny.inputs()).logits.shape == (BATCH, 3) and model.device.type == "cpu"
        # `labels` is an argument of forward itself and is not passed to encoders.
        if name != "labels":
            with pytest.raises((TypeError, ValueError)):
                build(main="vision", complementary=(name,))
    finally:
        unregister_modality(name)


@pytest.mark.parametrize("inputs", [{"a b": "x"}, {"class": "x"}, {"self": "x"}, {"_hidden": "x"}, {}])
def test_names_that_no_argument_can_have_are_refused(inputs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"must be valid, non-private argument names|needs inputs"):
        mope.register_modality(type("Odd", (made_up.Series,), {"name": "odd", "inputs": inputs})())
    assert "odd" not in mope.modalities.known()


def test_an_input_that_forward_has_already_is_refused() -> None:
    mope.register_modality(type("Labelled", (made_up.Series,), {"name": "labelled", "inputs": {"labels": "values"}})())
    try:
        vision, values = encoder("vision"), encoder("series")
        with pytest.raises(ValueError, match="forward has an argument labels of its own"):
            MoPEForClassification(MoPEConfig(**SIZES, complementary=("labelled",)), vision=vision, labelled=values)
        assert all(p.requires_grad for p in vision.parameters())
    finally:
        unregister_modality("labelled")


class Halved(made_up.SeriesAdapter):
    """A series encoder that embeds each pair of values as one token."""

    def embed(self, model: Any, inputs: dict[str, Any], token_mask: Tensor | None) -> Tensor:
        return model.embed(inputs["values"].unflatten(1, (-1, 2)).mean(-1, keepdim=True))

    def token_mask(self, model: Any, mask: Tensor) -> Tensor:
        return mask.unflatten(1, (-1, 2)).any(-1)


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("places", ["right", "left", "middle"])
def test_padding_of_a_modality_whose_embedding_changes_the_length(places: str, main: bool) -> None:
    """Check that each item gives the same result as when run alone, wherever its padding is."""
    mope.register_modality(type("Masked", (made_up.Series,), {"mask": "series_mask"})())
    mope.register_backbone("made_up_series", Halved)
    model = build(main="series" if main else "vision", complementary=("vision",) if main else ("series",)).eval()
    pixels, values = tiny.inputs()["pixel_values"], torch.randn(BATCH, 8, dtype=torch.float64)
    kept = {"right": [0, 1, 2, 3], "left": [4, 5, 6, 7], "middle": [2, 3, 4, 5]}[places]
    mask = torch.ones(BATCH, 8, dtype=torch.long)
    mask[1] = torch.zeros(8, dtype=torch.long).index_fill(0, torch.tensor(kept), 1)
    logits = model(pixel_values=pixels, series_values=values.masked_fill(mask == 0, 1e3), series_mask=mask).logits
    alone = model(pixel_values=pixels[1:2], series_values=values[1:2, kept]).logits
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-9, atol=1e-10)
    rest = [0, 2, 3, 4]
    full = model(pixel_values=pixels[rest], series_values=values[rest]).logits
    torch.testing.assert_close(logits[rest], full, rtol=1e-9, atol=1e-10)
    for shape in ((BATCH, 6), (BATCH, 1), (BATCH,), (BATCH, 8, 1), (BATCH - 1, 8)):
        with pytest.raises(ValueError, match=r"series_mask must be \(5, 8\)"):
            model(pixel_values=pixels, series_values=values, series_mask=torch.ones(shape))


def test_a_sum_of_features_has_the_widest_dtype() -> None:
    model = build(**CASES["summed"])
    small, large = torch.ones(1, 16, dtype=torch.float16), torch.full((1, 16), 7e4)
    for features in ([small, large], [large, small]):
        assert torch.equal(model.combine(features), large + 1)


class Positional(MoPEForClassification):
    def forward(self, series_values: Any = None, *, extra: int = 0, **inputs: Any) -> Any:
        return super().forward(series_values=series_values, **inputs)


class Rest(MoPEForClassification):
    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs)


@pytest.mark.parametrize("kind", [Positional, Rest])
def test_a_forward_of_a_subclass_keeps_what_it_passes_on(kind: type[MoPEForClassification]) -> None:
    config = MoPEConfig(**{**SIZES, "main": "series", "complementary": ("text",)})
    model = kind(config, series=encoder("series"), text=encoder("text")).double()
    names = list(inspect.signature(model.forward).parameters)
    assert len(set(names)) == len(names) and {"series_values", "input_ids", "labels", "cross_features"} <= set(names)
    assert ("extra" in names) == (kind is Positional) and "inputs" not in names
    assert model(**batch_of(model), labels=torch.zeros(BATCH, dtype=torch.long)).loss.isfinite()
    assert type(copy.deepcopy(model)).__mro__[1] is kind


@pytest.mark.parametrize("case", ["main", "main, two complementary", "one of two complementary"])
def test_plain_trainer_trains_it(case: str, tmp_path: Path) -> None:
    model = build(**CASES[case]).float()
    batch = {name: t.float() if t.is_floating_point() else t for name, t in batch_of(model).items()}
    items = [{**{name: t[i] for name, t in batch.items()}, "labels": i % 3, "unread": i} for i in range(BATCH)]
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "epoch"}
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=4, learning_rate=1e-2, **options)
    trainer = Trainer(model, arguments, train_dataset=items, eval_dataset=items)  # type: ignore[arg-type]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(items).predictions.shape == (BATCH, 3)  # type: ignore[arg-type]


def test_what_a_model_has_of_its_own_is_known() -> None:
    model = build(**CASES["main, two complementary"])
    own = {name for name in (*vars(model), *model._modules) if not name.startswith("_")} - {"vision", "text", "series"}
    assert own <= OWN
    arguments = set(inspect.signature(MoPEForClassification.forward).parameters) - {"self", "inputs"}
    assert arguments == ARGUMENTS


def test_an_encoder_and_a_modality_take_less_than_40_lines() -> None:
    source = inspect.getsource(made_up)
    code = [line for line in source[source.index("class Series") :].splitlines() if line.strip()]
    assert 20 < len(code) < 40


def test_an_adapter_without_pool_is_refused() -> None:
    silent = type("Silent", (made_up.SeriesAdapter,), {"pool": made_up.BackboneAdapter.pool})
    with pytest.raises(TypeError, match="pool"):
        mope.register_backbone("silent", silent)
    assert "silent" not in known()


class Rotating(BertAdapter):
    """A BERT with the extras that other encoders put between projections and scores, each of which can be switched on or off."""

    turn, norms, biased = True, False, False

    def context(self, model: Any, tokens: Tensor, padding: Any) -> Any:
        length = tokens.shape[1]
        angle = torch.arange(length, dtype=tokens.dtype)[:, None] * torch.linspace(0.1, 1, 8, dtype=tokens.dtype)
        places = torch.arange(length)
        return angle.cos(), angle.sin(), 0.1 * (places - places[:, None]).abs().to(tokens.dtype)

    def prepare(self, layer: Any, query: Tensor, key: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        cos, sin, _ = context

        def turned(x: Tensor) -> Tensor:
            first, last = x.chunk(2, -1)
            return torch.cat([first * cos - last * sin, last * cos + first * sin], -1) if self.turn else x

        return turned(self._normed(query)), turned(self._normed(key))

    def prepare_prompts(self, layer: Any, key: Tensor) -> Tensor:
        return self._normed(key)

    def _normed(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) if self.norms else x

    def attention_bias(self, layer: Any, context: Any) -> Tensor | None:
        return context[2] if self.biased else None


@pytest.mark.parametrize("experts", [0, 3, 8])
@pytest.mark.parametrize("changes", [{"turn": True}, {"norms": True}, {"biased": True}, {"turn": False}], ids=str)
def test_hooks_between_projections_and_scores(changes: dict[str, bool], experts: int) -> None:
    """Compare with attention written out over [prompts; tokens]: prompts are normalised but not rotated, and have no bias."""
    options = {"method": "mope", "num_experts": experts} if experts else {"method": "static_mapped"}
    adapter = type("Changed", (Rotating,), {"turn": False, **changes})
    before = known()["bert"]
    try:
        mope.register_backbone("bert", adapter)
        torch.manual_seed(0)
        model = tiny.fusion(main="text", temperature=1.0, use_mapped=True, **options).eval()
    finally:
        mope.register_backbone("bert", type(before))
    batch = tiny.inputs(lengths=(7,) * BATCH)
    block, layer = model.blocks[0], model.text.encoder.layer[0].layer
    hidden = torch.randn(BATCH, 7, 32, dtype=torch.float64)
    psi, mapped = torch.randn(BATCH, 32, dtype=torch.float64), torch.randn(BATCH, 1, 32, dtype=torch.float64)
    own: Any = adapter()
    context = own.context(model.text, hidden, None)
    frozen = own.attend(layer, context)
    found, routing = block(hidden, psi if experts else None, mapped=mapped, frozen=frozen)
    rows = [block.static.expand(BATCH, -1, -1), mapped]
    if experts:
        rows.append(torch.einsum("bk,kpc->bpc", routing.probs.double(), block.experts.prompts))
    prompts = torch.cat(rows, 1)
    plain = own.attention(layer)
    query, key, value = plain.project(hidden)
    query, key = own.prepare(layer, query, key, context)
    prompt_key, prompt_value = plain.keys_and_values(prompts)
    prompt_key = own.prepare_prompts(layer, prompt_key)
    scores = query @ torch.cat([prompt_key, key], 2).mT * 16**-0.5
    bias = own.attention_bias(layer, context)
    if bias is not None:
        scores[..., prompts.shape[1] :] += bias
    expected = plain.merge(scores.softmax(-1) @ torch.cat([prompt_value, value], 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    # The whole model follows the same path, with banks where they are supported.
    logits = model(**batch).logits
    with model.serving() as predict:
        torch.testing.assert_close(predict(**batch).logits, logits, rtol=1e-9, atol=1e-10)


def test_shallow_prompts_are_refused_where_they_would_shift_positions() -> None:
    before = known()["bert"]
    try:
        mope.register_backbone("bert", Rotating)
        with pytest.raises(ValueError, match="prompt_depth='shallow' is not supported with Rotating"):
            tiny.fusion(main="text", method="static_mapped", prompt_depth="shallow")
    finally:
        mope.register_backbone("bert", type(before))


def test_only_the_files_of_a_modality_name_its_inputs() -> None:
    """Benchmarks, demos, the package for the released code and the encoders themselves are exempt."""
    root = Path(mope.__file__).parent
    own = [find_modality(name) for name in ("vision", "text")]
    names = {next(iter(modality.inputs)) for modality in own}
    allowed = ("benchmark/", "demo/", "released/", "modalities/vision.py", "modalities/text.py", "backbones/", "modex/albef.py")
    guilty = {
        str(file.relative_to(root)): sorted(name for name in names if name in file.read_text())
        for file in root.rglob("*.py")
        if not str(file.relative_to(root)).startswith(allowed)
    }
    assert not {file: found for file, found in guilty.items() if found}


def test_vit_takes_the_flag_of_its_modality() -> None:
    assert ViTAdapter().takes("interpolate_pos_encoding") and not BertAdapter().takes("interpolate_pos_encoding")
