"""Compare an exported file with its student: the classes and logits that both give to the same images, and their times."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax import networks
from hast_jax.data.datasets import as_array, normalise, warn_of_pixels
from hast_jax.errors import InputError, UserError
from hast_jax.student import Student

MOST_DIFFERENT = 1 / 1000  # share of a set's images for which a good file may give another class than the student
MOST_MOVED = 0.1  # of the standard deviation of the student's logits: so much a good file's may differ for `MOST_IMAGES`
MOST_IMAGES = 0.9  # of a set. For the others, rounding may move an activation to another integer
ROUNDED_MORE = 3  # times the effect of double precision on the student: so much a file may change too (docs/export.md)
BATCH = 256
MOST_ONE_BY_ONE = 1000


class Judged(NamedTuple):
    """A set to compare on: its name, uint8 images [n, height, width, channels], and labels [n] or None."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None


class Comparison(NamedTuple):
    """How file and student differ on the images of one set.

    different: number of images for which file and student give different classes.
    moved: difference of the logit that differs most, for nearly all images: for each class the quantile `MOST_IMAGES` over
      images, and the largest of these.
    spread: standard deviation of the student's logits.
    rounded, rounded_moved: as `different` and `moved`, between the student and the student in double precision. They are None
      if the file keeps to `MOST_DIFFERENT` and `MOST_MOVED` without them.
    largest_difference: of a logit.
    top1, student_top1: in per cent; None without labels.
    """

    name: str
    images: int
    different: int
    moved: float
    spread: float
    rounded: int | None
    rounded_moved: float | None
    largest_difference: float
    top1: float | None
    student_top1: float | None


def judged(student: Student, images: Any) -> Judged:
    """The images of a caller as a set; random images if `images` is None. images: uint8, or normalised floats.

    Raises InputError if there are no images, if their shape does not fit the student, or if their values are anything else.
    """
    if images is None:
        key = jax.random.key(0)
        return Judged("random images", np.asarray(jax.random.bits(key, (BATCH, *student.image), np.uint8)))
    images = as_array("images", images)
    if images.shape[1:] != tuple(student.image) or not len(images):
        wanted = ", ".join(map(str, student.image))
        raise InputError(f"the images have the shape {images.shape}: the student takes [n, {wanted}].")
    if images.dtype == np.uint8:
        return Judged("images", images)
    floating = jnp.issubdtype(images.dtype, jnp.floating)  # bfloat16 too
    if not floating or not np.isfinite(images).all():
        found = "not all finite" if floating else str(images.dtype)
        raise InputError(f"the images are {found}: give uint8 images, or finite floating point ones that are normalised.")
    warn_of_pixels(images, student.mean, student.std)
    return Judged("images", to_pixels(images, student.mean, student.std))


def refuse_difference(comparisons: Sequence[Comparison], layers: Mapping[str, float]) -> None:
    """Raise UserError if the file gives another class than the student for too many images, or other logits for a tenth.

    A good file differs from the student on a few images: it adds up its sums in another order, and rounding decides the class.
    The share `MOST_DIFFERENT` of the images may differ, and `ROUNDED_MORE` * (`rounded` + 1) more, but at most half of all.
    For `MOST_IMAGES`, logits may differ by `MOST_MOVED` * `spread`, or by `ROUNDED_MORE` * `rounded_moved` if that is more.
    layers: as in `Exported`. The error message names the first layer that differs, if `layers` has any.
    """
    first = next((f"; the first layer that differs is {name}" for name, share in layers.items() if share > 0), "")
    for each in comparisons:
        if each.rounded is None or each.rounded_moved is None:
            continue
        if each.different > min(_tolerated(each.images) + ROUNDED_MORE * (each.rounded + 1), each.images / 2):
            raise UserError(
                f"the file gives another class than the student for {each.different} of {each.images} {each.name} "
                f"(rounding alone changes the class of {each.rounded}){first}: the file is not written."
            )
        if each.moved > max(MOST_MOVED * each.spread, ROUNDED_MORE * each.rounded_moved):
            raise UserError(
                f"the file gives other logits than the student: for a tenth of {each.images} {each.name} a logit differs by "
                f"{each.moved:.2g} or more (rounding alone: {each.rounded_moved:.2g}){first}: the file is not written."
            )


def _tolerated(images: int) -> float:
    return max(1, MOST_DIFFERENT * images)


def compare(student: Student, run: Callable[[np.ndarray], np.ndarray], sets: Sequence[Judged]) -> tuple[Comparison, ...]:
    """Compare the file with the student on each set. run: gives the file's logits for uint8 images."""
    found = []
    for name, images, labels in sets:
        logits = np.concatenate([run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
        wanted = np.concatenate([np.asarray(student(images[i : i + BATCH])) for i in range(0, len(images), BATCH)])
        file_classes, student_classes = logits.argmax(-1), wanted.argmax(-1)
        different, moved = int(np.sum(file_classes != student_classes)), _moved(logits, wanted)
        spread, rounded, rounded_moved = float(wanted.std(dtype=np.float64)), None, None
        if different > _tolerated(len(images)) or moved > MOST_MOVED * spread:
            precise = _in_double_precision(student, images)
            rounded, rounded_moved = int(np.sum(precise.argmax(-1) != student_classes)), _moved(precise, wanted)
        largest = float(np.abs(logits - wanted).max())
        accuracies = (_accuracy(file_classes, labels), _accuracy(student_classes, labels))
        found.append(Comparison(name, len(images), different, moved, spread, rounded, rounded_moved, largest, *accuracies))
    return tuple(found)


def _moved(logits: np.ndarray, wanted: np.ndarray) -> float:
    """The difference of logits [n, classes], as `Comparison.moved` has it."""
    return float(np.quantile(np.abs(logits - wanted), MOST_IMAGES, axis=0, method="lower").max())


def _in_double_precision(student: Student, images: np.ndarray) -> np.ndarray:
    """The student's logits for uint8 images, in float64, from the same quantized weights and the same ranges."""
    network = dataclasses.replace(student.network, kernels={}, fast_convolution=False)
    variables = jax.device_get({**student.variables, "params": student.params})
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, variables
        )
        logits = jax.jit(partial(networks.logits, network))
        batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
        return np.concatenate(
            [np.asarray(logits(wide, normalise(jnp.asarray(each), student.mean, student.std))) for each in batches]
        )


def _accuracy(classes: np.ndarray, labels: np.ndarray | None) -> float | None:
    return None if labels is None else 100 * float(np.mean(classes == labels))


def fewer(sets: Sequence[Judged]) -> list[Judged]:
    """The same sets with at most 1,000 evenly spaced images each, for a file that takes one image at a time."""
    found = []
    for name, images, labels in sets:
        rows = np.linspace(0, len(images) - 1, min(len(images), MOST_ONE_BY_ONE)).astype(int)
        found.append(Judged(name, images[rows], None if labels is None else labels[rows]))
    return found


def milliseconds(runs: Sequence[Callable[[np.ndarray], Any]], images: np.ndarray, rounds: int = 20) -> list[float]:
    """The shortest time of each of `runs` for `images`, in milliseconds. In each round the runs take turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run(images)
            best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


def to_pixels(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images [n, height, width, channels], rounded to uint8."""
    pixels = (np.asarray(images, np.float32) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
