"""One training run: a model, data, a recipe and a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mope.data import Collator, DataError, Examples, FeatureCache, RandAugment, Split, cached_features
from mope.files import write_text
from mope.finite import NotFiniteError, infinite
from mope.fusion import MoPEConfig
from mope.fusion.base import FusionModel
from mope.modalities import complementary_of, slots_of
from mope.processes import wait_for_all

from .encoders import processor_options
from .evaluation import choose_threshold, evaluate
from .metrics import class_weights
from .options import RunOptions
from .recipe import AUTO, Recipe
from .trainer import FusionTrainer, last_checkpoint, read_state

CACHE = ("auto", "on", "off")
RUN = "run.json"


class TrainingRun:
    """One training run. The constructor checks everything that can be wrong; `train` then does the work.

    `out` gets `run.json` (model, recipe and data of the run), `checkpoint-STEP/` (the last and the best), `tensorboard/`,
    `features/`, and `model/` with the best model as `save_pretrained` writes it.

    Args:
        model: the model, with tokenizer and image processor.
        splits: "train", and optionally "dev" and "test". Without dev, no checkpoint is the best, and the last weights are kept.
        recipe: the hyperparameters. Its metric may be None.
        out: the folder of the run: a new one, or that of a run to resume.
        resume: continue from the last checkpoint in `out`, or from the given one.
        cache_features: "auto" computes the features of the complementary encoders once if training does not change them; "on"
            raises an error if it does; "off" does not cache.
        features: the folder of the cache; the default is in `out`.
        copy_backbones: whether to put copies of the encoders into the saved model.
        options: how to carry out the run; `changes` are fields of it (`seed=1, device="cpu"`). The seed does not affect the
            initial weights, which are drawn when the model is made.

    Raises:
        ValueError: data, model, recipe or folder do not fit together. The message names the problem.
    """

    def __init__(
        self,
        model: FusionModel,
        splits: Mapping[str, Split],
        recipe: Recipe,
        out: str | Path,
        *,
        resume: bool | str | Path = False,
        cache_features: str = "auto",
        features: str | Path | None = None,
        copy_backbones: bool = False,
        options: RunOptions | None = None,
        **changes: Any,
    ) -> None:
        options = (options or RunOptions()).replace(**changes)
        if cache_features not in CACHE:
            raise ValueError(f"cache_features must be one of {', '.join(CACHE)}, got {cache_features!r}")
        if "train" not in splits:
            raise ValueError(f"splits must hold 'train', got {', '.join(splits) or 'none'}")
        if splits["train"].problem_type == "single_label" and len(splits["train"].names) == 1:
            raise ValueError(f"the only class is {splits['train'].names[0]!r}: there is nothing to learn")
        self.model, self.splits, self.out, self.seed = model, dict(splits), Path(out), options.seed
        self.recipe = recipe.for_problem(splits["train"].problem_type)
        self._check_threshold()
        weights = self.recipe.class_weights
        self.features_folder = self.out / "features" if features is None else Path(features)
        self.num_workers, self.eval_batch_size = options.num_workers, options.eval_batch_size or recipe.batch_size
        self.copy_backbones, self.progress = copy_backbones, options.progress
        self.caches_features = self._caches_features(cache_features)
        self.augment = RandAugment(magnitude=self.recipe.augment) if self.recipe.augment else False
        self.checkpoint = self._checkpoint(resume)
        # These are created for their checks; `train` replaces them if features are cached.
        items = {name: self._examples(name) for name in self.splits}
        self.trainer = FusionTrainer(
            model,
            self.recipe,
            self.out,
            collate=Collator(model),
            train_items=items["train"],
            dev_items=items.get("dev"),
            class_weights=None if weights is None else class_weights(weights, splits["train"]),
            options=options,
        )
        self._check_first_example()
        if self.checkpoint is not None:
            self._check_steps(read_state(self.checkpoint))

    def _check_threshold(self) -> None:
        """Give the model the threshold of the recipe, where that is a number. ValueError where there is nothing to choose it by."""
        threshold = self.recipe.threshold
        if threshold == AUTO and "dev" not in self.splits:
            raise ValueError("threshold='auto' is chosen on the dev split, and there is none: give one, or a number")
        if threshold not in (None, AUTO):
            self.model.config = self.model.config.replace(threshold=float(threshold))  # type: ignore[arg-type]

    def _choose_threshold(self, features: FeatureCache | None) -> float:
        """Give the model the threshold with the best metric on dev."""
        threshold = choose_threshold(
            self.model,
            self.splits["dev"],
            str(self.recipe.metric),
            batch_size=self.eval_batch_size,
            features=features,
            num_workers=self.num_workers,
        )
        self.model.config = self.model.config.replace(threshold=threshold)
        return threshold

    def _check_first_example(self) -> None:
        """Raise ValueError if the encoders cannot process the first example, so that the run fails now and not at step 1."""
        model, was_training = self.model, self.model.training
        items = self._examples("train")
        slots = slots_of(model.config).values()
        batch: dict[str, Any] = {}
        model.eval()
        try:
            # Keep this check from advancing the run's random generator.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                batch = model.on_device(Collator(model)([items[0]]))
                model(**batch)
        # Its message already names the file that cannot be read.
        except DataError:
            raise
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            first = repr(self.splits["train"].examples[0].id)
            given = ", ".join([first, *filter(None, (slot.modality.describe(slot.own(batch)) for slot in slots))])
            processors = processor_options(slots)
            advice = f". Name the {' and the '.join(processors)} of these encoders ({', '.join(processors.values())})"
            raise ValueError(
                f"the first training example, {given}, does not go through the model: {error}{advice if processors else ''}"
            ) from error
        finally:
            model.train(was_training)

    def train(self) -> dict[str, Any]:
        """Train, load the best weights, evaluate and save -> the results of the run, the same on every process.

        In the results, "stopped" is true if a signal ended training early; then only a checkpoint was written. The metrics of dev
        and test are those of the saved model, computed without autocast.

        Raises:
            NotFiniteError: the loss of a step, or a metric, is not finite. The message says what to change. Earlier checkpoints
                remain, and are finite.
        """
        start = time.perf_counter()
        # Write only after all processes have inspected the folder.
        wait_for_all()
        caches = self._cache_features()
        trainer = self.trainer
        if caches:
            trainer.train_dataset = trainer.batches.items = self._examples("train", caches["train"])
            trainer.eval_dataset = self._examples("dev", caches["dev"]) if "dev" in caches else None
        if self._is_first_process():
            write_text(self.out / RUN, json.dumps(self.identity(), indent=2) + "\n")
        trainer.train_until_stopped(self.checkpoint)
        state = trainer.state
        results: dict[str, Any] = {
            "seed": self.seed,
            "steps": state.global_step,
            "epochs": state.epoch,
            "stopped": trainer.interruption.arrived is not None,
            "best_step": None,
            "parameters": {
                "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                "all": sum(p.numel() for p in self.model.parameters()),
            },
            "processes": trainer.args.world_size,
        }
        if trainer.stepping.is_on:
            results["graphs"] = trainer.stepping.describe()
        if not results["stopped"]:
            results["best_step"] = trainer.load_best()
            if self.recipe.threshold == AUTO:
                self._choose_threshold(caches.get("dev"))
            if self.model.config.problem_type == "multi_label":
                results["threshold"] = self.model.config.threshold
            for name in [name for name in self.splits if name != "train"]:
                results[name] = evaluate(
                    self.model,
                    self.splits[name],
                    batch_size=self.eval_batch_size,
                    features=caches.get(name),
                    num_workers=self.num_workers,
                    progress=self.progress,
                )
                if wrong := infinite(results[name]):
                    raise NotFiniteError(
                        f"{' and '.join(wrong)} of {name} is not finite, with the weights of step "
                        f"{results['best_step'] or results['steps']}: its images may contain values that are not finite, or that "
                        "make the encoders overflow"
                    )
            if self._is_first_process():
                self.model.card_data = {
                    "examples": {name: len(split) for name, split in self.splits.items()},
                    "results": {name: results[name] for name in self.splits if name in results},
                    "recipe": dataclasses.asdict(self.recipe),
                    "seed": self.seed,
                }
                self.model.save_pretrained(self.out / "model", backbones="copy" if self.copy_backbones else "by_name")
            wait_for_all()
        if caches:
            results["features"] = {
                name: {"computed": cache.computed, "seconds": cache.seconds, "seconds_per_epoch": cache.seconds_per_epoch}
                for name, cache in caches.items()
            }
        return {**results, "seconds": time.perf_counter() - start}

    def identity(self) -> dict[str, Any]:
        """Return everything that must stay the same for a run to be resumed."""
        recipe = dataclasses.asdict(self.recipe)
        # The form in which earlier versions wrote it.
        config = self.model.config
        config = config.flat() if isinstance(config, MoPEConfig) else {**config.to_dict(), "problem_type": config.problem_type}
        # More epochs continue a run, and the way a batch is split only changes rounding.
        for name in ("epochs", "accumulation", "precision"):
            del recipe[name]
        return json.loads(
            json.dumps(
                {
                    "config": {name: value for name, value in config.items() if name != "mope_version"},
                    "recipe": recipe,
                    "backbones": self.model.fingerprints(),
                    "seed": self.seed,
                    # Dev decides which weights are the best.
                    **{name: _description(self.splits[name]) for name in ("train", "dev") if name in self.splits},
                }
            )
        )

    def _checkpoint(self, resume: bool | str | Path) -> Path | None:
        out, last = self.out, last_checkpoint(self.out)
        if resume is False:
            if last is not None or (out / RUN).exists():
                raise ValueError(f"{out} holds a run already: choose another folder, remove it, or resume")
            if (out / "model").exists():
                raise ValueError(f"{out} holds a model already, which would be overwritten: choose another folder")
            if out.exists() and not out.is_dir():
                raise ValueError(f"{out} is a file: give a folder")
            return None
        checkpoint = last if resume is True else Path(resume)
        if checkpoint is not None:
            read_state(checkpoint)
        record = (out if checkpoint is None else checkpoint.parent) / RUN
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"there is no run to resume in {record.parent} ({error})") from error
        if changed := _differences(before, self.identity()):
            raise ValueError(f"{record.parent} holds another run: {'; '.join(changed[:5])}")
        # None if the run stopped before its first checkpoint.
        return checkpoint

    def _check_steps(self, state: dict[str, Any]) -> None:
        """Raise ValueError if epochs had another number of steps before.

        A last batch that is too small to be split is dropped, so the number depends on processes and parts, and the steps done
        would count as a different number of epochs.
        """
        if not state["epoch"]:
            return
        before, now = round(state["global_step"] / state["epoch"]), self.trainer.batches.steps
        if before != now:
            raise ValueError(
                f"{self.checkpoint} is from epochs of {before} steps, but here they have {now}, because the last batch of an epoch "
                "is split over another number of processes or parts: resume with as many as before"
            )

    def _caches_features(self, wanted: str) -> bool:
        if wanted == "off":
            return False
        names, slots = complementary_of(self.model.config), slots_of(self.model.config)
        trained = [name for name in names if self.model.trains(name)]
        augmented = [slots[name].modality.plural for name in names if slots[name].modality.augments]
        against = ""
        if not names:
            against = f"method {self.model.config.method!r} has no complementary encoder"
        elif trained:
            against = f"training changes the features of the {trained[0]} encoder"
        elif augmented and self.recipe.augment:
            against = f"{augmented[0]} are augmented"
        if wanted == "on" and against:
            raise ValueError(f"features cannot be cached: {against}")
        return not against

    def _cache_features(self) -> dict[str, FeatureCache]:
        if not self.caches_features:
            return {}
        caches = {}
        # Only MoPE models have complementary encoders.
        model: Any = self.model.eval()
        for name, split in self.splits.items():
            caches[name] = cached_features(
                model, split, self.features_folder, batch_size=self.eval_batch_size, num_workers=self.num_workers
            )
            if self.progress and self._is_first_process():
                print(f"{name}: {caches[name].describe(self.recipe.epochs if name != 'test' else 1)}")
        return caches

    def _examples(self, name: str, features: FeatureCache | None = None) -> Examples:
        return Examples(
            self.splits[name],
            self.model,
            training=name == "train",
            augment=self.augment if name == "train" else False,
            features=features,
            seed=self.seed,
        )

    def _is_first_process(self) -> bool:
        return self.trainer.args.process_index == 0


def train(model: FusionModel, splits: Mapping[str, Split], recipe: Recipe, out: str | Path, **options: Any) -> dict[str, Any]:
    """Make a `TrainingRun` of the arguments, and train it."""
    return TrainingRun(model, splits, recipe, out, **options).train()


def _description(split: Split) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in split.examples:
        items = [slot.modality.identity(example.inputs[slot.name]) for slot in split.slots]
        digest.update(json.dumps([example.id, *items, example.labels]).encode())
    return {"examples": len(split), "sha256": digest.hexdigest()}


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """List the differences between two trees of values. Ignore what only `now` has, because a newer version added it."""
    if isinstance(before, dict) and isinstance(now, dict):
        named = [(f"{where}.{name}" if where else name, value, now.get(name)) for name, value in before.items()]
        return [difference for name, value, current in named for difference in _differences(value, current, name)]
    return [] if before == now else [f"{where} was {before!r} and is {now!r}"]
