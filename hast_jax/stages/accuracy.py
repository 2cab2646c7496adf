"""Accuracy of a network on real images, on all devices."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from hast_jax import networks
from hast_jax.data.datasets import Dataset, normalise
from hast_jax.networks.weights import Variables
from hast_jax.runs import parallel, preemption

Array = jax.Array

TOP = 5


class Accuracy(NamedTuple):
    """In per cent of the images: the label is the largest logit, or one of the five largest."""

    top1: float
    top5: float


def make_evaluator(
    network: nn.Module, dataset: Dataset, config: ConfigDict, devices: int, console: Console
) -> Callable[[Variables], Accuracy]:
    """A function from the network's variables to its accuracy on `dataset`, computed on all devices.

    Several processes share its batches. On a terminal it shows its progress on `console` while it runs.
    """
    batch = min(config.eval.batch, len(dataset.labels))
    batch += -batch % devices
    padded = np.pad(dataset.labels, (0, -len(dataset.labels) % batch), constant_values=-1)  # -1: no image
    process, processes = parallel.process_index(), parallel.process_count()
    own_labels = padded.reshape(-1, batch)[process::processes]

    def correct(variables: Variables, images: Array, labels: Array) -> tuple[Array, Array]:
        logits, _ = networks.apply(network, variables, normalise(images, config.teacher.mean, config.teacher.std))
        # A label's rank is the number of larger logits, or as large ones of smaller index, as argmax and top-k count.
        own = jnp.take_along_axis(logits, labels[:, None], 1)
        before = jnp.arange(logits.shape[1])[None] < labels[:, None]
        rank = jnp.sum((logits > own) | ((logits == own) & before), 1)
        valid = (labels >= 0) & jnp.isfinite(own[:, 0])
        return jnp.sum(valid & (rank == 0)), jnp.sum(valid & (rank < TOP))

    count_correct = parallel.pmap(correct, devices)

    def evaluate(variables: Variables) -> Accuracy:
        replicated = parallel.replicate(variables, devices)
        batches = track(
            dataset.batches(batch, process, processes),
            "evaluate",
            total=len(own_labels),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        counts = []
        for images, labels in zip(batches, own_labels):
            if preemption.asked():
                preemption.leave()  # whoever evaluates has saved before, and does it again
            images = np.pad(images, ((0, batch - len(images)), (0, 0), (0, 0), (0, 0)))
            shares = parallel.split((images, labels), devices)
            counts.append(count_correct(replicated, *shares))
        own = np.sum(jax.device_get(counts), (0, 2)) if counts else np.zeros(2, np.int32)
        return Accuracy(*(100 * int(correct) / len(dataset.labels) for correct in parallel.total(own)))

    return evaluate
