"""The stages in their order. Each stage resumes where a killed run left it."""

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import from_config, networks, paths, record
from hast_jax.data import datasets
from hast_jax.deliver.pictures import save_picture
from hast_jax.errors import Notice, UserError, sentence
from hast_jax.fields import GIVEN
from hast_jax.networks import weights
from hast_jax.runs import parallel, processes, run_folder, synthetic_set
from hast_jax.runs.checkpoint import DamagedError
from hast_jax.runs.files import crc32
from hast_jax.runs.memory import MemoryRun
from hast_jax.runs.progress import Progress, Recorder, silent
from hast_jax.runs.run_folder import RunFolder
from hast_jax.stages import calibrate, finetune, held_out, synthesize
from hast_jax.stages import teacher as teacher_stage
from hast_jax.stages.job import Job
from hast_jax.student import Student, load

Given = tuple[np.ndarray, np.ndarray]  # images and labels


class GivenNetwork(NamedTuple):
    """A network that is given in Python instead of named by the config, with the images that are given for it."""

    module: nn.Module
    variables: weights.Variables
    dataset: datasets.Dataset | None = None  # real images, for evaluation
    images: Given | None = None  # to learn from, instead of making some
    call: str | None = None  # the call in Python, for the record


def run(config: ConfigDict, workdir: Path, progress: Progress = silent) -> dict[str, Any]:
    """Quantize the network of a config in the run folder `workdir`; returns the content of `result.json`. Raises UserError."""
    return dict(quantize(config, workdir, progress).record)


def quantize(config: ConfigDict, workdir: Path | None, progress: Progress = silent, own: GivenNetwork | None = None) -> Student:
    """Quantize a network; returns the student, whose `record` is the content of `result.json`. Raises UserError.

    workdir: the run folder; None: nothing is written. own: a network given in Python; None: that of the config.
    """
    job, given, dataset = _prepare(config, workdir, progress, own)
    with job.storage.held(), contextlib.closing(job.recorder):
        evaluate = teacher_stage.measure(job, dataset)
        student = _finished(job, given)
        if student is not None:
            return student
        segment = record.begin_segment(job, own.call if own else None)
        images, labels = _training_images(job, given)
        ranges = _activation_ranges(job, images)
        state, evaluations = finetune.run(job, images, labels, ranges, evaluate)
        record.end_segment(job, segment)
        finished = job.storage.read_result()  # of a run whose student was lost
        result = finished or {**record.summary(job, len(images), evaluations), "held_out": None}
        variables = finetune.student_variables(job.student, job.variables, ranges, state.trained)
        student = _judged(job, _student(job, variables, result))
        if isinstance(job.storage, RunFolder):
            folder = job.storage.student
            processes.on_main(lambda: student.save(folder))
        processes.on_main(lambda: job.storage.write_result(dict(student.record)))  # last: it marks the run as finished
        processes.on_main(lambda: _report(job, student, images))
    return student


def _judged(job: Job, student: Student) -> Student:
    """The student with the agreement on `eval.held_out` in its record: `student` itself if its record has that already."""
    if held_out.is_measured(job.config, student.record):
        return student
    found = {"config": config_lib.to_dict(job.config), "held_out": held_out.measure(job, student.variables)}
    return dataclasses.replace(student, record={**student.record, **found})


def _finished(job: Job, given: Given | None) -> Student | None:
    """The student of a run that has finished. None if the run has not, or if its folder `student` is lost or damaged.

    Its images and checkpoints may be gone. If `eval.held_out` names another set than before, this set is judged now.
    """
    result = job.storage.read_result()
    if result is None or not isinstance(job.storage, RunFolder):
        return None
    folder = job.storage.student
    try:
        student = dataclasses.replace(load(folder, job.student.module), record=result)
    except UserError:
        return None
    images = None
    if given is not None:
        images = given[0]
    else:
        with contextlib.suppress(UserError):  # gone, or damaged since
            images = job.storage.learned_images(job.config)[0]
        if images is not None and not held_out.is_measured(job.config, result):
            held_out.refuse_common(job.config, images)
    judged = _judged(job, student)
    if judged is not student:
        processes.on_main(lambda: judged.save(folder))
        processes.on_main(lambda: job.storage.write_result(dict(judged.record)))
    processes.on_main(lambda: job.storage.write_config(job.config))
    if images is not None:
        processes.on_main(lambda: _report(job, judged, images, anew=judged is not student))
    return judged


