"""The folder of one run: its config, and where each stage leaves what it made."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax.errors import UserError
from hast_jax.networks.weights import Variables
from hast_jax.runs.files import crc32, read_json, write_json

# Of this process, which may open a folder more than once: by the lock file itself, as folders may be moved.
_held: dict[tuple[int, int], BaseFileLock] = {}


class RunFolder:
    """Paths in a run folder.

    config.json, teacher.json, synthetic/ (see synthetic_set.py), images.json, ranges.json, checkpoints/{synthesis,latest,best},
    metrics.jsonl, tensorboard/, evaluations.json, result.json, synthetic.png.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.synthetic = path / "synthetic"
        self.teacher = path / "teacher.json"
        self.images = path / "images.json"
        self.ranges = path / "ranges.json"
        self.evaluations = path / "evaluations.json"
        self.result = path / "result.json"
        self.picture = path / "synthetic.png"

    def checkpoints(self, name: str) -> Path:
        """Folder of the checkpoints called `name`: synthesis, latest or best."""
        return self.path / "checkpoints" / name

    def check_images(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Remember the images that this run learns from, or raise UserError where it began with others."""
        found = {"images": len(images), "crc32": crc32((images, labels))}
        if not self.images.exists():
            write_json(self.images, found)
        elif read_json(self.images) != found:
            raise UserError(f"{self.path} began with other images: use another --workdir, or the images it began with.")

    def check_teacher(self, variables: Variables, remember: bool = True) -> None:
        """Remember the teacher that this run follows, or raise UserError where it began with another of the same name."""
        found = {"crc32": crc32(variables)}
        if self.teacher.exists():
            if read_json(self.teacher) != found:
                raise UserError(f"{self.path} began with a teacher of other weights: use another --workdir, or those weights.")
        elif remember:
            write_json(self.teacher, found)

    def write_ranges(self, ranges: Variables) -> None:
        """Write the activation ranges as {"layer/low": number, "layer/high": number, ...}."""
        flat = flatten_dict(jax.device_get(ranges), sep="/")
        write_json(self.ranges, {name: float(value) for name, value in flat.items()})

    def read_ranges(self) -> Variables:
        """The activation ranges. Raises UserError where they are damaged."""
        try:
            flat = {name: float(value) for name, value in json.loads(self.ranges.read_text()).items()}
            if not flat or not np.isfinite(list(flat.values())).all():
                raise ValueError("not one finite number for each end of a range")
            return unflatten_dict({name: jnp.float32(value) for name, value in flat.items()}, sep="/")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.ranges} is damaged ({error}): delete it to calibrate again.") from error


def open_for_run(path: Path, config: ConfigDict) -> RunFolder:
    """Make the folder, or go on in one made with the same config; this process holds it until its end.

    Raises UserError where it cannot be written, another process holds it, something in it is a link to elsewhere, or it was
    made with another config, whose differences are shown.
    """
    folder, values = RunFolder(path), config_lib.to_dict(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = path / ".lock"
        _refuse_links([lock])
        _hold(lock)
        _refuse_links(path.rglob("*"))
        if folder.config.exists():
            lines = config_lib.difference(config_lib.to_dict(_config_of(folder)), values)
            if lines:
                raise UserError(
                    f"{path} was made with another config: {'; '.join(lines)}; use another --workdir, or the old config."
                )
        write_json(folder.config, values)
    except OSError as error:
        raise UserError(f"the run folder {path} cannot be written: {error.strerror}; choose another --workdir.") from error
    return folder


def _refuse_links(paths: Iterable[Path]) -> None:
    for each in paths:
        if each.is_symlink():  # a stranger's folder could have us write anywhere
            raise UserError(f"{each} is a link: a run folder must hold its own files; use another --workdir.")


def _hold(lock: Path) -> None:
    """Keep every other process out of the lock's folder until this one ends, however it ends."""
    path = lock.parent
    lock.touch()
    status = lock.stat()
    try:
        # A lock that is only a file's existence would outlive a killed run.
        ours = _held.setdefault((status.st_dev, status.st_ino), FileLock(lock, fallback_to_soft=False))
        ours.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another run is going on in {path}: wait for its end, or use another --workdir.") from error
    except OSError as error:
        words = f"{path} cannot be locked ({error.strerror}): mount its file system with flock, or use another --workdir."
        raise UserError(words) from error


def open_for_reading(path: Path) -> tuple[RunFolder, ConfigDict]:
    """A run folder and the config that it was made with. Raises UserError where it is none."""
    folder = RunFolder(path)
    if not folder.config.exists():
        raise UserError(f"{path} is no run folder: it has no config.json; give the --workdir of a run.")
    return folder, _config_of(folder)


def _config_of(folder: RunFolder) -> ConfigDict:
    """The folder's config; a field that it lacks, as it is of an older version, has its default."""
    try:
        config = config_lib.from_dict(read_json(folder.config))
        config_lib.validate(config)  # it may be a stranger's
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{folder.config} is damaged or of another version ({error}): use another --workdir.") from error
    return config
