"""The stages in their order, each going on where a killed run left it."""

import json
import platform
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from hast_jax import config as config_lib
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.networks import from_config, weights
from hast_jax.runs import parallel, preemption, run_folder, synthetic_set
from hast_jax.runs.checkpoint import Checkpoints
from hast_jax.runs.files import crc32, write_json
from hast_jax.runs.loop import call_length, drive
from hast_jax.runs.report import Reporter, save_picture
from hast_jax.runs.run_folder import RunFolder
from hast_jax.stages import calibrate, finetune, synthesize
from hast_jax.stages.accuracy import Accuracy, make_evaluator

Evaluator = Callable[[weights.Variables], Accuracy]


class Job(NamedTuple):
    """What every stage of a run needs.

    `variables` are the teacher's; `accuracy` judges the student, where data are given; `given` are the images and labels to
    learn from, where the config names some instead of having them made.
    """

    config: ConfigDict
    devices: int
    folder: RunFolder
    reporter: Reporter
    teacher: nn.Module
    student: nn.Module
    variables: weights.Variables
    accuracy: Evaluator | None
    given: tuple[np.ndarray, np.ndarray] | None


def prepare(config: ConfigDict, workdir: Path, console: Console) -> tuple[Job, float | None]:
    """The job of this config in `workdir`, and the teacher's accuracy (None without evaluation data).

    Everything that can be refused is refused here, before any stage starts. Raises UserError.
    """
    config_lib.validate(config)
    devices = parallel.setup(config.devices, config.finetune.batch)
    console.quiet = console.quiet or not parallel.is_main()
    teacher, variables = from_config.teacher(config)
    student = from_config.student(config)
    dataset = datasets.load(config, config.eval.split)
    given = given_images(config)
    parallel.on_main(lambda: run_folder.open_for_run(workdir, config))
    folder = run_folder.RunFolder(workdir)
    parallel.agree(
        {
            "config": config_lib.checksum(config),
            "weights": crc32(variables),
            "number of devices": devices,
            "run folder (on one file system?)": crc32(np.fromfile(folder.config, np.uint8)) if folder.config.exists() else 0,
        }
    )
    parallel.on_main(lambda: folder.check_teacher(variables))
    teacher_accuracy = accuracy = None
    if dataset is not None:
        teacher_accuracy = make_evaluator(teacher, dataset, config, devices, console)(variables).top1
        accuracy = make_evaluator(student, dataset, config, devices, console)
    reporter = Reporter(folder.path, console, writing=parallel.is_main())
    return Job(config, devices, folder, reporter, teacher, student, variables, accuracy, given), teacher_accuracy


def run(config: ConfigDict, workdir: Path, console: Console) -> dict[str, Any]:
    """From a trained network to an evaluated quantized one in `workdir`; returns what `result.json` holds.

    Raises UserError.
    """
    job, teacher_accuracy = prepare(config, workdir, console)
    images, labels = training_images(job)
    ranges = activation_ranges(job, images)
    evaluations = fine_tune(job, finetune.freeze(job.variables, ranges, images, labels, config))
    result = summarise(job, len(images), teacher_accuracy, evaluations)
    parallel.on_main(lambda: write_json(job.folder.result, result))
    job.reporter.close()
    return result


def run_synthesis(config: ConfigDict, workdir: Path, console: Console) -> Path:
    """Stage 1 alone; returns the folder of the synthetic set. Raises UserError."""
    job, _ = prepare(config, workdir, console)
    training_images(job)
    job.reporter.close()
    return job.folder.synthetic


def given_images(config: ConfigDict) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of `config.synthesis.source`, memory-mapped, or real ones of `config.synthesis.real_split`, or None.

    Raises UserError where they are not there, or fewer than a batch.
    """
    cfg = config.synthesis
    if cfg.real_split:
        images, labels = datasets.sample(config, cfg.images)
    elif cfg.source:
        images, labels = (array[: cfg.images] for array in synthetic_set.load(Path(cfg.source), tuple(config.teacher.image)))
    else:
        return None
    most = max(config.finetune.batch, config.calibration.batch)
    if len(images) < most:
        place = cfg.source or f"the {cfg.real_split} split"
        raise UserError(f"{place} holds {len(images)} images, fewer than the batch of {most}: lower the batch.")
    return images, labels


def training_images(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Stage 1: the images and labels that the student learns from: those given, or synthesized ones, memory-mapped."""
    config, folder = job.config, job.folder
    cfg, shape = config.synthesis, tuple(config.teacher.image)
    if job.given is not None:
        images, labels = job.given
        if parallel.process_count() > 1:
            parallel.agree({"images": crc32((images, labels))})
    else:
        store = partial(synthetic_set.SyntheticSet, folder.synthetic, cfg.images, cfg.batch, shape)
        parallel.on_main(store)
        with Checkpoints(folder.checkpoints("synthesis"), keep=2) as checkpoints:
            synthesize.run(job.teacher, job.variables, config, job.devices, store(create=False), checkpoints, job.reporter)
        # Until here process 0 may still have been writing. What was half-way is whole now.
        parallel.on_main(lambda: shutil.rmtree(folder.checkpoints("synthesis")))
        images, labels = store(create=False).read()
    parallel.on_main(lambda: folder.check_images(images, labels))
    parallel.on_main(lambda: save_picture(folder.picture, images, config.teacher.mean, config.teacher.std))
    return images, labels


