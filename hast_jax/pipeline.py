"""The stages in their order, each going on where a killed run left it."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    reporter = Reporter(folder.path, console)
    accuracy: Evaluator | None = None
    teacher_accuracy = None
    if dataset is not None:
        teacher_accuracy = make_evaluator(teacher, dataset, config, devices)(variables)
        accuracy = make_evaluator(student, dataset, config, devices)
    images = synthetic_images(teacher, variables, config, devices, folder, reporter)
    ranges = activation_ranges(student, variables, images, config, folder, reporter)
    evaluations = fine_tune(teacher, student, variables, ranges, images, config, devices, folder, reporter, accuracy)
    result = summarise(config, devices, len(images), teacher_accuracy, evaluations, reporter)
    write_json(folder.result, result)
    show_result(console, result)
    reporter.close()
    return result


def synthetic_images(
    teacher: nn.Module,
    variables: weights.Variables,
    config: ConfigDict,
    devices: int,
    folder: RunFolder,
    reporter: Reporter,
) -> Array:
    """Stage 1: the synthetic images, on the device; those of `config.synthesis.source` where it is set."""
    cfg, shape = config.synthesis, tuple(config.teacher.image)
    if cfg.source:
        images, _ = synthetic_set.load(Path(cfg.source), shape)
        most = max(config.finetune.batch, config.calibration.batch)
        if len(images) < most:
            raise UserError(f"{cfg.source} holds {len(images)} images, fewer than the batch of {most}: lower the batch.")
    else:
        store = synthetic_set.SyntheticSet(folder.synthetic, cfg.images, cfg.batch, shape)
        with Checkpoints(folder.checkpoints("synthesis"), keep=2) as checkpoints:
            synthesize.run(teacher, variables, config, devices, store, checkpoints, reporter)
        images, _ = store.read()
    save_picture(folder.picture, images, config.teacher.mean, config.teacher.std)
    return jnp.asarray(images)


def activation_ranges(
    student: nn.Module,
    variables: weights.Variables,
    images: Array,
    config: ConfigDict,
    folder: RunFolder,
    reporter: Reporter,
) -> weights.Variables:
    """Stage 2: the ranges of the activations, read from `ranges.json` where it exists."""
    if not folder.ranges.exists():
        folder.write_ranges(calibrate.run(student, variables, images, config, reporter))
    return folder.read_ranges()


def fine_tune(
    teacher: nn.Module,
    student: nn.Module,
    variables: weights.Variables,
    ranges: weights.Variables,
    images: Array,
    config: ConfigDict,
    devices: int,
    folder: RunFolder,
    reporter: Reporter,
    accuracy: Evaluator | None,
) -> dict[int, float]:
    """Stage 3: train the student; returns its accuracy by epoch (0 is before fine-tuning)."""
    cfg = config.finetune
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    every = cfg.steps_per_epoch
    calls = call_length(parallel.steps_per_call(config.steps_per_call), config.log_every, every)

    def score(params: Any) -> float | None:
        return accuracy({**variables, "params": params, "ranges": ranges}) if accuracy else None

    with (
        Checkpoints(folder.checkpoints("latest"), keep=2) as latest,
        Checkpoints(folder.checkpoints("best"), keep=1) as best,
    ):
        state = finetune.init(variables["params"], cfg)
        evaluations: dict[int, float] = {}
        restored = latest.restore(state)
        if restored is not None:
            state = restored
            known = json.loads(folder.evaluations.read_text())
            evaluations = {int(epoch): value for epoch, value in known.items() if int(epoch) * every <= int(state.step)}
        start, stop = int(state.step), cfg.epochs * every
        with reporter.stage("finetune", stop, start) as progress:
            if start == 0:
                _record(evaluations, 0, score(state.params), folder)
            loop = drive(
                parallel.pmap_steps(finetune.make_step(teacher, student, key, devices, cfg), devices, calls),
                parallel.replicate(state, devices),
                (parallel.replicate(finetune.Frozen(variables, ranges, images), devices),),
                start=start,
                stop=stop,
                steps_per_call=calls,
                every=config.log_every,
                what="finetune",
            )
            for done, state, metrics in loop:
                progress.update(done, metrics)
                epoch, rest = divmod(done, every)
                if rest:
                    continue
                one = parallel.unreplicate(state)
                if epoch % config.eval.every == 0 or done == stop:
                    value = score(one.params)
                    if value is not None and value > max((v for e, v in evaluations.items() if e > 0), default=-1.0):
                        best.save(done, one)
                    _record(evaluations, epoch, value, folder)
                latest.save(done, one)
    return evaluations


def _record(evaluations: dict[int, float], epoch: int, value: float | None, folder: RunFolder) -> None:
    if value is not None:
        evaluations[epoch] = value
    write_json(folder.evaluations, evaluations)


def summarise(
    config: ConfigDict,
    devices: int,
    images: int,
    teacher_accuracy: float | None,
    evaluations: dict[int, float],
    reporter: Reporter,
) -> dict[str, Any]:
    """What `result.json` holds: accuracies in per cent, the budget, the time of each stage, the hardware."""
    tuned = {epoch: value for epoch, value in evaluations.items() if epoch > 0}
    best_epoch = max(tuned, key=lambda epoch: tuned[epoch], default=None)
    return {
        "network": config.teacher.network,
        "weights": config.teacher.weights,
        "dataset": config.eval.dataset,
        "bits": config.bits.to_dict(),
        "seed": config.seed,
        "teacher": teacher_accuracy,
        "no_finetuning": evaluations.get(0),
        "last": tuned[max(tuned)] if tuned else None,
        "best": tuned[best_epoch] if best_epoch else None,
        "best_epoch": best_epoch,
        "images": images,
        "iterations": config.synthesis.iterations,
        "steps": config.finetune.epochs * config.finetune.steps_per_epoch,
        "batch": config.finetune.batch,
        "seconds": {name: round(reporter.seconds(name), 1) for name in ("synthesis", "calibrate", "finetune")},
        "hardware": f"{devices} x {jax.devices()[0].device_kind} ({platform.machine()})",
        "config": config_lib.to_dict(config),
    }
