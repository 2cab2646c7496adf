"""How often a student gives the answer of its teacher, and how far its logits are from the teacher's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax.method import losses
from hast_jax.networks.forward import logits as logits_of
from hast_jax.networks.network import Array, Network, Variables


class Agreement(NamedTuple):
    """Images, in per cent, for which student and teacher have the same largest logit; mean KL(teacher || student) in nats."""

    top1: float
    kl: float


def agreement(teacher: Network, student: Network, variables: tuple[Variables, Variables], images: Any, batch: int) -> Agreement:
    """Agreement on normalised images [n, height, width, channels], which may be synthetic: no label is needed.

    variables: those of the teacher and of the student. batch: images in a step, which runs on one device.
    """

    @jax.jit
    def step(variables: tuple[Variables, Variables], images: Array) -> Array:
        target, logits = (logits_of(each, own, images) for each, own in zip((teacher, student), variables))
        same = jnp.sum(jnp.argmax(target, 1) == jnp.argmax(logits, 1))
        return jnp.stack([same.astype(jnp.float32), len(images) * losses.distillation(target, logits, 1.0, 1.0)])

    parts = [np.asarray(step(variables, jnp.asarray(images[i : i + batch]))) for i in range(0, len(images), batch)]
    means = np.stack(parts).astype(np.float64).sum(0) / len(images)
    return Agreement(100 * float(means[0]), float(means[1]))
