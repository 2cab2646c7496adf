"""The library: quantize a network in Python, in one call or stage by stage, on plain arrays and pytrees.

No function ends the process, changes environment variables or holds a lock after it returns. Nothing is printed, except the
progress of a call, which progress=False hides. Without `workdir` nothing is written. All functions but `evaluate` and
`read_weights` take `fields`: values of config fields that replace the defaults, such as {"finetune.lam": 0.0}.
"""

import contextlib
import numbers
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import from_config, networks, paths, pipeline
from hast_jax.data.datasets import as_array, real_images, whole_labels
from hast_jax.deliver.console import library_bar
from hast_jax.errors import InputError
from hast_jax.fields import GIVEN
from hast_jax.given import (
    NORMALISED,
    Setting,
    check_batch,
    evaluation_batch,
    given_images,
    given_ranges,
    normalised_images,
    range_names,
)
from hast_jax.networks import weights
from hast_jax.runs import parallel
from hast_jax.runs.progress import Progress
from hast_jax.stages import calibrate as calibrate_stage
from hast_jax.stages import evaluate as evaluate_stage
from hast_jax.stages import finetune as finetune_stage
from hast_jax.stages import synthesize as synthesize_stage
from hast_jax.stages.evaluate import Accuracy
from hast_jax.student import Student

Variables = Mapping[str, Any]
Shape = tuple[int, int, int]

MOST_TOGETHER = 256  # images of one batch, as in the paper
BUDGETS: dict[str, dict[str, Any]] = {
    "trial": {  # a few minutes on two cores for small images: to see that everything works
        "synthesis.images": 256,
        "synthesis.batch": 128,
        "synthesis.iterations": 100,
        "calibration.batches": 20,
        "finetune.batch": 64,
        "finetune.epochs": 2,
        "finetune.steps_per_epoch": 100,
    },
    "small": config_lib.VARIANTS["small"],
    "full": {},
}
RECIPES: dict[str, dict[str, Any]] = {"best": config_lib.BEST, "paper": {}}


