"""A network and arrays that are given in Python, checked before any work."""

import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import config as config_lib
from hast_jax import from_config
from hast_jax.cross_checks import MAX_BATCH_VALUES
from hast_jax.data.datasets import as_array, check_pair, warn_of_pixels, whole_labels
from hast_jax.errors import InputError
from hast_jax.fields import FIELDS, GIVEN
from hast_jax.method.pyramid import PIXEL_MEAN, PIXEL_STD
from hast_jax.networks import Network, from_nnx, inference, rules, structure, weights
from hast_jax.networks.linear import name_of
from hast_jax.runs import parallel, processes
from hast_jax.runs.memory import MemoryRun
from hast_jax.runs.progress import Progress, Recorder
from hast_jax.stages.job import Job

Variables = Mapping[str, Any]


# (mean, standard deviation) of each channel. PIXELS: the network takes pixels of 0 ... 1. NORMALISED: normalised images.
PIXELS, NORMALISED = (0.0, 1.0), (PIXEL_MEAN, PIXEL_STD)


class Setting:
    """A checked network that is given in Python, and the config of its quantization."""

    def __init__(
        self,
        model: nn.Module | nnx.Module,
        variables: Variables | None,
        image: tuple[int, ...],
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        bits: Any,
        seed: int,
        call: Mapping[str, Any] | None,
        sizes: Mapping[str, Any],
        fields: Mapping[str, Any] | None,
        defaults: tuple[float, float] = PIXELS,
    ):
        """sizes: config fields that the calling function sets. fields: config fields that the user sets, which win.

        defaults: the mean and the standard deviation of each channel if `mean` and `std` are None.
        """
        chosen = _dotted(fields)
        self.image = _numbers("image", image, 3)
        first, width, channels = self.image
        if first in (1, 3) and first < width == channels:
            raise InputError(f"image is {self.image}: give (height, width, channels), such as {(width, channels, first)}.")
        if (mean is None) != (std is None):
            raise InputError("mean and std belong together: give both, or neither.")
        self.mean = _numbers("mean", mean, channels) if mean is not None else defaults[:1] * channels
        self.std = _numbers("std", std, channels) if std is not None else defaults[1:] * channels
        self.rules = rules.normalise(bits)
        structure.forget()
        self.model, variables = from_nnx.linen(model, variables)
        self.call = inference.arguments(self.model, call or {})
        found = structure.inspect(self.model, self.image, self.call)
        self.classes = found.classes
        checked = weights.from_variables(self.model, variables, self.image, call=self.call)
        rest = variables if isinstance(variables, Mapping) else {}
        others = {name: rest[name] for name in found.collections if name in rest and name not in checked}
        self.variables = {**others, **checked}
        weights.check_collections(self.model, self.variables, self.image, self.call)
        self.config = config_lib.default()
        weight_bits, activation_bits = (rules.FULL_PRECISION if b is None else b for b in self.rules[0][1])
        self.config.update_from_flattened_dict(
            {
                "seed": seed,
                "bits.weights": weight_bits,
                "bits.activations": activation_bits,
                "bits.rules": rules.text_of(self.rules[1:]),
                "teacher.network": f"{name_of(self.model)} {GIVEN}",
                "teacher.weights": GIVEN,
                "teacher.classes": self.classes,
                "teacher.image": self.image,
                "teacher.mean": self.mean,
                "teacher.std": self.std,
                "teacher.call": _as_json(call) if call else "",
                "eval.dataset": "none",
                "eval.batch": evaluation_batch(self.image),
                **sizes,
                **chosen,
            }
        )
        config_lib.validate(self.config)

    def job(self, progress: Progress, batch: int | None = None) -> Job:
        """The `Job` of a single stage, kept in memory. batch: images in a step, divided among all devices.

        Raises InputError with several processes.
        """
        if processes.count() > 1:
            raise InputError("a single stage works in one process: for several processes, use quantize with a workdir.")
        parallel.make_room_for_programs()
        devices = parallel.choose(self.config.devices, batch)
        teacher, student = from_config.bare_teacher(self.config, self.model), from_config.student(self.config, self.model)
        return Job(self.config, devices, MemoryRun(), Recorder(None, progress), teacher, student, self.variables)


GIVEN_OTHERWISE = (
    "teacher.",
    "eval.dataset",
    "eval.split",
    "eval.data_dir",
    "synthesis.source",
    "synthesis.real_split",
    "bits.",
)


