"""Carry out `mope train` and `mope evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mope import environment
from mope.data import Examples, Split, hold_out, read_split
from mope.data.formats import JSONL, NoLabelsError, files_of, slots_to_read
from mope.devices import find_device
from mope.finite import NotFiniteError, infinite
from mope.fusion.base import FusionModel
from mope.fusion.predicting import predictions
from mope.modalities import Slot, slots_of

from . import report
from .columns import DEV_SHARE, columns_of
from .confusion import CONFUSION, PREDICTIONS, Answers, Confusion, write_predictions
from .encoders import processors_of, sources_of
from .evaluation import evaluate
from .extensions import in_mode, modes
from .loading import adopt_classes, make_config, new_model, new_modex_model, open_model, slots_in
from .options import RunOptions
from .recipe import RECIPES, Recipe
from .runs import TrainingRun


class TrainingJob:
    """The work of `mope train`: one run for each seed.

    Raises:
        ValueError, OSError: something is wrong with the options. The constructor finds that before training starts.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        _check_system(options)
        # Create the process group before anything else needs it.
        self.state = PartialState(cpu=find_device(options.device).type == "cpu")
        self.seeds: list[int] = options.seeds or [options.seed]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: the same seed is given twice")
        if isinstance(options.resume, str) and len(self.seeds) > 1:
            raise ValueError("--resume CHECKPOINT works with one seed only; --resume alone continues every run of --seeds")
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
        self.recipe = RECIPES[options.format].replace(**{name: value for name, value in given.items() if value is not None})
        self.splits = _read_splits(options)
        # Training examples that became the dev split.
        self.held_out = 0
        self._hold_out_dev()
        # Check only the first run: the others differ in nothing that could be wrong.
        self._first: TrainingRun | None = self._make_run(self.seeds[0])
        self.description = self._describe(self._first)

    def train(self) -> int | None:
        """Train and evaluate all runs, and write and print their table -> the number of the signal that stopped it, or None.

        Raises:
            NotFiniteError: runs diverged. The other runs were still finished, and the results list the ones that failed.
        """
        results, diverged = [], {}
        for seed in self.seeds:
            # Drop each run after use, because the next one needs the memory.
            run, self._first = self._first or self._make_run(seed), None
            self._announce(run)
            try:
                result = run.train()
            except NotFiniteError as error:
                diverged[seed] = str(error)
            finally:
                run.model.detach()
            if seed in diverged:
                del run
                continue
            if result["stopped"]:
                self.state.print(f"\nstopped at step {result['steps']}; the same command with --resume continues")
                return run.trainer.interruption.arrived
            results.append(result)
            del run
        if self.state.is_main_process:
            text = report.runs_table(results)
            failed = [{"seed": seed, "error": error} for seed, error in diverged.items()]
            found = {**self.description, "runs": results, **report.summary(results)}
            report.write(self.options.out, found | ({"failed": failed} if failed else {}), text)
            if results:
                print(f"\n{text}")
            for result in results:
                print(self._out(result["seed"]) / "model")
        if diverged:
            raise NotFiniteError("; ".join(f"seed {s}: {e}" if len(self.seeds) > 1 else e for s, e in diverged.items()))
        return None

    def _hold_out_dev(self) -> None:
        """Take a dev split from the training split, where there is none, by default of tables only."""
        options, train = self.options, self.splits["train"]
        share = options.dev_share
        if share is None:
            share = 0.0 if files_of(options.data, "train")[0].suffix == JSONL else DEV_SHARE
        if "dev" in self.splits or not share or len(train) < 2:
            return
        kept, held = hold_out(train, share, options.dev_seed)
        self.held_out = len(held)
        # Dev before test, as where it is read.
        self.splits = {"train": kept, "dev": held, **{name: split for name, split in self.splits.items() if name != "train"}}
        self.state.print(
            f"{options.data} has no dev split: {len(held)} of {len(train)} training examples (--dev-share {share:g} "
            f"--dev-seed {options.dev_seed}) are held out to choose the best weights, and do not train"
        )

    def _out(self, seed: int) -> Path:
        out: Path = self.options.out
        return out / f"seed-{seed}" if len(self.seeds) > 1 else out

    def _make_run(self, seed: int) -> TrainingRun:
        options = self.options
        torch.manual_seed(seed)
        splits = dict(self.splits)
        if options.shots is not None:
            splits["train"] = splits["train"].subset(options.shots, seed)
        model = self._make_model(splits["train"])
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        out = self._out(seed)
        # With several seeds, some runs may be finished and some not started.
        resume = options.resume if len(self.seeds) == 1 else bool(options.resume) and (out / "run.json").exists()
        try:
            return TrainingRun(
                model,
                splits,
                self.recipe,
                out,
                resume=resume,
                cache_features=options.cache_features,
                features=options.features or options.out / "features",
                # The fused model joined here from two encoders is stored nowhere else.
                copy_backbones=options.copy_backbones or (self._is_modex and options.model is None),
                options=RunOptions(
                    seed=seed,
                    device=options.device,
                    num_workers=options.num_workers,
                    max_steps=options.max_steps,
                    save_steps=options.save_steps,
                    graphs=options.graphs,
                    length_buckets=options.length_buckets,
                    report_to=options.report_to,
                ),
            )
        except BaseException:
            model.detach()
            raise

    @property
    def _is_modex(self) -> bool:
        return bool(self.options.system == "modex")

    def _make_model(self, train: Split) -> FusionModel:
        options, sources = self.options, sources_of(self.options)
        processors: dict[str, Any] = {"processors": processors_of(options), "format": options.format}
        if options.from_checkpoint is not None:
            if options.set:
                raise ValueError("--set is for a new model; --from-checkpoint has its own configuration")
            if options.model is not None:
                raise ValueError("--model is for a new model; --from-checkpoint has its own encoders")
            model = open_model(options.from_checkpoint, sources, mode=options.mode, **processors)
            adopt_classes(model, train)
            if (system := _system_of(model)) != options.system:
                model.detach()
                raise ValueError(f"{options.from_checkpoint} is a model of --system {system}")
            return model
        if self._is_modex:
            return new_modex_model(
                train, model=options.model, sources=sources, preset=options.preset, fields=dict(options.set), **processors
            )
        fields = dict(options.set) | ({"prompt_owner": options.mode} if options.mode else {})
        config = make_config(options.preset or options.method or "mope", train, **fields)
        return new_model(config, sources, **processors)

    def _announce(self, run: TrainingRun) -> None:
        config, recipe = run.model.config, run.recipe
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        sizes = ", ".join(f"{len(split)} {name}" for name, split in run.splits.items())
        self.state.print(
            f"{_title(run.model)}: {trained:,} trained parameters; {sizes} examples of {config.num_labels} "
            f"classes; seed {run.seed}, {recipe.epochs} epochs of {run.trainer.batches.steps} steps of {recipe.batch_size} on "
            f"{environment.device_name(run.trainer.args.device)}, {self.state.num_processes} process(es)"
        )
        stepping = run.trainer.stepping
        if stepping.is_on:
            slots = slots_of(config)
            lengths = "".join(
                f", {slots[name].modality.plural} padded to {', '.join(map(str, of))} tokens"
                for name, of in stepping.lengths.items()
            )
            where = (
                "through CUDA graphs" if run.trainer.args.device.type == "cuda" else "as if through CUDA graphs (a CPU has none)"
            )
            self.state.print(f"full batches go {where}{lengths}")
        elif run.trainer.args.device.type == "cuda" and self.options.graphs == "auto":
            self.state.print(f"no CUDA graphs: {stepping.why_not}")
        if "test" not in run.splits and files_of(self.options.data, "test"):
            self.state.print(f"{self.options.data}: the test split is skipped because none of its examples has a label")
        if (gpus := torch.cuda.device_count()) > self.state.num_processes and run.trainer.args.device.type == "cuda":
            self.state.print(
                f"{gpus} GPUs, {self.state.num_processes} used: torchrun --nproc-per-node {gpus} -m mope.cli train ... uses all"
            )

    def _describe(self, run: TrainingRun) -> dict[str, Any]:
        return {
            "config": run.model.config.to_dict(),
            "recipe": dataclasses.asdict(run.recipe),
            "data": {
                "folder": str(self.options.data),
                "format": self.options.format,
                "shots": self.options.shots,
                **columns_of(self.options),
                "held_out": self.held_out,
            },
            **_how(self.options, run.trainer.args.device),
        }


