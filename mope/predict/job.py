"""Run `mope predict`: read rows, classify them, and write and merge the predictions."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mope.data import DataError
from mope.data.preprocessing import Preprocessing
from mope.data.rows import Rows
from mope.data.writing import check_suffix, record_of, write
from mope.devices import find_device
from mope.fusion.base import FusionModel
from mope.fusion.checkpoint import fingerprint_of
from mope.fusion.predicting import Prediction, predictions
from mope.modalities import slots_of
from mope.processes import wait_for_all
from mope.training.columns import columns_of
from mope.training.encoders import processors_of, sources_of
from mope.training.loading import open_model

from .parts import Parts
from .reading import Answered, Batch, RowBatches


class PredictionJob:
    """A run of `mope predict`. The constructor checks all options and raises ValueError or OSError."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        out: Path = options.out
        check_suffix(out)
        place = find_device(options.device)
        self.state = PartialState(cpu=place.type == "cpu")
        if options.device != "auto" and place.type != "cpu" and self.state.num_processes > 1:
            raise ValueError(
                f"each of {self.state.num_processes} processes uses its own GPU: remove --device {options.device} from the command"
            )
        self.model = open_model(
            options.model, sources_of(options), mode=options.mode, processors=processors_of(options), format=options.format
        )
        config = self.model.config
        self.names = [config.id2label[i] for i in range(config.num_labels)]
        self.several = config.problem_type == "multi_label"
        self.rows = Rows(
            options.file,
            tuple(slots_of(config).values()),
            self.names,
            several=self.several,
            format=options.format,
            on_missing_image=options.on_missing_image,
            **columns_of(options),
        )
        self.preprocessing = Preprocessing(self.model, config.modalities)
        # Raises an error here if the model has no experts to report.
        with self.model.answering(experts=options.experts):
            pass
        identity = {"model": _identity(self.model, self.preprocessing), "file": self.rows.identity(), "options": self._told()}
        self.parts = Parts(out, identity, process=self.state.process_index, processes=self.state.num_processes)
        self.model.to(self.state.device if options.device == "auto" or place.type == "cpu" else place)
        # No process writes before all have checked the existing files.
        wait_for_all()

    def run(self) -> None:
        """Predict the missing rows and merge the parts of all processes.

        Raises:
            DataError: A row cannot be read, and --on-error is not skip.
        """
        out: Path = self.options.out
        if self.parts.complete:
            self.state.print(f"{out} is complete: nothing to do")
            return
        if self.state.is_main_process:
            self.parts.begin()
        wait_for_all()
        self._predict()
        wait_for_all()
        if self.state.is_main_process:
            counts = _Counts(self.several)
            write(counts.counted(self.parts.merged()), out, self.names, self._fields())
            self.parts.finish({"rows": counts.rows, "errors": counts.errors, **counts.metrics()})
            print(f"{out}: {counts.describe()}")

    def _predict(self) -> None:
        with self.parts.opened() as (part, done):
            self._predict_after(done, part)

    def _predict_after(self, done: int, part: IO[str]) -> None:
        options = self.options
        batches = RowBatches(self.rows, self.parts, self.preprocessing, batch_size=options.batch_size, done=done)
        loader = DataLoader(batches, batch_size=None, num_workers=options.num_workers)
        bar = tqdm(initial=done, unit=" rows", leave=False, disable=not self.state.is_main_process)
        with self.model.answering(experts=options.experts) as answer, bar:
            for batch in loader:
                self._answer(answer, batch, part)
                bar.update(len(batch.rows))

    def _answer(self, answer: Any, batch: Batch, part: Any) -> None:
        """Predict and write a batch. If a row stops the run, the rows before it are still written."""
        found: Iterator[Prediction] = iter(())
        if batch.inputs is not None:
            logits, weights = answer(**self.model.on_device(batch.inputs))
            found = iter(predictions(self.model.config, logits, weights, named=self.options.experts))
        try:
            for row in batch.rows:
                prediction = next(found) if row.error is None else None
                if prediction and not all(map(math.isfinite, prediction.scores.values())):
                    row.error = f"the model's output is not finite for {row.id!r}"
                if row.error is not None and self.options.on_error == "error":
                    raise DataError(f"{self.options.file}:{row.line}: {row.error} (--on-error skip: write the error and continue)")
                part.write(json.dumps(self._record(row, prediction), ensure_ascii=False) + "\n")
        finally:
            part.flush()

    def _record(self, row: Answered, prediction: Prediction | None) -> dict[str, Any]:
        if prediction is None or row.error is not None:
            return {"id": row.id, "error": row.error}
        record = record_of(row.id, prediction, several=self.several)
        # Removed by `_Counts` before the predictions are written.
        return record if row.labels is None else record | {"truth": [self.names[k] for k in row.labels]}

    def _fields(self) -> list[str]:
        fields = ["id", "labels" if self.several else "label", "scores"]
        fields += ["experts"] if self.options.experts else []
        return fields + (["error"] if self.options.on_error == "skip" else [])

    def _told(self) -> dict[str, Any]:
        """Return the options that affect the predictions."""
        names = ("format", "experts", "on_missing_image", "label_separator", "mode")
        return {**{name: getattr(self.options, name) for name in names}, "columns": dict(self.options.columns)}


class _Counts:
    """Running counts of the rows, the errors, and the correct predictions among rows with a label."""

    def __init__(self, several: bool) -> None:
        self.several = several
        self.rows = self.errors = self.labelled = self.found = self.predicted = self.present = 0

    def counted(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Count the records and yield them without their true classes."""
        for record in records:
            self.rows += 1
            self.errors += "error" in record
            if (truth := record.pop("truth", None)) is not None:
                predicted = set(record["labels"] if self.several else [record["label"]])
                self.labelled += 1
                self.found += len(predicted & set(truth))
                self.predicted += len(predicted)
                self.present += len(truth)
            yield record

    def metrics(self) -> dict[str, float]:
        """Return "labelled", and "accuracy" or, with several labels, "f1_micro"; {} if no row has a label."""
        if not self.labelled:
            return {}
        value = 2 * self.found / max(self.predicted + self.present, 1)
        return {"labelled": self.labelled, "f1_micro" if self.several else "accuracy": value}

    def describe(self) -> str:
        said = f"{self.rows} rows" + (f", {self.errors} of them with an error" if self.errors else "")
        if not self.labelled:
            return said
        name, value = list(self.metrics().items())[1]
        return f"{said}; {name.replace('_', ' ')} {100 * value:.2f} (rows with a label: {self.labelled})"


def _identity(model: FusionModel, preprocessing: Preprocessing) -> str:
    """Return a fingerprint of everything in a model that affects its predictions."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("mope_version", "transformers_version")}
    parts = {"config": config, "encoders": model.fingerprints(), "reading": preprocessing.digest()}
    with model.weights_as_given():
        return fingerprint_of(parts, {**model.saved_state_dict(), **model.trained_state_dict()})
