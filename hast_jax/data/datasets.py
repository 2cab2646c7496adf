"""Real images: for evaluation, for pretraining a teacher, and for fine-tuning on real data, for comparison.

The method itself uses no real images.
"""

import math
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax import paths
from hast_jax.data import image_files
from hast_jax.data.image_files import ImageFiles
from hast_jax.errors import InputError, Notice, UserError, pip_install

Array = jax.Array

# `folder`: image files in `config.eval.data_dir`/SPLIT/CLASS/.
DATASETS = ("none", "digits", "cifar10", "cifar100", "imagenet2012", "folder")
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes
DIGITS_TEST_FRACTION = 0.4
RECORDS_AT_ONCE = 500


class Arrays(NamedTuple):
    """A data set in memory. images: uint8 [n, height, width, channels]; labels: int32 [n]; classes: their number."""

    images: np.ndarray
    labels: np.ndarray
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image: (height, width, channels)."""
        return self.images.shape[1:]

    def batches(self, size: int, first: int = 0, every: int = 1) -> Iterator[np.ndarray]:
        """Batches `first`, `first + every`, ... of all images in order, `size` in each. The last batch may be smaller."""
        return (self.images[i : i + size] for i in range(first * size, len(self.images), every * size))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images with these indices."""
        return self.images[rows]


Dataset = Arrays | ImageFiles


def load(config: ConfigDict, split: str) -> Dataset | None:
    """A split of `config.eval.dataset`, with images of the teacher's size; None for the data set "none".

    Raises UserError if the data are missing (the message says how to get them) or do not fit the teacher.
    """
    name, data_dir = config.eval.dataset, config.eval.data_dir
    if name == "none":
        return None
    dataset: Dataset
    image = tuple(config.teacher.image)
    if name in CIFAR:  # asked before the data, which may be missing
        _check_fit(name, (32, 32, 3), CIFAR[name], config)
    if name == "digits":
        dataset = _digits(split)
    elif name == "folder":
        dataset = image_files.folder(paths.local(data_dir) / split, image, config.eval.crop, config.eval.class_order)
    elif name == "imagenet2012":
        dataset = _imagenet(split, data_dir, image, config.eval.crop)
    else:
        dataset = _cifar(name, split, data_dir)
    classes = config.teacher.classes
    if name == "folder" and dataset.classes != classes:
        raise UserError(
            f"{paths.local(data_dir) / split} holds {dataset.classes} folders, but the network has {classes} classes: "
            "there must be one folder for each class and no others."
        )
    _check_fit(name, dataset.shape, dataset.classes, config)
    return dataset


def _check_fit(name: str, shape: tuple[int, ...], classes: int, config: ConfigDict) -> None:
    teacher = config.teacher
    if shape != tuple(teacher.image) or classes != teacher.classes:
        raise UserError(
            f"{name} has images {shape} of {classes} classes, but the network takes images {tuple(teacher.image)} "
            f"and has {teacher.classes} classes: set eval.dataset to the data set that it was trained on, or to none."
        )


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 images [batch, height, width, channels] -> the teacher's inputs: float32 (x / 255 - mean) / std in each channel."""
    scaled = images.astype(jnp.float32) / 255

    def channel(values):
        return jnp.asarray(values, jnp.float32)[None, None, None]

    return (scaled - channel(mean)) / channel(std)