def activation_ranges(job: Job, images: np.ndarray) -> weights.Variables:
    """Stage 2: the ranges of the activations, read from `ranges.json` where it exists."""

    def calibrated() -> None:
        if not job.folder.ranges.exists():
            job.folder.write_ranges(calibrate.run(job.student, job.variables, images, job.config, job.reporter))

    parallel.on_main(calibrated)
    return job.folder.read_ranges()


def fine_tune(job: Job, frozen: finetune.Frozen) -> dict[int, float]:
    """Stage 3: train the student, saving it after each epoch; returns its accuracy by epoch (0 is before fine-tuning)."""
    config, devices, cfg = job.config, job.devices, job.config.finetune
    stop, every = cfg.epochs * cfg.steps_per_epoch, cfg.steps_per_epoch
    step = finetune.make_step(job.teacher, job.student, cfg)

    def evaluate(state: finetune.State) -> None:
        epoch = int(state.step) // every
        if job.accuracy is not None:
            variables = {**job.variables, "params": state.params, "ranges": frozen.ranges}
            evaluations[epoch] = job.accuracy(variables).top1
        if best_epoch(evaluations) == epoch:
            best.save(int(state.step), state)
        # Last, so that a run that is killed before evaluates this epoch again.
        parallel.on_main(lambda: write_json(job.folder.evaluations, evaluations))

    with (
        Checkpoints(job.folder.checkpoints("latest"), keep=2, keep_every=cfg.keep_every * every) as latest,
        Checkpoints(job.folder.checkpoints("best"), keep=1) as best,
    ):
        state, evaluations = _resume(latest, finetune.init(job.variables["params"], cfg), job.folder, every)
        start = int(state.step)
        calls = call_length(parallel.steps_per_call(config.steps_per_call), config.log_every, every, start)
        due = lambda step: step % every == 0 and (step // every % config.eval.every == 0 or step == stop)
        with job.reporter.stage("finetune", stop, start) as progress:
            if due(start) and start // every not in evaluations:
                evaluate(state)
            loop = drive(
                parallel.pmap_steps(step, devices, calls, together=True),
                parallel.replicate(state, devices),
                finetune.inputs(frozen, range(start, stop, calls), devices, cfg),
                start=start,
                stop=stop,
                steps_per_call=calls,
                every=(config.log_every, every),
                what="finetune",
            )
            for done, state, metrics, preempted in loop:
                progress.update(done, metrics)
                if done % every == 0 or preempted:
                    one = jax.device_get(parallel.unreplicate(state))
                    latest.save(done, one)
                    if preempted:
                        preemption.leave()
                    if due(done):
                        evaluate(one)
    return evaluations


def _resume(
    latest: Checkpoints, fresh: finetune.State, folder: RunFolder, steps_per_epoch: int
) -> tuple[finetune.State, dict[int, float]]:
    """The newest saved state and the accuracies up to it; else the fresh state and none."""
    saved = latest.restore(fresh)
    parallel.agree({"newest checkpoint": 0 if saved is None else int(saved.step)})
    if saved is None:
        return fresh, {}
    try:
        known = {int(epoch): float(top1) for epoch, top1 in json.loads(folder.evaluations.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder.evaluations} is damaged ({error}): use another --workdir.") from error
    return saved, {epoch: top1 for epoch, top1 in known.items() if epoch * steps_per_epoch <= int(saved.step)}


def restore_student(
    folder: RunFolder, variables: weights.Variables, config: ConfigDict, checkpoint: str
) -> tuple[weights.Variables, int]:
    """Variables of the student saved in a run folder, ranges included, and the number of steps it was trained.

    variables: the teacher's. checkpoint: "latest" or "best". Raises UserError where there is none that is whole.
    """
    state, path = None, folder.checkpoints(checkpoint)
    if path.is_dir():
        with Checkpoints(path, keep=2, writing=False) as checkpoints:
            state = checkpoints.restore(finetune.init(variables["params"], config.finetune))
    if state is None:
        raise UserError(f"{folder.path} holds no {checkpoint} student yet: let its run reach the end of an epoch.")
    return {**variables, "params": state.params, "ranges": folder.read_ranges()}, int(state.step)


def best_epoch(evaluations: dict[int, float]) -> int | None:
    """The first of the best epochs after fine-tuning began: selected on the data it was evaluated on."""
    return max((epoch for epoch in evaluations if epoch > 0), key=lambda epoch: evaluations[epoch], default=None)


def summarise(job: Job, images: int, teacher_accuracy: float | None, evaluations: dict[int, float]) -> dict[str, Any]:
    """What `result.json` holds: accuracies in per cent, the budget, the time of each stage, the hardware."""
    config, best = job.config, best_epoch(evaluations)
    return {
        "network": config.teacher.network,
        "weights": config.teacher.weights,
        "dataset": config.eval.dataset,
        "bits": config.bits.to_dict(),
        "seed": config.seed,
        "teacher": teacher_accuracy,
        "no_finetuning": evaluations.get(0),
        "last": evaluations[max(evaluations)] if best else None,
        "best": evaluations[best] if best else None,
        "best_epoch": best,
        "images": images,
        "iterations": None if config.synthesis.source or config.synthesis.real_split else config.synthesis.iterations,
        "real_split": config.synthesis.real_split,
        "steps": config.finetune.epochs * config.finetune.steps_per_epoch,
        "batch": config.finetune.batch,
        "seconds": {name: round(job.reporter.seconds(name), 1) for name in ("synthesis", "calibrate", "finetune")},
        "hardware": f"{job.devices * parallel.process_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "config": config_lib.to_dict(config),
    }
