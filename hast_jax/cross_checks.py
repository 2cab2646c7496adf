"""Checks of several config fields together.

Each check takes a config whose fields are valid one by one. For each fault it yields (field, what the field must be).
"""

import math
import os
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from hast_jax.kinds import MOST

Faults = Iterator[tuple[str, str]]

MAX_BATCH_VALUES = 2**29  # in a batch of images: 2 GiB in float32


def _something_is_learned(config: ConfigDict) -> Faults:
    if config.finetune.a == config.finetune.b == 0:
        yield "finetune.a", "positive if finetune.b is 0; otherwise nothing is learned"


def base_splits(split: str) -> set[str]:
    """The splits that a text such as "train[:50%]+test" takes images from."""
    return {part.split("[")[0].strip() for part in split.split("+")}


def _origins(split: str, config: ConfigDict) -> set[str]:
    """The splits that a text takes images from; of image files the folder, whose path may be written in several ways."""
    if split and config.eval.dataset == "folder":
        return {os.path.realpath(os.path.join(os.path.expanduser(config.eval.data_dir), split))}
    return base_splits(split) - {""}


def _images_have_one_origin(config: ConfigDict) -> Faults:
    split = config.synthesis.real_split
    if config.synthesis.source and split:
        yield "synthesis.real_split", "empty if synthesis.source is set"
    learned, judged = _origins(split, config), _origins(config.eval.split, config)
    if learned and (learned & judged or "all" in learned | judged):
        yield "synthesis.real_split", "of another split than eval.split, whose images are for evaluation"


def _images_have_a_size(config: ConfigDict) -> Faults:
    teacher = config.teacher
    most = MAX_BATCH_VALUES // math.prod(teacher.image)
    if most < 1:
        yield "teacher.image", "smaller: a single image would take more than 2 GiB"
    if config.eval.batch > most:
        yield "eval.batch", f"at most {most}; a larger batch of images takes more than 2 GiB"
    for name in ("mean", "std"):
        if len(teacher[name]) != teacher.image[2]:
            yield f"teacher.{name}", f"one number for each of the {teacher.image[2]} channels"
    if config.pretrain.shift > min(teacher.image[:2]):
        yield "pretrain.shift", f"at most the shorter side of an image, {min(teacher.image[:2])}"


def _batches_divide_images(config: ConfigDict) -> Faults:
    synthesis = config.synthesis
    if synthesis.micro_batch and synthesis.batch % synthesis.micro_batch:
        yield "synthesis.micro_batch", f"a divisor of the batch, {synthesis.batch}"
    if synthesis.source or synthesis.real_split:
        return
    most = f"at most synthesis.images, {synthesis.images}"
    if synthesis.batch > synthesis.images:
        yield "synthesis.batch", most
    if synthesis.images % synthesis.batch:
        yield "synthesis.images", f"a multiple of the batch, {synthesis.batch}"
    for name in ("calibration", "finetune"):
        if config[name].batch > synthesis.images:
            yield f"{name}.batch", most


def _steps_can_be_counted(config: ConfigDict) -> Faults:
    most = MOST // config.finetune.steps_per_epoch
    if config.finetune.epochs > most:
        yield "finetune.epochs", f"at most {most}; the counter of steps has 32 bits"
    if max(config.finetune.lr_drops, default=0) > most:
        yield "finetune.lr_drops", f"epochs of at most {most}; the counter of steps has 32 bits"


def _best_images_can_be_told(config: ConfigDict) -> Faults:
    if config.synthesis.return_to_best and config.synthesis.schedule == "cosine":
        yield "synthesis.return_to_best", "False if synthesis.schedule is cosine; only a plateau's rate falls in steps"
    if config.synthesis.return_to_best and config.synthesis.crop_probability > 0:
        yield (
            "synthesis.return_to_best",
            "False if synthesis.crop_probability is above 0; losses of different crops cannot be compared",
        )


def _promotion_has_a_direction(config: ConfigDict) -> Faults:
    settings = config.finetune
    if settings.direction == "fa" and settings.lam == 0 and settings.b > 0 and settings.eps > 0:
        yield "finetune.direction", "kl or kl+fa if finetune.lam is 0; otherwise no image is promoted"


CROSS_CHECKS: tuple[Callable[[ConfigDict], Faults], ...] = (
    _something_is_learned,
    _images_have_one_origin,
    _images_have_a_size,
    _batches_divide_images,
    _best_images_can_be_told,
    _promotion_has_a_direction,
    _steps_can_be_counted,
)