class EvaluationJob:
    """The work of `mope evaluate`.

    Raises:
        ValueError, OSError: something is wrong with the options. The constructor finds that before evaluation starts.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        place = find_device(options.device)
        self.state = PartialState(cpu=place.type == "cpu")
        if options.device != "auto" and place.type != "cpu" and self.state.num_processes > 1:
            raise ValueError(f"each of {self.state.num_processes} processes uses its own GPU: leave --device {options.device} out")
        self.device = self.state.device if options.device == "auto" or place.type == "cpu" else place
        if options.compare_modes and options.mode:
            raise ValueError("--compare-modes evaluates in all modes: leave --mode out")
        self.batch_sizes = options.batch_sizes or ([1, 8, 32] if options.compare_modes else [32])
        self.model = open_model(
            options.model,
            sources_of(options),
            mode=options.mode,
            processors=processors_of(options),
            format=options.format,
        )
        self.split = _read_split(options, self.model)
        adopt_classes(self.model, self.split)
        if options.compare_modes:
            # Raises an error with the reason if the model has only one mode.
            with in_mode(self.model, modes()[0]):
                pass
        self.model.to(self.device)
        # Checks that classes, tokenizer and image processor fit the model.
        Examples(self.split, self.model)
        if options.out is not None:
            # Fail now rather than after an hour.
            report.refuse_other(options.out)
            options.out.mkdir(parents=True, exist_ok=True)

    def evaluate(self) -> list[dict[str, Any]]:
        """Evaluate the model, and print and write the results -> a dict for each row of the printed table.

        Classes and predictions are those of the first row.

        Raises:
            NotFiniteError: a metric is not finite.
        """
        wanted = modes() if self.options.compare_modes else (None,)
        rows: list[dict[str, Any]] = []
        answers = Answers()
        for size in self.batch_sizes:
            for mode in wanted:
                metrics = evaluate(
                    self.model,
                    self.split,
                    batch_size=size,
                    mode=mode,
                    num_workers=self.options.num_workers,
                    progress=True,
                    see=None if rows else answers.see,
                )
                rows.append({"batch_size": size, **({"mode": mode} if mode else {}), **metrics})
        logits = answers.all()
        if self.state.is_main_process:
            found = predictions(self.model.config, logits, {})
            confusion = Confusion.of(self.split, found)
            text = f"{report.metrics_table(rows)}\n{confusion.table()}"
            print(text)
            if self.options.out is not None:
                write_predictions(self.split, found, self.options.out / PREDICTIONS)
                confusion.write(self.options.out / CONFUSION)
                description = {
                    "model": str(self.options.model),
                    "data": {"folder": str(self.options.data), "format": self.options.format, "split": self.options.split},
                    "examples": len(self.split),
                    "processes": self.state.num_processes,
                    **_how(self.options, self.device),
                }
                classes = {"classes": confusion.classes(), "confusion": confusion.matrix.tolist()}
                report.write(self.options.out, {**description, "rows": rows, **classes}, text)
        if wrong := sorted({name for row in rows for name in infinite({n: v for n, v in row.items() if isinstance(v, float)})}):
            raise NotFiniteError(
                f"{' and '.join(wrong)} of {self.split.name} is not finite: the model or the images contain values that are not "
                "finite, or that make the encoders overflow"
            )
        return rows


def _read_splits(options: argparse.Namespace) -> dict[str, Split]:
    """Read train, and dev and test if they exist. Skip a test split without labels, because many are published that way."""
    wanted: dict[str, Any] = {"modalities": _slots_to_train(options), **columns_of(options)}

    def read(split: str, names: Sequence[str] | None = None) -> Split:
        return read_split(options.data, options.format, split, names=names, on_missing_image=options.on_missing_image, **wanted)

    splits = {"train": read("train")}
    for name in ("dev", "test"):
        if files_of(options.data, name):
            try:
                splits[name] = read(name, names=splits["train"].names)
            # Dev chooses the best checkpoint, so missing labels (for example a wrong key) must be reported before training.
            except NoLabelsError:
                if name == "dev":
                    raise
    return splits


def _slots_to_train(options: argparse.Namespace) -> tuple[Slot, ...] | None:
    """Return the modalities that the model to train reads, before the classes are known; None for text and image."""
    if options.system == "modex":
        return None
    # Errors are reported when the model is built.
    with suppress(OSError, TypeError, ValueError):
        if options.from_checkpoint is not None:
            return slots_in(options.from_checkpoint)
        fields = {name: value for name, value in options.set if name in ("main", "complementary", "named")}
        return slots_to_read(make_config(options.preset or options.method or "mope", None, **fields))
    return None


# The options that only one system has.
_OF_MOPE = ("method", "mode", "features")
_OF_MODEX = ("model",)


def _check_system(options: argparse.Namespace) -> None:
    """Raise ValueError if an option is given that the system does not have."""
    others = _OF_MOPE if options.system == "modex" else _OF_MODEX
    given = [f"--{name}" for name in others if getattr(options, name) is not None]
    if options.system == "modex" and options.cache_features == "on":
        given.append("--cache-features on")
    if given:
        raise ValueError(f"{', '.join(given)} cannot be used with --system {options.system}")


def _system_of(model: FusionModel) -> str:
    return "modex" if model.config.method == "modex" else "mope"


def _title(model: FusionModel) -> str:
    """Describe in a few words what is trained."""
    if _system_of(model) == "mope":
        return f"{model.config.method}, main encoder {model.config.main}"
    new = any(p.requires_grad for name, p in model.named_parameters() if ".crossattention." in name and "LayerNorm" not in name)
    return "modex, adapters in a fused model" + (", whose cross-attention is new and trains too" if new else "")


def _read_split(options: argparse.Namespace, model: FusionModel) -> Split:
    """Read the split to evaluate, with the model's class names if it has any."""
    config = model.config
    assert config.id2label is not None
    names = [config.id2label[i] for i in range(config.num_labels)]
    known = None if names == [f"LABEL_{i}" for i in range(config.num_labels)] else names
    return read_split(
        options.data,
        options.format,
        options.split,
        names=known,
        on_missing_image=options.on_missing_image,
        modalities=slots_to_read(config),
        **columns_of(options),
    )


def _how(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the fields of the results that describe the environment and the command."""
    return {**environment.describe(device), "command": getattr(options, "command_line", None)}
