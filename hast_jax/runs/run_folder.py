"""The folder of one run: its config, and the results of each stage."""

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import paths
from hast_jax.errors import CAUSES, Notice, UserError, refused_by_disk
from hast_jax.kinds import parse_json
from hast_jax.runs import synthetic_set
from hast_jax.runs.checkpoint import Checkpoints
from hast_jax.runs.files import crc32, read_json, write_json
from hast_jax.runs.synthetic_set import SyntheticSet

Tree = Any

CELLS = "cells"  # the folder in which a sweep keeps its runs
# Keys of files that tell a run folder from another program's folder.
OURS = {
    "config.json": {"synthesis", "finetune"},
    "teacher.json": {"crc32"},
    "images.json": {"images", "crc32"},
    "result.json": {"config", "seconds"},
}

# The locks of this process, which may open a folder twice. The key is the lock file's inode, because a folder may be moved.
_held: dict[tuple[int, int], BaseFileLock] = {}


class RunFolder:
    """The files of a run.

    config.json, teacher.json, synthetic/ (see synthetic_set.py), images.json, ranges.json, checkpoints/{synthesis,latest,best},
    metrics.jsonl, tensorboard/, evaluations.json, segments.json, student/, result.json, synthetic.png, report.html, README.md.
    If one of several processes fails, failure.txt says why.
    """

    def __init__(self, path: Path):
        self._path = path
        self.config = path / "config.json"
        self.synthetic = path / "synthetic"
        self.teacher = path / "teacher.json"
        self.images = path / "images.json"
        self.ranges = path / "ranges.json"
        self.evaluations = path / "evaluations.json"
        self.segments = path / "segments.json"
        self.result = path / "result.json"
        self.picture = path / "synthetic.png"
        self.student = path / "student"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.html"
        self.card = path / "README.md"

    def __str__(self) -> str:
        return str(self._path)

    def checkpoints(self, name: str) -> Path:
        """Folder of the checkpoints called `name`: synthesis, latest or best."""
        return self._path / "checkpoints" / name

    def open_checkpoints(self, name: str, keep: int, keep_every: int = 0, writing: bool = True) -> Checkpoints:
        """The checkpoints called `name`; the other arguments are those of `Checkpoints`."""
        return Checkpoints(self.checkpoints(name), keep, keep_every, writing)

    def drop_checkpoints(self, name: str) -> None:
        """Delete the checkpoints called `name`."""
        shutil.rmtree(self.checkpoints(name))

    def synthetic_set(self, images: int, batch: int, shape: tuple[int, int, int], create: bool = True) -> SyntheticSet:
        """The synthetic set of this run."""
        return SyntheticSet(self.synthetic, images, batch, shape, create)

    def check_images(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Record the images that this run learns from. Raises UserError if it began with other images."""
        if not self.images.exists():
            write_json(self.images, _identity(images, labels))
        elif read_json(self.images) != _identity(images, labels):
            raise UserError(f"{self} began with other images: use another workdir, or the images it began with.")

    def check_own_images(self) -> None:
        """Raise UserError if this run, which now makes its images, began with given ones."""
        known = _config_of(self)
        source = known.synthesis.source if known is not None else ""
        if source and self.images.exists():
            raise UserError(f"{self} began with the images of {source}: name them again, or use another workdir.")

    def learned_images(self, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels that this run learned from, memory-mapped.

        config: that of the run. Raises UserError if they are gone or have changed, or if they were real images.
        """
        if config.synthesis.real_split:
            raise UserError(f"{self} does not hold the real images that it learned from.")
        source = paths.local(config.synthesis.source) if config.synthesis.source else self.synthetic
        images, labels = synthetic_set.first(source, config)
        if self.images.exists() and read_json(self.images) != _identity(images, labels):
            raise UserError(
                f"{source} does not hold the images that {self} learned from: repeat the command that made the run, with "
                "--config.synthesis.source=FOLDER of those images."
            )
        return images, labels

    def check_teacher(self, variables: Tree, program: int | None = None, remember: bool = True) -> None:
        """Record the teacher of this run. Raises UserError if it began with another teacher.

        program: the checksum of what the network computes (`Structure.program`). It is compared only within one version of JAX.
        remember: False only compares.
        """
        found = {"crc32": crc32(variables), "program": program, "jax": jax.__version__}
        if self.teacher.exists():
            known = read_json(self.teacher)
            if known.get("crc32") != found["crc32"]:
                raise UserError(f"{self} began with a teacher of other weights: use another workdir, or those weights.")
            before = known.get("program")
            if None not in (before, program) and known.get("jax") == found["jax"] and before != program:
                raise UserError(
                    f"{self} began with a network that computes something else: its code was changed since; "
                    "use another workdir, or that code."
                )
        elif remember:
            write_json(self.teacher, found)

    def check_test(self, checksum: int | None) -> None:
        """Record the real images that evaluate this run (None: none). Raises UserError if it began with others."""
        known = read_json(self.teacher)
        if known.setdefault("test", checksum) != checksum:
            raise UserError(f"{self} began with other test images, or without any: use another workdir, or the same ones.")
        write_json(self.teacher, known)

    def teacher_accuracy(self) -> dict[str, float] | None:
        """The teacher's accuracy; None if it has not been measured yet, or is damaged."""
        found = read_json(self.teacher).get("accuracy") if self.teacher.exists() else None
        return found if isinstance(found, dict) and {"top1", "top5", "images"} <= found.keys() else None

    def remember_teacher_accuracy(self, accuracy: dict[str, float]) -> None:
        """Keep the teacher's accuracy, which is measured once."""
        write_json(self.teacher, {**read_json(self.teacher), "accuracy": accuracy})

    def write_ranges(self, ranges: Tree) -> None:
        """Write the ranges as {"layer/low": number, "layer/high": number, ...}. A kernel has arrays instead of numbers."""
        flat = flatten_dict(jax.device_get(ranges), sep="/")
        write_json(self.ranges, {name: np.asarray(value).tolist() for name, value in flat.items()})

    def has_ranges(self) -> bool:
        """Whether this run is calibrated."""
        return self.ranges.exists()

    def read_ranges(self, names: Mapping[str, tuple[str, ...]]) -> Tree:
        """The ranges. names: those that the file must have, with their paths. Raises UserError if the file is damaged."""
        try:
            flat = {name: np.asarray(value, np.float32) for name, value in parse_json(self.ranges.read_text()).items()}
            if flat.keys() != names.keys() or not all(np.isfinite(value).all() for value in flat.values()):
                raise ValueError("not finite numbers for each end of a range")
            return unflatten_dict({names[name]: jnp.asarray(value) for name, value in flat.items()})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.ranges} is damaged ({error}): delete it to calibrate again.") from error

    def write_evaluations(self, evaluations: dict[int, float]) -> None:
        """Write the accuracies by epoch."""
        write_json(self.evaluations, evaluations)

    def read_evaluations(self) -> dict[int, float]:
        """The accuracies by epoch; none, with a notice, if the file is missing or damaged."""
        try:
            return {int(epoch): float(top1) for epoch, top1 in parse_json(self.evaluations.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            words = f"{self.evaluations} is missing or damaged ({error}): the best epoch is chosen among those that follow."
            warnings.warn(words, Notice, stacklevel=2)
            return {}

    def read_segments(self) -> list[dict[str, Any]]:
        """The records of the starts of this run, the oldest first."""
        found = read_json(self.segments, list) if self.segments.exists() else []
        return [each for each in found if isinstance(each, dict) and {"spent_before", "hardware"} <= each.keys()]

    def write_segments(self, segments: list[dict[str, Any]]) -> None:
        """Write the records of the starts of this run."""
        write_json(self.segments, segments)

    def read_result(self) -> dict[str, Any] | None:
        """The result of the finished run; None if it is not finished."""
        return read_json(self.result, keys=("config", "seconds", "teacher", "last")) if self.result.exists() else None

    def write_config(self, config: ConfigDict) -> None:
        """Write the config, whose free fields may have changed since the run began."""
        write_json(self.config, config_lib.to_dict(config))

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result. Of a finished run only `held_out` and the config of free fields ever change."""
        write_json(self.result, result)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Release the folder, which this process opened with `open_for_run`, at the end of the block."""
        try:
            yield
        finally:
            release(self._path)


def open_for_run(path: Path, config: ConfigDict) -> RunFolder:
    """Make the run folder, or open one that was made with the same config. This process holds it until `release`, or its end.

    Raises UserError if the folder cannot be written, if another process holds it, if something in it is a link, if it holds
    files of other programs that a run would replace, or if it was made with another config. The error message then shows the
    differences. If the folder has a config, it stays as it is: see `RunFolder.write_config`.
    """
    folder = RunFolder(path)
    try:
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = path / ".lock"
        _refuse_links([lock])
        _hold(lock)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        _refuse_links(path.rglob("*"))
        known = _config_of(folder)
        if known is not None:
            lines = config_lib.difference(config_lib.to_dict(known), config_lib.to_dict(config))
            if lines:
                raise UserError(
                    f"{path} was made with another config: {'; '.join(lines)}; use another workdir, or the old config."
                )
        if not folder.config.exists():
            folder.write_config(config)
    except OSError as error:
        release(path)
        raise _unwritable(path, error) from error
    except UserError:
        release(path)
        raise
    return folder


def release(path: Path) -> None:
    """Let other processes into a folder that `open_for_run` opened. A folder that was opened twice is released by two calls."""
    with contextlib.suppress(OSError):
        status = (path / ".lock").stat()
        lock = _held.get((status.st_dev, status.st_ino))
        if lock is not None:
            lock.release()
            if not lock.is_locked:
                del _held[status.st_dev, status.st_ino]


def _identity(images: np.ndarray, labels: np.ndarray) -> dict[str, int]:
    return {"images": len(images), "crc32": crc32((images, labels))}


def _unwritable(path: Path, error: OSError) -> UserError:
    known = CAUSES.get(error.errno or 0)
    return UserError(f"the run folder {path} cannot be written: {known or f'{error.strerror}; choose another workdir'}.")


def _is_ours(path: Path) -> bool:
    """Whether a run made the folder."""

    def keys(name: str) -> set[str]:
        with contextlib.suppress(UserError, OSError):
            return set(read_json(path / name))
        return set()

    return any(wanted <= keys(name) for name, wanted in OURS.items())


def _refuse_foreign(path: Path) -> None:
    """Raise UserError if another program's files would be lost in a run."""
    places = [path / "checkpoints", path / "tensorboard", *vars(RunFolder(path)).values()]
    lost = [place.name for place in places if place != path and place.exists()]
    if lost and not _is_ours(path):
        raise UserError(f"{path} is no run folder, and its {lost[0]} would be lost: use another workdir.")


def _refuse_links(paths: Iterable[Path]) -> None:
    for each in paths:
        if each.is_symlink():  # links in a stranger's folder could make a run write anywhere
            raise UserError(f"{each} is a link: a run folder must hold its own files; use another workdir.")


def _hold(lock: Path) -> None:
    """Keep every other process out of the lock's folder until this one releases it or ends, however it ends."""
    path = lock.parent
    lock.touch()
    status = lock.stat()
    inode = status.st_dev, status.st_ino
    # No soft lock: a lock that is only the existence of a file would outlive a killed run.
    ours = _held.get(inode) or FileLock(lock, fallback_to_soft=False)
    try:
        ours.acquire(blocking=False)
        _held[inode] = ours
    except Timeout as error:
        raise UserError(f"another run is using {path}: wait until it ends, or use another workdir.") from error
    except OSError as error:
        words = f"{path} cannot be locked ({error.strerror}): mount its file system with flock, or use another workdir."
        raise refused_by_disk(error) or UserError(words) from error


def open_for_reading(path: Path) -> tuple[RunFolder, ConfigDict]:
    """A run folder and the config that it was made with. Raises UserError if `path` is no run folder."""
    folder = RunFolder(path)
    config = _config_of(folder) if _is_ours(path) else None
    if config is None:
        raise UserError(f"{path} is no run folder, or its config.json is lost: give the --workdir of a run.")
    return folder, config


def _config_of(folder: RunFolder) -> ConfigDict | None:
    """The folder's config, also if only its result is left; None if it has neither.

    A missing field, as in a folder of an older version, has its default.
    """
    if folder.config.exists():
        values = read_json(folder.config)
    elif (result := folder.read_result()) is not None:
        values = result["config"]
    else:
        return None
    try:
        config = config_lib.from_dict(values)
        config_lib.validate(config)  # the folder may be a stranger's
    except UserError as error:
        raise UserError(
            f"{folder.config} is damaged or of another version ({error}): delete it, and repeat the command that made the run."
        ) from error
    return config