def _report(job: Job, student: Student, images: np.ndarray, anew: bool = False) -> None:
    """Write the report of a finished run if it is wanted and missing. If this fails, the run only warns.

    anew: whether to replace a report that is there.
    """
    if not job.config.report or not isinstance(job.storage, RunFolder) or (job.storage.report.exists() and not anew):
        return
    from hast_jax.deliver import report

    try:
        report.write(job.storage, student, (job.teacher, job.variables), images)
    except Exception as error:
        own = "".join(f" --{flag}={code}" for flag, code in from_config.own_code(job.config).items())
        command = f"run python -m hast_jax.report --workdir={job.storage}{own}"
        if job.config.teacher.weights == GIVEN:
            again = "make the same call again"
        elif job.config.synthesis.real_split:  # these images are not kept
            again = "give the same command again"
        else:
            again = command
        words = f"the report was not written ({sentence(error)}), but the rest of the run is complete; to write the report,"
        warnings.warn(f"{words} {again}.", Notice, stacklevel=2)


def run_synthesis(config: ConfigDict, workdir: Path, progress: Progress = silent) -> Path:
    """Run stage 1 alone; returns the folder of the synthetic set. Raises UserError."""
    job, given, _ = _prepare(config, workdir, progress, None)
    with job.storage.held(), contextlib.closing(job.recorder):
        _training_images(job, given)
    return RunFolder(workdir).synthetic


def _prepare(
    config: ConfigDict, workdir: Path | None, progress: Progress, own: GivenNetwork | None
) -> tuple[Job, Given | None, datasets.Dataset | None]:
    """The job of this config, the given images to learn from (or None), and the real images for evaluation (or None).

    Raises UserError for nearly all that can be refused, before any stage starts. Afterwards the run folder, if any, is held.
    """
    with processes.failing_as_one():
        config_lib.validate(config)
        parallel.make_room_for_programs()
        devices = parallel.choose(config.devices, config.finetune.batch)
        if own is None:
            teacher, variables = from_config.teacher(config)
            dataset, given = datasets.load(config, config.eval.split), _given_images(config)
        else:
            teacher, variables = from_config.bare_teacher(config, own.module), own.variables
            dataset, given = own.dataset, own.images
        student = from_config.student(config, own.module if own else None)
        held_out_images = held_out.checksum(config)
        if given is not None:
            _check_enough(config, len(given[0]))
            held_out.refuse_common(config, given[0])
        teacher_stage.check_logits(teacher, variables, config)

    def job(storage):
        recorder = Recorder(workdir, progress, writing=processes.is_main())
        return Job(config, devices, storage, recorder, teacher, student, variables)

    if workdir is None:
        if processes.count() > 1:
            raise UserError("several processes share one run folder: give a workdir, on a file system that all of them use.")
        return job(MemoryRun()), given, dataset
    if (workdir / run_folder.CELLS).exists() and RunFolder(workdir).config.exists():
        raise UserError(f"{workdir} is the folder of a sweep: a run needs a folder of its own.")
    processes.on_main(lambda: run_folder.open_for_run(workdir, config))
    storage = RunFolder(workdir)
    try:
        processes.share_failures(workdir)
        known = crc32(np.fromfile(storage.config, np.uint8)) if storage.config.exists() else 0
        processes.require_same(
            {
                "config": config_lib.checksum(config),
                "weights": crc32(variables),
                "number of devices": devices,
                "held-out images": held_out_images,
                "images to learn from": crc32(given) if given else 0,
                "real images": checksum(dataset) or 0,
                "run folder (on one file system?)": known,
            }
        )
        processes.on_main(lambda: storage.check_teacher(variables, teacher.structure.program))
        processes.on_main(lambda: storage.check_test(checksum(dataset)))
        processes.on_main(lambda: _begin_with(storage, config, given))
        return job(storage), given, dataset
    except BaseException:
        run_folder.release(workdir)
        raise


