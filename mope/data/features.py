"""Cache of complementary features, which are computed once.

    FOLDER/<digest of model and preprocessing>/
      <random>.features.npy     (n,Cc) float32, memory-mapped for reading
      <random>.index.npy        (n,) key of the example and seconds of computation; written last, which makes both files valid

Parts are added and never changed. A run that is killed loses only the part that it is computing. Concurrent processes write
separate parts, in the worst case with the same features.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mope.files import disk_error
from mope.fusion.checkpoint import describe, original
from mope.modalities import Slot, complementary_of, slots_of
from mope.processes import rank_and_world, wait_for_all

from .formats import Example, Split
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from mope import MoPEForClassification

KEY_BYTES = 16
INDEX = np.dtype([("key", np.uint8, (KEY_BYTES,)), ("seconds", np.float32)])
# Number of examples in a part, which is the most that is lost if a run is killed.
PART = 4096


class FeatureCache:
    """Cached psi of every example of a split: `cache[i]` is (Cc,) float32, read from memory-mapped files.

    Attributes:
        modalities: Names of the encoders in the model, such as ("text",).
        computed: Number of features that were computed now, by this process in a distributed run; the others were cached.
        seconds: Time for computing them and looking up the others.
        seconds_per_epoch: Time that the encoders took for all examples of the split when the features were computed.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        split: Split,
        files: Sequence[Path],
        places: NDArray[np.int64],
        *,
        computed: int,
        seconds: float,
        seconds_per_epoch: float,
    ) -> None:
        self.modalities, self.computed = modalities, computed
        self.seconds, self.seconds_per_epoch = seconds, seconds_per_epoch
        self._examples = _digest_of(split)
        # places (N,2): file number, and row in the file.
        self._files, self._places = tuple(files), places
        self._maps: dict[int, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        number, row = self._places[index]
        if number not in self._maps:
            self._maps[number] = np.load(self._files[number], mmap_mode="r")
        return torch.from_numpy(self._maps[number][row].copy())

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would pickle its contents, so each process opens its own maps.
        return {**self.__dict__, "_maps": {}}

    def belong_to(self, split: Split) -> bool:
        """Return whether these are the features of exactly these examples, in this order."""
        return self._examples == _digest_of(split)

    def saved(self, epochs: float) -> float:
        """Return the seconds saved in a run of this many epochs, minus those spent on the cache."""
        return epochs * self.seconds_per_epoch - self.seconds

    @property
    def of(self) -> str:
        """Name of the features and their encoders, for messages."""
        return f"features of the {encoders(self.modalities)}"

    def describe(self, epochs: float) -> str:
        """Return one line about the time spent and saved."""
        return (
            f"{self.of}: {self.computed} computed for {len(self)} examples in {self.seconds:.1f} s; "
            f"{epochs:g} epochs without it save {self.saved(epochs):.1f} s"
        )


def cached_features(
    model: MoPEForClassification, split: Split, folder: str | Path, *, batch_size: int = 64, num_workers: int = 0
) -> FeatureCache:
    """Return psi of every example of a split, from the cache in `folder` or computed now and added to the cache.

    The key of a feature covers everything that it depends on: the complementary items (the text, or path, size and modification
    time of the image file), the weights of the encoders, the tokenizer or image processor, and the versions of their libraries.
    After a change to any of these, only the affected features are recomputed. (The bytes of images are not hashed, because reading
    them takes as long as in training. A changed image with the same size and modification time goes unnoticed.)

    Under torch.distributed, all processes must call this function, and each computes a part.

    Args:
        model: Model whose `encode_complementary` runs, on its device and in its dtype (`cast_frozen`), without an outer autocast.
        split: Split whose features are returned.
        folder: Folder of the cache, created if necessary. Models, splits and processes may share it, and it may be removed at any
            time between runs.
        batch_size: Batch size of the computation.
        num_workers: Number of data loader workers of the computation.

    Raises:
        ValueError: The method has no complementary encoder, or training changes its features.
    """
    modalities = complementary_of(model.config)
    if not modalities:
        raise ValueError(f"method {model.config.method!r} has no complementary encoder whose features could be kept")
    if trained := [name for name in modalities if model.trains(name)]:
        raise ValueError(f"the {trained[0]} encoder is trained, or prompts in it: its features change with every step")
    start = time.perf_counter()
    slots = [slots_of(model.config)[name] for name in modalities]
    preprocessing = Preprocessing(model, modalities)
    digest = hashlib.sha256(f"{_fingerprint(model, modalities)} {preprocessing.digest()}".encode()).hexdigest()
    place = Path(folder) / digest[:32]
    place.mkdir(parents=True, exist_ok=True)
    keys = [_key(example, slots) for example in split.examples]
    parts = _Parts(place)
    missing = _missing(keys, split.examples, parts)
    # Sort by length, so that batches need little padding.
    missing.sort(key=lambda item: sum(slot.modality.size(item[1].inputs[slot.name]) for slot in slots))
    rank, world = rank_and_world()
    # All processes look before any of them writes, so that they agree on the missing features.
    wait_for_all()
    computed = _compute(model, preprocessing, missing[rank::world], parts, batch_size, num_workers)
    wait_for_all()
    if missing:
        parts = _Parts(place)
        # Processes on other machines may write to another disk, so compute what is still missing here.
        rest = _missing(keys, split.examples, parts)
        computed += _compute(model, preprocessing, rest, parts, batch_size, num_workers)
        parts = _Parts(place) if rest else parts
    found = [parts.places[key] for key in keys]
    return FeatureCache(
        modalities,
        split,
        parts.files,
        np.array([(number, row) for number, row, _ in found], np.int64).reshape(-1, 2),
        computed=computed,
        seconds=time.perf_counter() - start,
        seconds_per_epoch=sum(seconds for _, _, seconds in found),
    )


def encoders(names: Sequence[str]) -> str:
    """Return "text encoder", or "audio and text encoders"."""
    return f"{' and '.join(names)} encoder{'s' if len(names) > 1 else ''}"


def _fingerprint(model: MoPEForClassification, modalities: Sequence[str]) -> str:
    """Hash everything that psi depends on besides its input: the encoders and their prompts, frozen or not."""
    digest = hashlib.sha256()
    for name in modalities:
        with model.weights_as_given():
            record = describe(*original(model.backbone(name)))
        digest.update(f"{name} {record['fingerprint']}".encode())
    if len(modalities) > 1:
        digest.update(str(getattr(model.config, "combine", None)).encode())
    if model.frozen_dtype is not None:
        digest.update(str(model.frozen_dtype).encode())
    own = ("cross_blocks.", *(f"{name}." for name in modalities))
    for name, tensor in sorted(model.trained_state_dict().items()):
        if name.startswith(own):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(example: Example, slots: Sequence[Slot]) -> bytes:
    sources = [slot.modality.key(example.inputs[slot.name]) for slot in slots]
    source = sources[0] if len(sources) == 1 else json.dumps(sources)
    return _digest(source).digest()[:KEY_BYTES]


def _digest_of(split: Split) -> str:
    names = [slot.name for slot in split.slots]
    lines = ("\t".join([example.id, *(str(example.inputs[name]) for name in names)]) for example in split.examples)
    return _digest("\n".join(lines)).hexdigest()


def _digest(text: str) -> Any:
    """Hash a text, which may contain surrogates because file names can hold bytes that are not valid characters."""
    return hashlib.sha256(text.encode(errors="surrogatepass"))


def _missing(keys: Sequence[bytes], examples: Sequence[Example], parts: _Parts) -> list[tuple[bytes, Example]]:
    """Return one example for each key that is in none of the parts."""
    return list({key: example for key, example in zip(keys, examples, strict=True) if key not in parts.places}.items())


class _Parts:
    """Index of the files in a folder. Unreadable files are skipped with a warning, so their features are computed again."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files: list[Path] = []
        # key -> (file number, row, seconds)
        self.places: dict[bytes, tuple[int, int, float]] = {}
        for index_file in sorted(place.glob("*.index.npy")):
            file = index_file.with_name(index_file.name.replace(".index.", ".features."))
            try:
                index, features = np.load(index_file), np.load(file, mmap_mode="r")
                if index.dtype != INDEX or index.shape != features.shape[:1] or features.dtype != np.float32 or features.ndim != 2:
                    raise ValueError("index and features do not match")
            except (OSError, ValueError, EOFError) as error:
                warnings.warn(f"{index_file} or its features cannot be used ({error}): remove both", stacklevel=4)
                continue
            for row, (key, seconds) in enumerate(zip(index["key"], index["seconds"].tolist(), strict=True)):
                self.places.setdefault(key.tobytes(), (len(self.files), row, seconds))
            self.files.append(file)

    def add(self, keys: Sequence[bytes], features: NDArray[np.float32], seconds: float) -> None:
        """Write a part, which is valid once this returns."""
        index = np.empty(len(keys), INDEX)
        index["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        index["seconds"] = seconds / len(keys)
        name = uuid.uuid4().hex
        _write(self.place / f"{name}.features.npy", features)
        _write(self.place / f"{name}.index.npy", index)


def _write(file: Path, array: NDArray[Any]) -> None:
    """Write a file atomically."""
    unfinished = file.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    # numpy's message gives the number of bytes written, but not the reason of the failure.
    except OSError as error:
        raise disk_error(f"features cannot be kept in {file.parent}", file.parent, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


class _Inputs(Dataset[dict[str, Any]]):
    """Dataset of inputs of the complementary encoders."""

    def __init__(self, examples: Sequence[Example], preprocessing: Preprocessing) -> None:
        self._examples, self._preprocessing = examples, preprocessing

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._preprocessing(self._examples[index])


def _compute(
    model: MoPEForClassification,
    preprocessing: Preprocessing,
    missing: Sequence[tuple[bytes, Example]],
    parts: _Parts,
    batch_size: int,
    num_workers: int,
) -> int:
    """Compute and write the missing features, and return their number."""
    loader = DataLoader(
        _Inputs([example for _, example in missing], preprocessing),
        batch_size,
        collate_fn=preprocessing.collate,
        num_workers=num_workers,
        # A separate generator, so that a run draws the same random numbers with and without the cache.
        generator=torch.Generator(),
    )
    keys = iter([key for key, _ in missing])
    batches = _encode(model, loader)
    start = time.perf_counter()
    while batch := list(islice(batches, max(1, PART // batch_size))):
        features = np.concatenate(batch)
        now = time.perf_counter()
        parts.add(list(islice(keys, len(features))), features, now - start)
        start = now
    return len(missing)


def _encode(model: MoPEForClassification, loader: DataLoader[dict[str, Any]]) -> Iterator[NDArray[np.float32]]:
    """Yield the features (B,Cc) of each batch."""
    was_training = model.training
    model.eval()
    try:
        # `disable=None` shows the progress bar on a terminal only.
        for batch in tqdm(
            loader, f"features of the {encoders(complementary_of(model.config))}", disable=rank_and_world()[0] > 0 or None
        ):
            inputs: dict[str, Any] = model.on_device(batch)
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                psi = model.encode_complementary(**inputs)
            yield psi.float().cpu().numpy()
    finally:
        model.train(was_training)
