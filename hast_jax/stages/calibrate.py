"""Stage 2, calibration: measures one range for each quantized activation and leaves the weights as they are."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax import networks
from hast_jax.errors import UserError
from hast_jax.networks import Network
from hast_jax.runs import parallel, preemption
from hast_jax.runs.loop import crosses
from hast_jax.stages.job import Job

Array = jax.Array
State = Mapping[str, Any]  # the ranges, {} before the first batch


def step(student: Network, variables: Mapping[str, Any], ranges: State, images: Array) -> State:
    """The ranges after one more batch of images [batch, height, width, channels]."""
    return networks.observe(student, variables, ranges, images)


def steps(student: Network, variables: Mapping[str, Any], ranges: State, images: Array) -> State:
    """The ranges after more batches of images [batches, batch, height, width, channels]; the first batch of all comes alone."""
    if len(images) == 1:  # no loop: on a CPU, XLA runs the convolutions of a loop body on one thread
        return step(student, variables, ranges, images[0])
    return jax.lax.scan(lambda ranges, batch: (step(student, variables, ranges, batch), None), ranges, images)[0]


def run(job: Job, images: np.ndarray) -> State:
    """The range of each quantized activation, from random batches of `images`, which may be memory-mapped.

    The authors calibrate on images of a small generator. The student's own training images need no such second network. Raises
    UserError if a range is not finite.
    """
    settings, key = job.config.calibration, job.key(2)

    def choose(index: Array) -> Array:
        return jax.random.choice(jax.random.fold_in(key, index), len(images), (settings.batch,), replace=False)

    # The rows of all batches at once, because fetching them batch by batch would make the device wait for the host.
    rows = np.asarray(jax.lax.map(choose, jnp.arange(settings.batches)))
    observe = jax.jit(partial(steps, job.student))
    with job.recorder.stage("calibrate", settings.batches) as stage:
        ranges: State = {}
        done = 0
        for chosen in _calls(rows, parallel.steps_per_call(job.config.steps_per_call)):
            ranges = observe(job.variables, ranges, images[chosen])
            done += len(chosen)
            preemption.check()  # nothing is saved: calibration is short and begins anew
            if crosses(done, job.config.log_every, len(chosen)):
                stage.update(done)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(ranges))):
        raise UserError(
            "calibration found activations that are not finite: check the weights, and that the images are normalised."
        )
    return ranges


def _calls(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows of each call. The first batch, which starts the ranges, comes alone. Other calls differ by at most one batch."""
    rest = rows[1:]
    return [rows[:1], *np.array_split(rest, -(-len(rest) // most))] if len(rest) else [rows]
