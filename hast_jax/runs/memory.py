"""The storage of a run without a folder: as `RunFolder`, but in memory, and only as long as the run lasts."""

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

Tree = Any


class MemoryRun:
    """As `RunFolder`, but nothing is written, so there is nothing to resume from."""

    def __init__(self) -> None:
        self._ranges: Tree = None
        self._evaluations: dict[int, float] = {}
        self._accuracy: dict[str, float] | None = None
        self._segments: list[dict[str, Any]] = []
        self._set: MemorySet | None = None

    def open_checkpoints(self, name: str, keep: int, keep_every: int = 0, writing: bool = True) -> "NoCheckpoints":
        """Checkpoints that are not kept."""
        return NoCheckpoints()

    def drop_checkpoints(self, name: str) -> None:
        """Does nothing: no checkpoints are kept."""

    def synthetic_set(self, images: int, batch: int, shape: tuple[int, int, int], create: bool = True) -> "MemorySet":
        """The synthetic set of this run."""
        self._set = self._set or MemorySet(images, batch, shape)
        return self._set

    def check_images(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Does nothing: a run in memory has only one set of images."""

    def write_config(self, config: ConfigDict) -> None:
        """Does nothing: the job itself has the config."""

    def teacher_accuracy(self) -> dict[str, float] | None:
        """The teacher's accuracy; None if it was not measured."""
        return self._accuracy

    def remember_teacher_accuracy(self, accuracy: dict[str, float]) -> None:
        """Keep the teacher's accuracy."""
        self._accuracy = accuracy

    def write_ranges(self, ranges: Tree) -> None:
        """Keep the activation ranges."""
        self._ranges = ranges

    def has_ranges(self) -> bool:
        """Whether this run is calibrated."""
        return self._ranges is not None

    def read_ranges(self, names: Mapping[str, tuple[str, ...]]) -> Tree:
        """The activation ranges."""
        return self._ranges

    def write_evaluations(self, evaluations: dict[int, float]) -> None:
        """Keep the accuracies by epoch."""
        self._evaluations = dict(evaluations)

    def read_evaluations(self) -> dict[int, float]:
        """The accuracies by epoch."""
        return self._evaluations

    def read_segments(self) -> list[dict[str, Any]]:
        """The records of the starts of this run, of which there is only one."""
        return self._segments

    def write_segments(self, segments: list[dict[str, Any]]) -> None:
        """Keep the records of the starts of this run."""
        self._segments = segments

    def read_result(self) -> dict[str, Any] | None:
        """None: a run in memory is never finished when it starts."""
        return None

    def write_result(self, result: dict[str, Any]) -> None:
        """Does nothing: the caller has the result."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Does nothing: no other process knows of this run."""
        yield


class MemorySet:
    """As `SyntheticSet`, in memory."""

    def __init__(self, images: int, batch: int, shape: tuple[int, int, int]):
        self.batch, self.batches = batch, images // batch
        self._images, self._labels = np.zeros((images, *shape), np.float32), np.zeros(images, np.int32)
        self._done: set[int] = set()

    def pending(self) -> list[int]:
        """Numbers of the batches not yet written."""
        return [b for b in range(self.batches) if b not in self._done]

    def write(self, batch: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Keep one batch."""
        rows = slice(batch * self.batch, (batch + 1) * self.batch)
        self._images[rows], self._labels[rows] = images, labels
        self._done.add(batch)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return self._images, self._labels


class NoCheckpoints:
    """As `Checkpoints`, but what is saved is not kept."""

    def save(self, step: int, tree: Tree) -> None:
        """Nothing is saved."""

    def restore(self, like: Tree, rows: int | None = None) -> Tree | None:
        """There is nothing to restore."""
        return None

    def __enter__(self) -> "NoCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None
