"""Top-1 accuracy of a network on real images, on all devices."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax import models, parallel
from hast_jax.data import Dataset, check, normalise
from hast_jax.models.weights import Variables

Array = jax.Array


def make_evaluator(network: nn.Module, dataset: Dataset, config: ConfigDict, devices: int) -> Callable[[Variables], float]:
    """A function from the network's variables to its top-1 accuracy (%) on `dataset`, computed on all devices.

    Raises UserError where the data set does not fit the network.
    """
    check(dataset, config.eval.dataset, config.teacher.image, config.teacher.classes)
    batch = config.eval.batch + -config.eval.batch % devices
    n = len(dataset.labels)
    padding = -n % batch
    images = np.pad(dataset.images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(dataset.labels, (0, padding), constant_values=-1)  # no logit has this index

    def correct(variables: Variables, images: Array, labels: Array) -> Array:
        logits, _ = models.apply(network, variables, normalise(images, config.teacher.mean, config.teacher.std))
        return jnp.sum(jnp.argmax(logits, 1) == labels)

    count_correct = parallel.pmap(correct, devices)

    def evaluate(variables: Variables) -> float:
        replicated = parallel.replicate(variables, devices)
        counts = []
        for start in range(0, n + padding, batch):
            rows = slice(start, start + batch)
            counts.append(count_correct(replicated, *parallel.split((images[rows], labels[rows]), devices)))
        return 100 * int(np.sum(jax.device_get(counts))) / n

    return evaluate
