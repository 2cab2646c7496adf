"""Real images: for evaluation, for pretraining the built-in teacher, and for the upper bound that real data give.

The method itself never sees one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax.errors import UserError

Array = jax.Array

TFDS_DATASETS = ("cifar10", "cifar100")
DATASETS = ("none", "digits", *TFDS_DATASETS)
DIGITS_TEST_FRACTION = 0.4


class Dataset(NamedTuple):
    """images: uint8 [n, height, width, channels]; labels: int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


def load(name: str, split: str, data_dir: str = "") -> Dataset | None:
    """A split of a data set in memory; None for the data set "none".

    Raises UserError that says how to get the data where they are missing.
    """
    if name == "none":
        return None
    return _digits(split) if name == "digits" else _tfds(name, split, data_dir)


def check(dataset: Dataset, name: str, image: tuple[int, ...], classes: int) -> None:
    """Raise UserError where a network for images of shape `image` and `classes` classes cannot be judged by `dataset`."""
    shape, found = dataset.images.shape[1:], int(dataset.labels.max()) + 1
    if shape != tuple(image) or found > classes:
        raise UserError(
            f"{name} has images {shape} of {found} classes, the network takes {tuple(image)} and knows {classes}: "
            "set config.eval.dataset to the data set that it was trained on, or to none."
        )


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 images to the teacher's space: float32 (x / 255 - mean) / std for each channel."""
    scaled = images.astype(jnp.float32) / 255
    channel = lambda values: jnp.asarray(values, jnp.float32)[None, None, None]
    return (scaled - channel(mean)) / channel(std)


def sample(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` random real images of `config.synthesis.real_split` (all where it has fewer), normalised, and their labels.

    Raises UserError where there are none, or they do not fit the teacher.
    """
    dataset = load(config.eval.dataset, config.synthesis.real_split, config.eval.data_dir)
    if dataset is None:
        raise UserError("config.synthesis.real_split needs a data set: set config.eval.dataset.")
    check(dataset, config.eval.dataset, config.teacher.image, config.teacher.classes)
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    rows = np.asarray(jax.random.permutation(key, len(dataset.labels)))[:count]
    images = normalise(jnp.asarray(dataset.images[rows]), config.teacher.mean, config.teacher.std)
    return np.asarray(images), dataset.labels[rows]


def _digits(split: str) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, 40 % of each class held out as "test"."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=DIGITS_TEST_FRACTION, stratify=bunch.target, random_state=0
    )
    rows = {"train": train, "test": test}.get(split)
    if rows is None:
        raise UserError(f"the digits have no split {split!r}: use train or test.")
    return Dataset(images[rows], bunch.target[rows].astype(np.int32))


def _tfds(name: str, split: str, data_dir: str) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        source: Any = tfds.data_source(name, split=split, data_dir=data_dir or None, download=False)
    except Exception as error:  # TFDS raises many kinds where data are missing or were prepared otherwise
        place = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"the {split} split of {name} is not in {data_dir or 'the default folder of TFDS'}: prepare it once with "
            f"pip install -e '.[prepare]' && tfds build {name} --file_format=array_record{place}, "
            f"or set --config.eval.dataset=none to run without evaluation."
        ) from error
    records = [source[i] for i in range(len(source))]
    images = np.stack([record["image"] for record in records])
    return Dataset(images, np.asarray([record["label"] for record in records], np.int32))
