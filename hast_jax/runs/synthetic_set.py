"""The synthetic set on disk, readable with NumPy alone.

    synthetic/images.npy    float32 [n, height, width, channels], in the teacher's normalised space
    synthetic/labels.npy    int32 [n]
    synthetic/index.json    {"batch": b, "done": {"0": crc32 of images and labels of rows 0 ... b - 1, ...}}

The arrays have their full size from the start. `index.json` is replaced only after a batch's rows are on disk, so every batch
that it names is complete.
"""

import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hast_jax.errors import UserError, refused_by_disk
from hast_jax.kinds import parse_json
from hast_jax.runs.files import crc32, write_json

AT_ONCE = 256  # images that are checked together


class SyntheticSet:
    """Batches of synthetic images in a folder. `batches`: their number, finished or not."""

    def __init__(self, folder: Path, images: int, batch: int, shape: tuple[int, int, int], create: bool = True):
        """Open the set of `images` images of `shape` in `folder`, or create it.

        Raises UserError if the set is unusable, or if it is not there and `create` is False.
        """
        self.folder, self.batch, self.batches = folder, batch, images // batch
        self._index_path = folder / "index.json"
        new = not self._index_path.exists()
        if new and not create:
            raise UserError(f"{folder} is not there, but process 0 made it: give all processes a workdir on one file system.")
        folder.mkdir(parents=True, exist_ok=True)
        made, self._done = (batch, {}) if new else _read_index(self._index_path)
        if made != batch:
            raise UserError(f"{folder} was made in batches of {made}, not {batch}: use another folder.")
        self._images = _open(folder / "images.npy", (images, *shape), np.dtype(np.float32), new)
        self._labels = _open(folder / "labels.npy", (images,), np.dtype(np.int32), new)
        if new:
            self._write_index()

    def pending(self) -> list[int]:
        """Numbers of the batches not yet written."""
        return [b for b in range(self.batches) if b not in self._done]

    def write(self, batch: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Write one batch to disk, then mark it as done."""
        rows = self._rows(batch)
        self._images[rows], self._labels[rows] = images, labels
        self._images.flush()
        self._labels.flush()
        self._done[batch] = crc32((self._images[rows], self._labels[rows]))
        self._write_index()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels, memory-mapped. Raises UserError if a batch is missing or not what was written."""
        if self.pending():
            raise UserError(f"{self.folder} lacks {len(self.pending())} of {self.batches} batches: let synthesis finish.")
        bad = _first_damaged(self._images, self._labels, self.batch, self._done)
        if bad is not None:
            raise UserError(
                f"{self.folder} is damaged: batch {bad} is not what was written; "
                f"delete that folder and run the command again to make the images anew."
            )
        return self._images, self._labels

    def _rows(self, batch: int) -> slice:
        return slice(batch * self.batch, (batch + 1) * self.batch)

    def _write_index(self) -> None:
        write_json(self._index_path, {"batch": self.batch, "done": {str(b): c for b, c in self._done.items()}})


def load(folder: Path, shape: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a finished set of any size that another run or tool made, memory-mapped.

    shape: of one image. classes: how many there are. Without `index.json` no checksums are compared. Raises UserError if files
    are missing, damaged or misshapen, or if they hold values that no network can learn from.
    """
    images_path, labels_path, index_path = (folder / name for name in ("images.npy", "labels.npy", "index.json"))
    try:
        images, labels = (np.lib.format.open_memmap(path, "r") for path in (images_path, labels_path))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} holds no synthetic set ({error}): it needs images.npy and labels.npy.") from error
    if images.shape[1:] != shape or images.dtype != np.float32 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{folder} holds images {images.dtype} {images.shape} and labels {labels.shape}; "
            f"the network needs float32 images [n, {', '.join(map(str, shape))}] and labels [n]."
        )
    if index_path.exists():
        batch, done = _read_index(index_path)
        missing = -(-len(images) // batch) - len(done)
        if missing or _first_damaged(images, labels, batch, done) is not None:
            raise UserError(f"the synthetic set {folder} is unfinished or damaged: use another set.")
    _refuse_values(folder, images, labels, classes)
    return images, labels


def first(folder: Path, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """The first `config.synthesis.images` images of a set, and their labels, as from `load`."""
    images, labels = load(folder, tuple(config.teacher.image), config.teacher.classes)
    return images[: config.synthesis.images], labels[: config.synthesis.images]


def _refuse_values(folder: Path, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raise UserError for the first label that is no class, and for the first image with a value that is not finite."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"the labels of {folder} are {labels.dtype}: they must be whole numbers, the index of each class.")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        said = f"label {wrong[0]} of {folder} is {labels[wrong[0]]}"
        raise UserError(f"{said}: labels must be from 0 to {classes - 1}, because the network has {classes} classes.")
    for start in range(0, len(images), AT_ONCE):
        finite = np.isfinite(images[start : start + AT_ONCE]).all((1, 2, 3))
        if not finite.all():
            raise UserError(
                f"image {start + int(np.argmin(finite))} of {folder} holds values that are not finite: make it again."
            )


def _first_damaged(images: np.ndarray, labels: np.ndarray, batch: int, done: dict[int, int]) -> int | None:
    """The first batch whose rows do not have the checksum in `done`; None if all have it."""
    for number, expected in done.items():
        rows = slice(number * batch, (number + 1) * batch)
        if crc32((images[rows], labels[rows])) != expected:
            return number
    return None


def _read_index(path: Path) -> tuple[int, dict[int, int]]:
    """Images in a batch, and the checksum of each finished batch."""
    try:
        index = parse_json(path.read_text())
        return max(1, int(index["batch"])), {int(b): int(c) for b, c in index["done"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder {path.parent}, and make the images anew.") from error


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype, new: bool) -> np.memmap:
    if new:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        # Reserve the space now: if the disk fills later, a sparse file causes a bus error without any message.
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array
    try:
        np.lib.format.open_memmap(path, "r")  # fails if the file is shorter than its header says; "r+" would extend it
        array = np.lib.format.open_memmap(path, "r+")
    except (OSError, ValueError, EOFError) as error:
        refused = refused_by_disk(error) if isinstance(error, OSError) else None
        raise refused or UserError(f"{path} is damaged ({error}): delete the folder {path.parent} and run again.") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"{path} holds {array.dtype} {array.shape}, not {dtype} {shape}: use another folder.")
    return array