def warn_of_pixels(images: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Warn if floating point images, which should be normalised by `mean` and `std`, hold pixels of 0 ... 1 or 0 ... 255."""
    if not images.size:
        return
    lowest, highest = float(images.min()), float(images.max())
    black, white = float(np.min(-np.asarray(mean) / std)), float(np.max((1 - np.asarray(mean)) / std))
    of_one = 0.5 < highest <= 1 and (black < -0.1 or white > 2)
    if lowest >= 0 and (of_one or highest > white + (white - black)):
        warnings.warn(
            f"the images hold values from {lowest:.3g} to {highest:.3g}, but normalised images would hold {black:.3g} to "
            f"{white:.3g}: give uint8 images where they are taken, or normalise them by mean and std.",
            Notice,
            stacklevel=3,
        )


def sample(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` random images of the split `config.synthesis.real_split`, normalised, and their labels.

    If the split has fewer images, all are returned. Raises UserError if there is no data set, or if the images do not fit the
    teacher or the memory.
    """
    dataset = load(config, config.synthesis.real_split)
    if dataset is None:
        raise UserError("config.synthesis.real_split needs a data set: set config.eval.dataset.")
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    rows = np.asarray(jax.random.permutation(key, len(dataset.labels)))[:count]
    needed, memory = 8 * len(rows) * math.prod(dataset.shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{len(rows)} real images need {needed >> 30} GiB of memory, but only {memory >> 30} GiB exist: "
            "lower config.synthesis.images."
        )
    images = normalise(jnp.asarray(dataset.read(rows)), config.teacher.mean, config.teacher.std)
    return np.asarray(images), dataset.labels[rows]


def real_images(test: tuple[Any, Any], image: tuple[int, ...], classes: int) -> Arrays:
    """Real images uint8 [n, *image] and labels int32 [n] for evaluation. Raises InputError if they are anything else."""
    check_pair("test", test)
    images = as_array("images", test[0])
    if images.dtype != np.uint8 or images.shape[1:] != tuple(image) or not len(images):
        wanted = ", ".join(map(str, image))
        raise InputError(f"the real images are {images.dtype} {images.shape}: give uint8 images [n, {wanted}] of 0 ... 255.")
    return Arrays(images, whole_labels(test[1], len(images), classes), classes)


def as_array(name: str, values: Any) -> np.ndarray:
    """`values` as an array. Raises InputError for lists of unequal lengths and the like. name: what the values are."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {name} cannot become one array, like lists of unequal lengths: give a NumPy array.") from error


def check_pair(name: str, given: Any) -> None:
    """Raise InputError unless the argument called `name` is a pair of images and labels."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise InputError(f"{name} is a {type(given).__name__}: give a pair (images, labels).")


def whole_labels(values: Any, images: int, classes: int) -> np.ndarray:
    """Labels int32 [images]. Raises InputError unless `values` are one whole number from 0 to `classes` - 1 for each image."""
    labels = as_array("labels", values)
    whole = labels.shape == (images,) and np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0 or labels.max() >= classes:
        found = f"go from {labels.min()} to {labels.max()}" if whole else f"are {labels.dtype} of shape {labels.shape}"
        words = f"they must be one whole number from 0 to {classes - 1} for each of the {images} images"
        raise InputError(f"the labels {found}: {words}.")
    return labels.astype(np.int32)


def _digits(split: str) -> Arrays:
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
    return Arrays(images[rows], bunch.target[rows].astype(np.int32), 10)


def _cifar(name: str, split: str, data_dir: str) -> Arrays:
    source = _tfds(name, split, data_dir)
    records = [source[i] for i in range(len(source))]
    images = np.stack([record["image"] for record in records])
    return Arrays(images, np.asarray([record["label"] for record in records], np.int32), CIFAR[name])


def _imagenet(split: str, data_dir: str, image: tuple[int, ...], crop: float) -> ImageFiles:
    source = _tfds("imagenet2012", split, data_dir, decode=False)
    # Reading the labels also reads the images, which are gigabytes. Records that are asked for together are read in parallel.
    chunks = (range(i, min(i + RECORDS_AT_ONCE, len(source))) for i in range(0, len(source), RECORDS_AT_ONCE))
    labels = np.asarray([record["label"] for chunk in chunks for record in source.__getitems__(chunk)], np.int32)
    return ImageFiles(partial(_encoded, source), labels, 1000, image, crop)


def _encoded(source: Any, row: int) -> bytes:
    return source[row]["image"]


def _tfds(name: str, split: str, data_dir: str, decode: bool = True) -> Any:
    """A split of a TFDS data set. decode: whether images are arrays; otherwise they are the bytes of their files."""
    folder = os.path.expanduser(data_dir) or "the default folder of TFDS"
    try:
        import tensorflow_datasets as tfds

        decoders = None if decode else {"image": tfds.decode.SkipDecoding()}
        place = os.path.expanduser(data_dir) or None
        source = tfds.data_source(name, split=split, data_dir=place, download=False, decoders=decoders)
        if len(source) == 0:
            raise ValueError("this split is empty")
        return source
    except ImportError as error:
        raise UserError(f"TFDS cannot be used because a package is missing ({error}): install that package.") from error
    except (AssertionError, FileNotFoundError, KeyError, NotImplementedError) as error:  # the data are not there
        place = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"the {split} split of {name} is not in {folder}, or is not stored as array_record: prepare it once with "
            f"{pip_install('prepare')} && tfds build {name} --file_format=array_record{place}; a run also works without "
            "evaluation, with eval.dataset none."
        ) from error
    except Exception as error:  # TFDS raises many kinds of errors: others are shown as they are
        words = str(error).strip().split("\n")[0]
        raise UserError(f"TFDS cannot read the {split} split of {name} in {folder}: {type(error).__name__}: {words}") from error
