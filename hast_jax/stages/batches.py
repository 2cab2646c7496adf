"""What a step of fine-tuning reads: its share of the synthetic set, from the device's memory or streamed from the disk."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax.method import augmentation
from hast_jax.runs import parallel

Array = jax.Array
Images = Array | np.ndarray
Variables = Mapping[str, Any]


class Strengths(NamedTuple):
    """The weights of the losses and the size of the promotion; scalars.

    They are arguments of the compiled step, so that runs that differ in them alone share one program.
    """

    a: Array
    b: Array
    lam: Array
    ce: Array
    eps: Array


class FixedInputs(NamedTuple):
    """What fine-tuning does not change.

    teacher: its variables. ranges: of the activations. images [n, h, w, c], labels [n]: the synthetic set. seed: scalar.
    Where images are streamed they are instead those of the steps of one call, this device's share of each:
    images [steps, share, h, w, c], labels [steps, share].
    """

    teacher: Variables
    ranges: Variables
    images: Images
    labels: Images
    seed: Array
    strengths: Strengths


def fixed_inputs(teacher: Variables, ranges: Variables, images: Images, labels: Images, config: ConfigDict) -> FixedInputs:
    """`FixedInputs`, with the seed and the strengths of the whole `config`."""
    strengths = Strengths(*(jnp.asarray(config.finetune[name]) for name in Strengths._fields))
    return FixedInputs(teacher, ranges, images, labels, jnp.uint32(config.seed), strengths)


def step_key(seed: Array, step: Array) -> Array:
    """The key of everything random in this step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), step)


def chosen_rows(key: Array, images: int, batch: int) -> Array:
    """Rows [batch] of the synthetic set of `images` images that are the global batch of the step with this key."""
    return jax.random.choice(key, images, (batch,), replace=False)


def draw(fixed: FixedInputs, step: Array, settings: ConfigDict) -> tuple[Array, Array]:
    """This device's share of the images and labels of this step, augmented.

    The global batch depends on the seed and the step, not on the number of devices, nor on whether images are streamed.
    """
    key = step_key(fixed.seed, step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(settings.batch))
    if settings.stream:
        rows = step % len(fixed.images)
    else:
        rows = parallel.device_share(chosen_rows(key, len(fixed.images), settings.batch))
    images, labels = fixed.images[rows], fixed.labels[rows]
    if settings.augment:
        keys = parallel.device_share(keys)
        images = augmentation.random_resized_crop_and_flip(keys, images, (settings.crop_scale, 1.0))
    return jnp.asarray(images), jnp.asarray(labels)


def inputs(fixed: FixedInputs, calls: range, count: int, settings: ConfigDict) -> Iterator[tuple[FixedInputs]]:
    """What each call gets beside the state, on `count` devices of this process.

    fixed: with all images, as NumPy arrays that may be memory-mapped. calls: the first step of each call. All images are
    copied to every device, once; or, with `settings.stream`, a thread that runs ahead of the device reads those of each call.
    """
    if settings.stream:
        return _stream(fixed, calls, count, settings)
    return itertools.repeat((parallel.replicate(fixed, count),))


def _stream(fixed: FixedInputs, calls: range, count: int, settings: ConfigDict) -> Iterator[tuple[FixedInputs]]:
    import grain

    images, labels = fixed.images, fixed.labels
    rows_of = jax.jit(jax.vmap(lambda step: chosen_rows(step_key(fixed.seed, step), len(images), settings.batch)))

    def read(first: int) -> tuple[Images, Images]:
        rows = np.asarray(rows_of(first + np.arange(calls.step)))  # [steps, batch]
        rows = parallel.process_rows(rows, count)
        return images[rows], labels[rows]

    rest = parallel.replicate(fixed._replace(images=np.zeros(0), labels=np.zeros(0)), count)
    reader = grain.MapDataset.range(calls.start, calls.stop, calls.step).map(read)
    for batch in reader.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)):
        chosen, of_labels = parallel.shard(batch, count)
        yield (rest._replace(images=chosen, labels=of_labels),)