def evaluation_batch(image: tuple[int, ...]) -> int:
    """The default of `eval.batch`, or fewer images if so many would take more than 2 GiB."""
    return max(1, min(FIELDS["eval.batch"].default, MAX_BATCH_VALUES // math.prod(image)))


def _dotted(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's fields by their paths. {"finetune": {"epochs": 1}} becomes {"finetune.epochs": 1}."""
    if not isinstance(fields or {}, Mapping):
        raise InputError(f'fields is a {type(fields).__name__}: give a dict such as {{"finetune.lam": 0.0}}.')
    found = {".".join(map(str, path)): value for path, value in flatten_dict(dict(fields or {})).items()}
    for path in found:
        if path.startswith(GIVEN_OTHERWISE) and path != "teacher.arithmetic":
            raise InputError(f"{path} cannot be set for a network that is given in Python: use the arguments of the function.")
    return found


def _numbers(name: str, values: Any, count: int) -> tuple[Any, ...]:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # lists of unequal lengths
        array = np.zeros(0)
    if array.ndim == 0 and name != "image":
        array = np.repeat(array, count)
    found = tuple(array.tolist()) if array.ndim == 1 else ()
    if len(found) != count or not all(isinstance(value, int | float) for value in found):
        one = "one number, because the image has one channel"
        each = one if count == 1 else f"one number, or {count} numbers, because the image has {count} channels"
        wanted = "(height, width, channels)" if name == "image" else each
        raise InputError(f"{name} is {values!r}: it must be {wanted}.")
    if wanted := FIELDS[f"teacher.{name}"].fault(found):
        raise InputError(f"{name} is {values!r}: it must be {wanted}.")
    return found


def _as_json(call: Mapping[str, Any]) -> str:
    try:
        kept = json.loads(json.dumps(call)) == dict(call)  # JSON has no tuples: the network would get a list
    except TypeError:
        kept = False
    if not kept:
        raise InputError(f"call is {call}: its values must be numbers, texts, True, False, None, or lists and dicts of these.")
    return json.dumps(call)


def normalised_images(images: Any) -> np.ndarray:
    """`images` as float32 [n, height, width, channels]. Raises InputError unless they are finite floating point images."""
    array = as_array("images", images)
    if array.ndim != 4 or not np.issubdtype(array.dtype, np.floating) or not len(array):
        raise InputError(
            f"the images are {array.dtype} {array.shape}: give normalised float32 images [n, height, width, channels]."
        )
    bad = np.flatnonzero(~np.isfinite(array).all((1, 2, 3)))
    if len(bad):
        raise InputError(f"image {bad[0]} holds values that are not finite: leave it out, or make it again.")
    return array.astype(np.float32, copy=False)


def given_images(given: tuple[Any, Any], setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images float32 [n, *image] and labels int32 [n] to learn from. Raises InputError if they are anything else."""
    check_pair("images", given)
    images = normalised_images(given[0])
    if images.shape[1:] != setting.image:
        raise InputError(f"the images have the shape {images.shape[1:]}: the network takes {setting.image}.")
    warn_of_pixels(images, setting.mean, setting.std)
    return images, whole_labels(given[1], len(images), setting.classes)


def check_batch(field: str, batch: int, images: int) -> None:
    """Raise InputError if a batch needs more images than there are. field: the name of the batch's config field."""
    if batch > images:
        raise InputError(f"{field} is {batch}, more than the {images} images: lower it.")


def range_names(ranges: Any) -> set[str]:
    """The paths of the leaves of a tree of ranges; no paths if it is no tree."""
    return {"/".join(name) for name in flatten_dict(ranges)} if isinstance(ranges, Mapping) else set()


def given_ranges(ranges: Any, student: Network) -> Variables:
    """`ranges` as arrays float32. Raises InputError unless they are finite and have exactly the names that `student` needs."""
    wanted = "give what calibrate returned for this network, these bits and the same finetune.ranges"
    given, known = range_names(ranges), student.range_names
    if missing := sorted(known.keys() - given):
        raise InputError(f"the ranges lack {missing[0]}: {wanted}.")
    if others := sorted(given - known.keys()):
        raise InputError(f"the ranges hold {others[0]}, which this student does not have: {wanted}.")
    flat = {path: as_array("ranges", each) for path, each in flatten_dict(dict(ranges)).items()}
    for path, each in flat.items():
        if not np.issubdtype(each.dtype, np.number) or not np.isfinite(each).all():
            raise InputError(f"the range {'/'.join(path)} is not finite: {wanted}.")
    return unflatten_dict({path: jnp.asarray(each, jnp.float32) for path, each in flat.items()})
