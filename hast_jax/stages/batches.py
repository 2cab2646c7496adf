"""The images of each fine-tuning step, from the synthetic set in the device's memory or streamed from disk."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax.method import augmentation, pyramid
from hast_jax.runs import parallel

Array = jax.Array
Images = Array | np.ndarray
Variables = Mapping[str, Any]


class Strengths(NamedTuple):
    """The weights of the losses (a, b, lam, ce), scalars; and the size of the promotion (eps), a scalar or [1, 1, 1, channels].

    They are arguments of the compiled step, so that runs that differ only in them share one program.
    """

    a: Array
    b: Array
    lam: Array
    ce: Array
    eps: Array


class FixedInputs(NamedTuple):
    """The inputs that fine-tuning does not change.

    teacher: its variables. ranges: the calibrated ones. images [n, h, w, c], labels [n]: the synthetic set. seed: scalar.
    With `finetune.stream`, images and labels are instead this device's share of each batch of one call: images
    [steps, share, h, w, c], labels [steps, share].
    """

    teacher: Variables
    ranges: Variables
    images: Images
    labels: Images
    seed: Array
    strengths: Strengths


def fixed_inputs(teacher: Variables, ranges: Variables, images: Images, labels: Images, config: ConfigDict) -> FixedInputs:
    """`FixedInputs` with the seed and the strengths of `config`, the whole config.

    eps is a distance between normalised images. For a network that takes others, it is scaled to their unit.
    """
    strengths = Strengths(*(jnp.asarray(config.finetune[name]) for name in Strengths._fields))
    unit = pyramid.unit_of(config.teacher.mean, config.teacher.std)
    if unit is not None:
        strengths = strengths._replace(eps=strengths.eps * unit.scale)
    return FixedInputs(teacher, ranges, images, labels, jnp.uint32(config.seed), strengths)


def step_key(seed: Array, step: Array) -> Array:
    """The key of everything random in this step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), step)


def chosen_rows(key: Array, images: int, batch: int) -> Array:
    """The global batch of the step with this key: rows [batch] of a synthetic set of `images` images."""
    return jax.random.choice(key, images, (batch,), replace=False)


def draw(fixed: FixedInputs, step: Array, settings: ConfigDict) -> tuple[Array, Array]:
    """This device's share of the images and labels of this step, augmented. settings: `config.finetune`.

    The global batch depends only on the seed and the step. It does not depend on the number of devices or on streaming.
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
        images = augmentation.random_resized_crop(keys, images, (settings.crop_scale, 1.0), flip=settings.flip)
    return jnp.asarray(images), jnp.asarray(labels)


def inputs(fixed: FixedInputs, calls: range, count: int, settings: ConfigDict) -> Iterator[tuple[FixedInputs]]:
    """The arguments of each call besides the state, on `count` devices of this process.

    fixed: has all images, as NumPy arrays that may be memory-mapped. calls: the first step of each call. All images are copied
    to each device once. With `settings.stream`, a thread reads only the images of each call instead, ahead of the device.
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
