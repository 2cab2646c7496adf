"""What a run first asks of its teacher: whether its outputs can be learned from, and its accuracy on real images."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax import networks
from hast_jax.data import datasets
from hast_jax.errors import AccuracyWarning, Notice, UserError
from hast_jax.method import losses, pyramid
from hast_jax.networks import weights
from hast_jax.runs import processes
from hast_jax.runs.progress import Update
from hast_jax.stages.evaluate import evaluator
from hast_jax.stages.job import Job

MOST_COMPARED = 64  # real images
# Between real images and those of the training, in the teacher's first batch norm: the ratio of variances, and the distance of
# means in standard deviations. Pixels of 0 ... 1 in place of normalised images have a twentieth of the variance.
MOST_VARIANCE, MOST_AWAY = 4.0, 1.0


def check_logits(teacher: networks.Network, variables: weights.Variables, config: ConfigDict) -> None:
    """Look at the teacher on noise, from which synthesis starts. config: the whole config.

    Raises UserError if its logits or batch-norm statistics are not finite. Warns if its logits are probabilities.
    """

    @jax.jit
    def look(variables: weights.Variables, images: jax.Array) -> tuple[jax.Array, ...]:
        logits, taps = networks.apply(teacher, variables, images)
        largest = jnp.stack([jnp.max(jnp.abs(tap.inputs)) for tap in taps.batch_norms])
        return logits, largest, *losses.bn_statistics(losses.bn_moments(taps.batch_norms))

    noise = jax.random.normal(jax.random.key(0), (2, *config.teacher.image))
    found = look(variables, pyramid.images([noise], pyramid.unit_of(config.teacher.mean, config.teacher.std)))
    finite = [np.isfinite(each).all() for each in jax.device_get(found)]
    if not all(finite[:2]):
        raise UserError(
            "the teacher's logits or the inputs of its batch norms are not finite on images of noise: give other weights, "
            "because these are damaged or too large for float32."
        )
    if not all(finite):
        raise UserError(
            f"the inputs of the teacher's batch norms are as large as {np.max(found[1]):.1e} on images of noise, so that the "
            "squares of their variances are too large for float32: check mean and std, and the weights."
        )
    logits = np.asarray(found[0])
    if np.all(logits >= 0) and np.allclose(logits.sum(1), 1, atol=1e-3):
        warnings.warn(
            "the teacher's outputs are probabilities: let the network return what it computes before its softmax, because the "
            "student loses less accuracy with logits.",
            Notice,
            stacklevel=2,
        )


def check_normalisation(
    teacher: networks.Network, variables: weights.Variables, dataset: datasets.Dataset, config: ConfigDict
) -> None:
    """Warn if real images reach the teacher's first batch norm with other moments than its training images did.

    This shows a wrong `mean` or `std`, even where the teacher still guesses better than chance. Channels are compared one by
    one, and their median counts. config: the whole config.
    """

    @jax.jit
    def first_moments(variables: weights.Variables, images: jax.Array) -> losses.Moments:
        images = datasets.normalise(images, config.teacher.mean, config.teacher.std)
        return losses.bn_moments(networks.apply(teacher, variables, images)[1].batch_norms[:1])[0]

    rows = np.linspace(0, len(dataset.labels) - 1, min(MOST_COMPARED, len(dataset.labels))).astype(int)
    found = jax.device_get(first_moments(variables, dataset.read(rows)))
    shift, running = found.mean - found.running_mean, found.running_var + 1e-5
    variance, away = np.median((found.spread - shift**2) / running), np.median(np.abs(shift) / np.sqrt(running))
    if not 1 / MOST_VARIANCE < variance < MOST_VARIANCE or away > MOST_AWAY:
        warnings.warn(
            f"the real images reach the teacher's first batch norm with {variance:.2g} times the variance of its training "
            f"images, and with a mean that is {away:.2g} standard deviations away: check mean and std.",
            Notice,
            stacklevel=3,
        )


def measure(job: Job, dataset: datasets.Dataset | None) -> Callable[[Any], float] | None:
    """Measure the teacher's top-1 once in a run, before any long work, and report it.

    Returns a function from a student's variables to its top-1 in per cent; None without real images.
    """
    if dataset is None:
        return None
    progress = job.recorder.progress

    def judge(network):
        return evaluator(partial(networks.logits, network), dataset, job.config, job.devices, progress)

    accuracy = job.storage.teacher_accuracy()
    if accuracy is None:
        check_normalisation(job.teacher, job.variables, dataset, job.config)
        found = judge(job.teacher)(job.variables)
        accuracy = {"top1": found.top1, "top5": found.top5, "images": len(dataset.labels)}
        processes.on_main(lambda: job.storage.remember_teacher_accuracy(accuracy))
    progress(Update("teacher", 1, 1, 0.0, accuracy, finished=True))
    chance = 100 / job.teacher.classes
    error = (chance * (100 - chance) / accuracy["images"]) ** 0.5
    if accuracy["top1"] <= chance + 3 * error:
        warnings.warn(
            f"the teacher's top-1 of {accuracy['top1']:.2f} % is no better than chance ({chance:.2f} %): "
            "check whether the weights, the normalisation and the order of the classes are right.",
            AccuracyWarning,
            stacklevel=2,
        )
    evaluate = judge(job.student)
    return lambda variables: evaluate(variables).top1
