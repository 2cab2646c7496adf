"""Stage 2, calibration: measures one range for each quantized activation and leaves the weights as they are."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax import networks
from hast_jax.errors import UserError
from hast_jax.networks import Network
from hast_jax.runs import preemption
from hast_jax.runs.loop import drive
from hast_jax.stages.job import Job

Array = jax.Array
State = Mapping[str, Any]  # the ranges, {} before the first batch


def step(student: Network, variables: Mapping[str, Any], ranges: State, images: Array) -> State:
    """The ranges after one more batch of images [batch, height, width, channels]."""
    return networks.observe(student, variables, ranges, images)


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

    def batches() -> Iterator[tuple[np.ndarray]]:
        for chosen in rows:
            yield (images[chosen],)

    observe = jax.jit(partial(step, job.student))
    with job.recorder.stage("calibrate", settings.batches) as stage:
        loop = drive(
            lambda ranges, batch: (observe(job.variables, ranges, batch), {}),
            {},
            batches(),
            start=0,
            stop=settings.batches,
            steps_per_call=1,
            every=(job.config.log_every,),
            what="calibration",
            all_processes=False,
        )
        ranges: State = {}
        for done, latest, _, preempted in loop:
            ranges = latest
            if preempted:
                preemption.leave()  # nothing is saved: calibration is short and begins anew
            if done % job.config.log_every == 0:
                stage.update(done)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(ranges))):
        raise UserError(
            "calibration found activations that are not finite: check the weights, and that the images are normalised."
        )
    return ranges