def _begin_with(storage: RunFolder, config: ConfigDict, given: Given | None) -> None:
    """Record the given images that a run learns from (None: it makes its own). Raises UserError if it began with others."""
    if given is None:
        storage.check_own_images()
    else:
        storage.check_images(*given)
        storage.write_config(config)


def checksum(dataset: datasets.Dataset | None) -> int | None:
    """The checksum by which a run recognises its real images. For image files it covers only their labels."""
    if dataset is None:
        return None
    return crc32((dataset.images, dataset.labels) if isinstance(dataset, datasets.Arrays) else dataset.labels)


def _given_images(config: ConfigDict) -> Given | None:
    """Images and labels of `config.synthesis.source`, memory-mapped, or of the real `config.synthesis.real_split`.

    None if both fields are empty. Raises UserError if the images are missing.
    """
    settings = config.synthesis
    if settings.real_split:
        return datasets.sample(config, settings.images)
    if settings.source:
        return synthetic_set.first(paths.local(settings.source), config)
    return None


def _check_enough(config: ConfigDict, images: int) -> None:
    stage = max(("finetune", "calibration"), key=lambda name: config[name].batch)
    if images < config[stage].batch:
        settings = config.synthesis
        source = "the given set" if settings.source == GIVEN else settings.source
        place = source or f"the {settings.real_split} split"
        raise UserError(
            f"{place} holds {images} images, fewer than a batch: lower config.{stage}.batch ({config[stage].batch})."
        )


def _training_images(job: Job, given: Given | None) -> Given:
    """Stage 1: the images and labels that the student learns from, given or synthesized. Synthesized ones are memory-mapped."""
    if given is None:
        images, labels = synthesize.run(job)
        held_out.refuse_common(job.config, images)
        processes.on_main(lambda: job.storage.check_images(images, labels))
        processes.on_main(lambda: job.storage.write_config(job.config))  # nothing can be refused any more
    else:
        images, labels = given
    if isinstance(job.storage, RunFolder):
        picture, teacher = job.storage.picture, job.config.teacher
        processes.on_main(lambda: save_picture(picture, images, teacher.mean, teacher.std))
    return images, labels


def _activation_ranges(job: Job, images: np.ndarray) -> weights.Variables:
    """Stage 2: the calibrated ranges. A run that already has them only reads them."""

    def calibrated() -> None:
        if not job.storage.has_ranges():
            job.storage.write_ranges(calibrate.run(job, images))

    processes.on_main(calibrated)
    return job.storage.read_ranges(job.student.range_names)


def _student(job: Job, variables: weights.Variables, result: dict[str, Any]) -> Student:
    teacher = job.config.teacher
    rules = from_config.bit_rules(job.config)
    return Student(job.student, variables, rules, tuple(teacher.image), tuple(teacher.mean), tuple(teacher.std), result)


def restore_student(
    folder: RunFolder, variables: weights.Variables, config: ConfigDict, checkpoint: str, student: networks.Network
) -> tuple[weights.Variables, int]:
    """Variables of the student saved in a run folder, including its ranges, and the number of steps that it was trained.

    variables: the teacher's. checkpoint: "latest" or "best". The latest student of a finished run without undamaged checkpoints
    is read from the folder `student`. Raises UserError if there is no undamaged student.
    """
    state, finished = None, checkpoint == "latest" and folder.result.exists()
    if folder.has_ranges() and folder.checkpoints(checkpoint).is_dir():
        ranges = folder.read_ranges(student.range_names)
        with folder.open_checkpoints(checkpoint, keep=2, writing=False) as checkpoints:
            try:
                state = checkpoints.restore(finetune.init(variables["params"], ranges, config.finetune))
            except UserError as error:
                if checkpoint == "best" and isinstance(error, DamagedError):
                    words = f"the best student of {folder} is damaged, and cannot be restored"
                    raise UserError(f"{words}: take the last one, with --checkpoint=latest.") from error
                if not finished:
                    raise
    if state is None and finished:
        return load(folder.student, student.module).variables, config.finetune.epochs * config.finetune.steps_per_epoch
    if state is None:
        raise UserError(f"{folder} holds no {checkpoint} student yet: let its run reach the end of an epoch.")
    return finetune.student_variables(student, variables, ranges, state.trained), int(state.step)
