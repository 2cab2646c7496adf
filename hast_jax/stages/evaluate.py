"""Stage 4, evaluation: the accuracy of a network on real images, on all devices."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax.data.datasets import Dataset, normalise
from hast_jax.networks.weights import Variables
from hast_jax.runs import parallel, preemption, processes
from hast_jax.runs.loop import drive
from hast_jax.runs.progress import Progress, Update

Array = jax.Array
State = Array  # number of images [devices, 2] that top-1 and top-5 count as right
Logits = Callable[[Variables, Array], Array]  # (variables, normalised images) -> logits

TOP = 5


class Accuracy(NamedTuple):
    """Share of the images, in per cent, whose label has the largest logit, or one of the five largest."""

    top1: float
    top5: float


def step(state: State, logits: Array, labels: Array) -> State:
    """The counts of one device [2] after one more batch: logits [batch, classes], labels [batch], -1 as padding."""
    # A label's rank is the number of logits that are larger, or equal and of a smaller index, as for argmax and top-k.
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & before), 1)
    valid = (labels >= 0) & jnp.isfinite(own[:, 0])
    return state + jnp.stack([jnp.sum(valid & (rank == 0)), jnp.sum(valid & (rank < TOP))])


def evaluator(
    logits: Logits, dataset: Dataset, config: ConfigDict, devices: int, progress: Progress
) -> Callable[[Variables], Accuracy]:
    """A function from the variables of a network to its accuracy on `dataset`, computed on all devices of all processes.

    The function is compiled once, however often it is called.
    """
    batch = min(config.eval.batch, len(dataset.labels))
    batch += -batch % devices
    padded = np.pad(dataset.labels, (0, -len(dataset.labels) % batch), constant_values=-1)  # -1: padding
    first, every = processes.index(), processes.count()  # the batches of this process
    own_labels = padded.reshape(-1, batch)[first::every]

    def count(state: State, variables: Variables, images: Array, labels: Array) -> State:
        return step(state, logits(variables, normalise(images, config.teacher.mean, config.teacher.std)), labels)

    count_on_all = parallel.pmap(count, devices)

    def batches(variables: Variables) -> Iterator[tuple[Any, ...]]:
        replicated = parallel.replicate(variables, devices)
        for images, labels in zip(dataset.batches(batch, first, every), own_labels):
            images = np.pad(images, ((0, batch - len(images)), (0, 0), (0, 0), (0, 0)))
            yield (replicated, *parallel.split((images, labels), devices))

    def evaluate(variables: Variables) -> Accuracy:
        total, state = len(own_labels), parallel.replicate(jnp.zeros(2, jnp.int32), devices)
        loop = drive(
            lambda state, *inputs: (count_on_all(state, *inputs), {}),
            state,
            batches(variables),
            start=0,
            stop=total,
            steps_per_call=1,
            every=(max(1, total // 100),),
            what="evaluation",
            all_processes=False,  # a process may have one batch less, so they cannot agree on a step
        )
        for done, counted, _, preempted in loop:
            state = counted
            if preempted:
                preemption.leave()  # the caller saved before, and evaluates again on resume
            progress(Update("evaluate", done, total, 0.0, {}))
        progress(Update("evaluate", total, total, 0.0, {}, finished=True))
        own = np.sum(jax.device_get(state), 0)
        return Accuracy(*(100 * int(correct) / len(dataset.labels) for correct in processes.total(own)))

    return evaluate
