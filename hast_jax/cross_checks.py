"""What no field of the config can say alone: checks of several fields together.

Each takes a config whose fields are right one by one, and yields (field, what it must be) for what does not fit.
"""

import math
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from hast_jax.kinds import MOST

Faults = Iterator[tuple[str, str]]

MAX_BATCH_VALUES = 2**29  # of a batch of images: 2 GiB in float32


def _something_is_learned(config: ConfigDict) -> Faults:
    if config.finetune.a == config.finetune.b == 0:
        yield "finetune.a", "positive where finetune.b is 0, or nothing is learned"


def _images_have_one_origin(config: ConfigDict) -> Faults:
    split = config.synthesis.real_split
    if config.synthesis.source and split:
        yield "synthesis.real_split", "empty where synthesis.source is set"

    def bases(text):
        return {part.split("[")[0].strip() for part in text.split("+")}

    learned, judged = bases(split) - {""}, bases(config.eval.split)
    if learned and (learned & judged or "all" in learned | judged):
        yield "synthesis.real_split", "without images of the evaluation's split, eval.split"


def _images_have_a_size(config: ConfigDict) -> Faults:
    teacher = config.teacher
    most = MAX_BATCH_VALUES // math.prod(teacher.image)
    if most < 1:
        yield "teacher.image", "smaller: a single image would take more than 2 GiB"
    if config.eval.batch > most:
        yield "eval.batch", f"at most {most}, or a batch of images would take more than 2 GiB"
    for name in ("mean", "std"):
        if len(teacher[name]) != teacher.image[2]:
            yield f"teacher.{name}", f"one number for each of the {teacher.image[2]} channels"
    if config.pretrain.shift > teacher.image[0]:
        yield "pretrain.shift", f"at most the size of an image, {teacher.image[0]}"


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
        yield "finetune.epochs", f"at most {most}, or there are more steps than can be counted"
    if max(config.finetune.lr_drops, default=0) > most:
        yield "finetune.lr_drops", f"epochs of at most {most}, or there are more steps than can be counted"


def _losses_can_be_compared(config: ConfigDict) -> Faults:
    if config.synthesis.return_to_best and config.synthesis.crop_probability > 0:
        yield (
            "synthesis.return_to_best",
            "False where synthesis.crop_probability is above 0: the losses of two crops say nothing",
        )


def _promotion_has_a_direction(config: ConfigDict) -> Faults:
    settings = config.finetune
    if settings.direction == "fa" and settings.lam == 0 and settings.b > 0 and settings.eps > 0:
        yield "finetune.direction", "kl or kl+fa where finetune.lam is 0, or no image would be promoted"


CROSS_CHECKS: tuple[Callable[[ConfigDict], Faults], ...] = (
    _something_is_learned,
    _images_have_one_origin,
    _images_have_a_size,
    _batches_divide_images,
    _losses_can_be_compared,
    _promotion_has_a_direction,
    _steps_can_be_counted,
)
