"""Many runs that share their common work: each set of images is made once, and equal cells are run once.

Cells that change only fine-tuning share their calibrated ranges. A cell that fails does not stop the others.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import from_config, paths, pipeline
from hast_jax.data import datasets
from hast_jax.errors import UserError, sentence
from hast_jax.fields import FIELDS
from hast_jax.networks.weights import Variables
from hast_jax.paper.experiments import Cell, effective
from hast_jax.runs import run_folder, synthetic_set
from hast_jax.runs.files import write_text
from hast_jax.runs.progress import Progress, silent
from hast_jax.runs.run_folder import CELLS, RunFolder
from hast_jax.stages import held_out

Result = dict[str, Any]

# These fields do not change the synthetic images: a cell with fewer images takes the first images of the set.
SAME_IMAGES = ("synthesis.images", "synthesis.real_split")
KEPT_CHECKPOINTS = 10  # of the base cell, for the gradients during fine-tuning (Figure 2a)


class Sweep:
    """Cells of one config in a folder.

    workdir/images/NAME-seed0 and workdir/cells/NAME-seed0 are run folders. NAME lists the fields that a cell changes. A failed
    cell leaves error.txt in its folder. `failed`: names of the cells and experiments that failed. teacher: its variables, which
    all cells share. test_images: the number of real images that accuracies are measured on.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, seeds: int, progress: Progress = silent, say: Callable[[str], Any] = len
    ):
        """config: of the base cell. say: gets one line of text for each cell. This process locks `workdir` until it ends.

        Raises UserError if the config or the folder cannot be used, or if the folder's cells had another teacher, other real
        images or a given set of other images.
        """
        config_lib.validate(config)
        if config.synthesis.real_split:
            raise UserError("config.synthesis.real_split must be empty: a sweep has its own cells with real images.")
        self.seeds = range(config.seed, config.seed + seeds)
        self.config = config.copy_and_resolve_references()
        self.config.report = False  # the table of all cells takes its place
        config_lib.validate(self._changed({}, self.seeds[-1]))
        dataset = datasets.load(config, config.eval.split)
        if dataset is None:
            raise UserError("a table needs accuracies: set config.eval.dataset to the data set of the teacher.")
        self.test_images = len(dataset.labels)
        teacher, variables = from_config.teacher(config)  # weights that cannot be read are refused before a folder is made
        source = _source(config, variables) if config.synthesis.source else None
        held_out.checksum(config)  # a missing set is refused before a folder is made, too
        _check_origin(workdir, config)
        if RunFolder(workdir).segments.exists():
            raise UserError(f"{workdir} is the folder of a run: a sweep needs a folder of its own.")
        folder = run_folder.open_for_run(workdir, self.config)
        try:
            folder.check_teacher(variables, teacher.structure.program)
            folder.check_test(pipeline.checksum(dataset))
            if source is not None:
                folder.check_images(*source)
            folder.write_config(self.config)
        except BaseException:
            run_folder.release(workdir)
            raise
        self.teacher = variables
        self.workdir, self._progress, self._say = workdir, progress, say
        self.failed: list[str] = []
        self._sets: dict[Path, Path | str] = {}  # run folder -> its synthetic set, or why there is none
        self._results: dict[Path, Result] = {}

    def run(self, cell: Cell) -> list[Result]:
        """The results of a cell, one for each seed. The result of a failed run is {"failed": error message}."""
        return [self.run_one(cell, seed) for seed in self.seeds]

    def run_one(self, cell: Cell, seed: int) -> Result:
        """The result of a cell for one seed. A cell that has not finished is run or resumed, once in a process."""
        path = self.path(cell, seed)
        if path not in self._results:
            self._results[path] = self._attempt(cell, seed, path)
        return self._results[path]

    def path(self, cell: Cell, seed: int) -> Path:
        """The run folder of a cell for one seed."""
        return self.workdir / CELLS / f"{_name(effective(cell.changes, self.config))}-seed{seed}"

    def images(self, changes: dict[str, Any], seed: int) -> Path:
        """The folder of the synthetic set for a cell with these changes. The set is made if it does not exist.

        If `config.synthesis.source` is set, cells that change nothing about synthesis use that set. All other sets are made
        with `config.seed`, so that the cells' seeds change only calibration and fine-tuning.
        """
        own = {k: v for k, v in changes.items() if k.startswith("synthesis.") and k not in SAME_IMAGES}
        if changes.get("synthesis.images", 0) > self.config.synthesis.images:
            own["synthesis.images"] = changes["synthesis.images"]
        if not own and self.config.synthesis.source:
            return paths.local(self.config.synthesis.source)
        if self.config.synthesis.source:
            seed = self.config.seed
        config = self._changed(own, seed)
        config.eval.dataset, config.synthesis.source = "none", ""
        path = self.workdir / "images" / f"{_name(own)}-seed{seed}"
        if path not in self._sets:
            try:
                self._sets[path] = pipeline.run_synthesis(config, path, self._progress)
            except Exception as error:
                # Remembered, because other cells with this set would fail in the same way. Only the words: the exception itself
                # would keep the arrays of the failed synthesis.
                self._sets[path] = sentence(error)
                raise
        found = self._sets[path]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _attempt(self, cell: Cell, seed: int, path: Path) -> Result:
        try:
            result = self._result(effective(cell.changes, self.config), seed, path)
        except Exception as error:  # whatever ended this cell, the other cells can still be run
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "error.txt", traceback.format_exc())
            self.failed.append(path.name)
            self._say(f"{path.name}: failed: {sentence(error)}")
            return {"failed": sentence(error)}
        (path / "error.txt").unlink(missing_ok=True)
        self._say(f"{path.name}: {result['last']:.2f} (teacher {result['teacher']:.2f})")
        return result

    def _result(self, changes: dict[str, Any], seed: int, path: Path) -> Result:
        """The stored result of a finished cell, which does not need its images any more. Otherwise the cell is run now."""
        folder, config = RunFolder(path), self._changed(changes, seed)
        if folder.result.exists():
            folder.check_teacher(self.teacher, remember=False)
            result = folder.read_result()
            if result is not None and held_out.is_measured(config, result):
                return result
        if not changes:
            config.finetune.keep_every = max(1, config.finetune.epochs // KEPT_CHECKPOINTS)
        config.synthesis.source = "" if config.synthesis.real_split else str(self.images(changes, seed))
        base = RunFolder(self.path(Cell("", {}), seed))
        with run_folder.open_for_run(path, config).held():
            same_ranges = all(field.startswith("finetune.") and field != "finetune.ranges" for field in changes)
            if same_ranges and base.has_ranges() and not folder.has_ranges():
                write_text(folder.ranges, base.ranges.read_text())  # only fine-tuning differs
            finished = next(iter(sorted((self.workdir / CELLS).glob("*/result.json"))), None)
            if finished is not None and not folder.teacher.exists():  # the teacher's accuracy is measured once
                write_text(folder.teacher, RunFolder(finished.parent).teacher.read_text())
            return pipeline.run(config, path, self._progress)

    def _changed(self, changes: dict[str, Any], seed: int) -> ConfigDict:
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict({**changes, "seed": seed})
        return config


def _check_origin(workdir: Path, config: ConfigDict) -> None:
    """Raise UserError if the sweep in `workdir` made its images and now gets a set of images, or the other way round."""
    if not RunFolder(workdir).config.exists():
        return
    before = run_folder.open_for_reading(workdir)[1].synthesis.source
    if bool(before) != bool(config.synthesis.source):
        how = f"with --config.synthesis.source={before}" if before else "without config.synthesis.source"
        raise UserError(f"the sweep in {workdir} began {how}: go on in the same way, or use another workdir.")


def _source(config: ConfigDict, teacher: Variables) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of the given set.

    Raises UserError if the set differs from the one that the base cell would make: cells would not be comparable.
    """
    source = paths.local(config.synthesis.source)
    images, labels = synthetic_set.load(source, tuple(config.teacher.image), config.teacher.classes)
    if not RunFolder(source.parent).config.exists():
        raise UserError(
            f"config.synthesis.source: a sweep takes the set of a run, FOLDER/synthetic, but {source} is in no run folder."
        )
    _, made = run_folder.open_for_reading(source.parent)
    dicts = [config_lib.to_dict(c) for c in (made, config)]
    old, new = ({name: c[name] for name in ("seed", "teacher", "synthesis")} for c in dicts)
    lines = config_lib.difference(old, new)
    RunFolder(source.parent).check_teacher(teacher, remember=False)
    if lines or len(images) != config.synthesis.images:
        found = "; ".join(lines) or f"{len(images)} images of {made.teacher.weights}"
        raise UserError(f"{source} differs from the images of this config ({found}): leave config.synthesis.source empty.")
    return images, labels


def _name(changes: dict[str, Any]) -> str:
    """The name of a cell's folder: its changed fields and their values. Different changes give different names."""
    last = [path.split(".")[-1] for path in FIELDS]

    def short(path):
        return path.split(".")[-1] if last.count(path.split(".")[-1]) == 1 else path

    return ",".join(f"{short(path)}={_value(value)}" for path, value in sorted(changes.items())) or "base"


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    brief = f"{value:g}"
    return brief if float(brief) == value else repr(value)