def quantize(
    model: nn.Module | nnx.Module,
    variables: Variables | None = None,
    *,
    image: Shape,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    bits: Any = "w4a4",
    budget: str = "small",
    recipe: str = "best",
    workdir: str | Path | None = None,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    images: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None,
    progress: Progress | bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Student:
    """Quantize a trained network without its data.

    Args:
      model: a `flax.linen.Module` or a `flax.nnx.Module`, unchanged: convolutions, linear layers, batch norms and any functions
        between them.
      variables: its trained `params` and `batch_stats`: a tree, a TrainState, or a flat dict with the names of a weight file.
        None: those that a `flax.nnx.Module` holds.
      image: (height, width, channels) of the images that the model takes.
      mean, std: one number for each channel, or one for all. The model takes (x - mean) / std for images x in [0, 1]. If
        both are None, the model takes x itself.
      bits: "w4a4"; a pair (weights, activations); one number for both; or a dict from patterns of layer paths to such values,
        with a "default".
      budget: "trial", "small" (for two cores) or "full" (as many images as the paper's, for an accelerator).
      recipe: "best", the settings that lose the least accuracy; or "paper", the paper's settings.
      workdir: the folder of the run. The same call with the same folder resumes an interrupted run. None: nothing is written.
      seed: the seed of everything random.
      call: keyword arguments of the model's call. The default selects inference, for example with train=False.
      images: a pair to learn from instead of making images: normalised images float32 [n, *image] and labels [n].
      test: a pair to report accuracies on: real images uint8 [n, *image] and labels [n]. They do not influence the student.
      progress: True shows a progress bar on a terminal or in a notebook, and elsewhere a line for each stage, on the standard
        error output. False shows nothing. A function is called with each `Update` instead.
      fields: values of config fields, by path, that replace those of the recipe and the budget.

    Returns the student. Raises UserError, with one sentence, for an impossible argument, before any long work.
    """
    for name, chosen, known in (("budget", budget, BUDGETS), ("recipe", recipe, RECIPES)):
        if not isinstance(chosen, str) or chosen not in known:
            raise InputError(f"{name} is {chosen!r}: choose one of {', '.join(known)}.")
    changes = {**RECIPES[recipe], **BUDGETS[budget], **config_lib.VARIANTS.get(f"{recipe},{budget}", {})}
    changes |= {"synthesis.source": GIVEN} if images is not None else {}
    setting = Setting(model, variables, image, mean, std, bits, seed, call, changes, fields)
    given = given_images(images, setting) if images is not None else None
    dataset = real_images(test, setting.image, setting.classes) if test is not None else None
    words = f"hast_jax.quantize(..., budget={budget!r}, recipe={recipe!r})"
    own = pipeline.GivenNetwork(setting.model, setting.variables, dataset, given, words)
    if workdir == "":
        raise InputError("workdir is empty: name a folder, or give None.")
    path = None if workdir is None else paths.local(workdir)
    with _shown(progress) as shown:
        return pipeline.quantize(setting.config, path, shown, own)


def synthesize(
    model: nn.Module | nnx.Module,
    variables: Variables | None = None,
    *,
    image: Shape,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    count: int = 1024,
    iterations: int = 200,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
    fields: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Stage 1: `count` images float32 [count, *image] in the network's normalised space, and their labels int32 [count].

    The images are optimised to match the statistics of the network's batch norms, and to be classified as their labels.
    mean, std: as in `quantize`, but None means that the network takes normalised images. Both set the spread of the noise from
    which the images start. For the other arguments and the errors see `quantize`.
    """
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise InputError(f"count is {count!r}: it must be a whole number above zero.")
    batches = -(-count // MOST_TOGETHER)
    batch = -(-count // batches)
    sizes = {"synthesis.images": batch * batches, "synthesis.iterations": iterations, "synthesis.batch": batch}
    sizes |= {**_best("synthesis"), "finetune.batch": 1, "calibration.batch": 1}
    setting = Setting(model, variables, image, mean, std, "full", seed, call, sizes, fields, NORMALISED)
    if setting.config.synthesis.images < count:
        raise InputError(f"fields set synthesis.images to less than count, {count}: leave synthesis.images out.")
    with _shown(progress) as shown:
        made, labels = synthesize_stage.run(setting.job(shown))
    return made[:count], labels[:count]


def calibrate(
    model: nn.Module | nnx.Module,
    variables: Variables | None,
    images: Any,
    *,
    bits: Any = "w4a4",
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Variables:
    """Stage 2: the `ranges` of the quantized activations, from normalised images float32 [n, height, width, channels].

    The result includes ranges of the kernels, because `finetune` learns these too. With fields={"finetune.ranges": "fixed"} it
    does not. For the other arguments and the errors see `quantize`.
    """
    images = normalised_images(images)
    sizes = {**_best("calibration"), "calibration.batch": min(64, len(images)), "synthesis.source": GIVEN}
    sizes |= {"finetune.ranges": config_lib.BEST["finetune.ranges"]}
    setting = Setting(model, variables, images.shape[1:], None, None, bits, seed, call, sizes, fields, NORMALISED)
    check_batch("calibration.batch", setting.config.calibration.batch, len(images))
    with _shown(progress) as shown:
        return calibrate_stage.run(setting.job(shown), images)


def finetune(
    model: nn.Module | nnx.Module,
    variables: Variables | None,
    ranges: Variables,
    images: Any,
    labels: Any,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    bits: Any = "w4a4",
    epochs: int = 12,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Variables:
    """Stage 3: the student's variables after `epochs` epochs of 200 steps: `params`, `batch_stats` and the learned `ranges`.

    ranges: the result of `calibrate` for the same bits. images, labels: the result of `synthesize`, whose `mean` and `std` must
    be given here too. For the other arguments and the errors see `quantize`.
    """
    images = normalised_images(images)
    sizes = {**_best("finetune"), "finetune.epochs": epochs, "finetune.batch": min(64, len(images)), "synthesis.source": GIVEN}
    shape = images.shape[1:]
    setting = Setting(model, variables, shape, mean, std, bits, seed, call, sizes, fields, NORMALISED)
    labels = whole_labels(labels, len(images), setting.classes)
    check_batch("finetune.batch", setting.config.finetune.batch, len(images))
    with _shown(progress) as shown:
        job = setting.job(shown, setting.config.finetune.batch)
        ranges = given_ranges(ranges, job.student)
        state, _ = finetune_stage.run(job, images, labels, ranges, None)
    return finetune_stage.student_variables(job.student, setting.variables, ranges, state.trained)


def evaluate(
    model: nn.Module | nnx.Module | Student,
    variables: Variables | None = None,
    images: Any = None,
    labels: Any = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    bits: Any = None,
    call: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
) -> Accuracy:
    """Stage 4: top-1 and top-5 accuracy in per cent on images uint8 [n, height, width, channels] with labels [n].

    labels: whole numbers from 0 to the number of classes - 1. Raises UserError for an impossible argument.

    For a student: `evaluate(student, images=..., labels=...)`. For a network in full precision: `evaluate(model, variables,
    images, labels, mean=..., std=...)`. For a quantized network: the same with `bits`, and with the collection `ranges` among
    the variables. The other arguments are those of `quantize`.
    """
    if isinstance(model, Student):
        given = {"variables": variables, "mean": mean, "std": std, "bits": bits, "call": call}
        if named := [name for name, value in given.items() if value is not None]:
            raise InputError(f"a Student has its own {named[0]}: give evaluate(student, images=..., labels=...).")
    if images is None or labels is None:
        raise InputError("evaluate needs images and labels: give both.")
    images = as_array("images", images)
    if images.ndim != 4:
        raise InputError(f"the images have the shape {images.shape}: give uint8 images [n, height, width, channels].")
    if isinstance(model, Student):
        network, variables, shape = model.network, model.variables, model.image
        config = config_lib.default()
        config.teacher.mean, config.teacher.std, config.eval.batch = model.mean, model.std, evaluation_batch(shape)
    else:
        shape = images.shape[1:]
        network, variables, config = _with_ranges(model, variables, shape, mean, std, bits, call)
    dataset = real_images((images, labels), shape, network.classes)
    with _shown(progress) as shown:
        logits = partial(networks.logits, network)
        return evaluate_stage.evaluator(logits, dataset, config, parallel.choose(0), shown)(variables)


def read_weights(path: str | Path) -> Mapping[str, np.ndarray]:
    """The arrays of a weight file or of a folder of Orbax by their names, which may be given as `variables`.

    Kinds of files: .safetensors, .npz, .msgpack, .h5, .keras, .pth, .pt, .ckpt, .bin. Raises UserError if there is no such
    file, if the file is damaged, or if a package that reads it is missing.
    """
    return weights.read(weights.locate(path))[0]


def _with_ranges(
    model: Any, variables: Any, image: Any, mean: Any, std: Any, bits: Any, call: Any
) -> tuple[networks.Network, Variables, ConfigDict]:
    """The network that `evaluate` evaluates, its variables with the collection `ranges`, and its config."""
    ranges: Any = {}
    if isinstance(variables, Mapping) and "ranges" in variables:
        ranges = variables["ranges"]
        variables = {name: each for name, each in variables.items() if name != "ranges"} or None
    if bits is None and ranges:
        raise InputError("the variables hold the ranges of a quantized network: give its bits, or leave out the ranges.")
    setting = Setting(model, variables, image, mean, std, "full" if bits is None else bits, 0, call, {}, None)
    if bits is None:
        network = from_config.bare_teacher(setting.config, setting.model)
    else:
        network = _student_with(setting.config, setting.model, ranges)
    return network, {**setting.variables, "ranges": given_ranges(ranges, network)}, setting.config


def _student_with(config: Any, model: nn.Module, ranges: Any) -> networks.Network:
    """The student to which `ranges` belong. Its ranges are learned if `ranges` includes those of kernels, otherwise fixed."""
    config.finetune.ranges = "learned"
    student = from_config.student(config, model)
    if range_names(ranges) == student.range_names.keys():
        return student
    config.finetune.ranges = "fixed"
    return from_config.student(config, model)


def _best(stage: str) -> dict[str, Any]:
    """The fields of the recipe `best` for one stage."""
    return {name: value for name, value in config_lib.BEST.items() if name.startswith(f"{stage}.")}


def _shown(progress: Progress | bool) -> contextlib.AbstractContextManager[Progress]:
    if isinstance(progress, bool):
        return library_bar(progress)
    if not callable(progress):
        raise InputError(f"progress is {progress!r}: give True, False or a function of one `Update`.")
    return contextlib.nullcontext(progress)
