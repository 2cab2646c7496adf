"""The stages in their order, each going on where a killed run left it."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console

from hast_jax import calibrate, data, finetune, networks, parallel, run_folder, synthesize, synthetic_set
from hast_jax import config as config_lib
from hast_jax.accuracy import make_evaluator
from hast_jax.checkpoint import Checkpoints
from hast_jax.errors import UserError
from hast_jax.files import write_json
from hast_jax.loop import call_length, drive
from hast_jax.models import weights
from hast_jax.report import Reporter, save_picture, show_result
from hast_jax.run_folder import RunFolder

Array = jax.Array
Evaluator = Callable[[weights.Variables], float]


class Job(NamedTuple):
    """What every stage of a run needs. `variables` are the teacher's; `accuracy` judges the student, where data are given."""

    config: ConfigDict
    devices: int
    folder: RunFolder
    reporter: Reporter
    teacher: nn.Module
    student: nn.Module
    variables: weights.Variables
    accuracy: Evaluator | None


def run(config: ConfigDict, workdir: Path, console: Console) -> dict[str, Any]:
    """From a trained network to an evaluated quantized one in `workdir`; returns what `result.json` holds.

    Everything that can be refused is refused before synthesis starts. Raises UserError.
    """
    config_lib.validate(config)
    devices = parallel.setup(config.devices, config.finetune.batch)
    teacher, variables = networks.teacher(config)
    student = networks.student(config)
    dataset = data.load(config.eval.dataset, config.eval.split, config.eval.data_dir)
    folder = run_folder.open_for_run(workdir, config)
    teacher_accuracy = accuracy = None
    if dataset is not None:
        teacher_accuracy = make_evaluator(teacher, dataset, config, devices)(variables)
        accuracy = make_evaluator(student, dataset, config, devices)
    reporter = Reporter(folder.path, console)
    job = Job(config, devices, folder, reporter, teacher, student, variables, accuracy)
    images = synthetic_images(job)
    ranges = activation_ranges(job, images)
    evaluations = fine_tune(job, images, ranges)
    result = summarise(job, len(images), teacher_accuracy, evaluations)
    write_json(folder.result, result)
    show_result(console, result)
    reporter.close()
    return result


def synthetic_images(job: Job) -> Array:
    """Stage 1: the synthetic images, on the device; those of `config.synthesis.source` where it is set."""
    config, folder = job.config, job.folder
    cfg, shape = config.synthesis, tuple(config.teacher.image)
    if cfg.source:
        images, _ = synthetic_set.load(Path(cfg.source), shape)
        most = max(config.finetune.batch, config.calibration.batch)
        if len(images) < most:
            raise UserError(f"{cfg.source} holds {len(images)} images, fewer than the batch of {most}: lower the batch.")
    else:
        store = synthetic_set.SyntheticSet(folder.synthetic, cfg.images, cfg.batch, shape)
        with Checkpoints(folder.checkpoints("synthesis"), keep=2) as checkpoints:
            synthesize.run(job.teacher, job.variables, config, job.devices, store, checkpoints, job.reporter)
        images, _ = store.read()
    save_picture(folder.picture, images, config.teacher.mean, config.teacher.std)
    return jnp.asarray(images)


def activation_ranges(job: Job, images: Array) -> weights.Variables:
    """Stage 2: the ranges of the activations, read from `ranges.json` where it exists."""
    if not job.folder.ranges.exists():
        job.folder.write_ranges(calibrate.run(job.student, job.variables, images, job.config, job.reporter))
    return job.folder.read_ranges()


def fine_tune(job: Job, images: Array, ranges: weights.Variables) -> dict[int, float]:
    """Stage 3: train the student, saving it after each epoch; returns its accuracy by epoch (0 is before fine-tuning)."""
    config, devices, cfg = job.config, job.devices, job.config.finetune
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    stop, every = cfg.epochs * cfg.steps_per_epoch, cfg.steps_per_epoch
    calls = call_length(parallel.steps_per_call(config.steps_per_call), config.log_every, every)

    def evaluate(epoch: int, params: Any) -> None:
        if job.accuracy is not None:
            evaluations[epoch] = job.accuracy({**job.variables, "params": params, "ranges": ranges})
        write_json(job.folder.evaluations, evaluations)

    with (
        Checkpoints(job.folder.checkpoints("latest"), keep=2) as latest,
        Checkpoints(job.folder.checkpoints("best"), keep=1) as best,
    ):
        state, evaluations = _resume(latest, finetune.init(job.variables["params"], cfg), job.folder, every)
        start = int(state.step)
        with job.reporter.stage("finetune", stop, start) as progress:
            if start == 0:
                evaluate(0, state.params)
            loop = drive(
                parallel.pmap_steps(finetune.make_step(job.teacher, job.student, key, devices, cfg), devices, calls),
                parallel.replicate(state, devices),
                (parallel.replicate(finetune.Frozen(job.variables, ranges, images), devices),),
                start=start,
                stop=stop,
                steps_per_call=calls,
                every=(config.log_every, every),
                what="finetune",
            )
            for done, state, metrics in loop:
                progress.update(done, metrics)
                epoch, rest = divmod(done, every)
                if rest:
                    continue
                one = parallel.unreplicate(state)
                if epoch % config.eval.every == 0 or done == stop:
                    evaluate(epoch, one.params)
                    if best_epoch(evaluations) == epoch:
                        best.save(done, one)
                latest.save(done, one)
    return evaluations


def _resume(
    latest: Checkpoints, fresh: finetune.State, folder: RunFolder, steps_per_epoch: int
) -> tuple[finetune.State, dict[int, float]]:
    """The newest saved state and the accuracies up to it; else the fresh state and none."""
    saved = latest.restore(fresh)
    if saved is None:
        return fresh, {}
    try:
        known = dict(json.loads(folder.evaluations.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder.evaluations} is damaged ({error}): use another --workdir.") from error
    return saved, {int(epoch): top1 for epoch, top1 in known.items() if int(epoch) * steps_per_epoch <= int(saved.step)}


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
        "iterations": None if config.synthesis.source else config.synthesis.iterations,
        "steps": config.finetune.epochs * config.finetune.steps_per_epoch,
        "batch": config.finetune.batch,
        "seconds": {name: round(job.reporter.seconds(name), 1) for name in ("synthesis", "calibrate", "finetune")},
        "hardware": f"{job.devices} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "config": config_lib.to_dict(config),
    }
