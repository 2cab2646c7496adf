"""Schedules and optimizers. Images: PyTorch's plateau or a cosine. Student: steps or a cosine, with SGD or Adam."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Plateau(NamedTuple):
    """PyTorch's ReduceLROnPlateau, as scalars: learning rate, lowest loss, iterations without improvement in a row."""

    lr: Array
    best: Array
    bad: Array


def plateau_update(plateau: Plateau, loss: Array, settings: Any) -> Plateau:
    """Multiply the rate by `factor` after more than `patience` iterations without a relative improvement of `threshold`.

    settings: `threshold`, `patience`, `factor` and `min_lr` of `config.synthesis`.
    """
    better = loss < plateau.best * (1 - settings.threshold)
    bad = jnp.where(better, 0, plateau.bad + 1)
    drop = bad > settings.patience
    lower = jnp.maximum(plateau.lr * settings.factor, settings.min_lr)
    # PyTorch ignores a drop of the rate by 1e-8 or less.
    lr = jnp.where(drop & (plateau.lr - lower > 1e-8), lower, plateau.lr)
    return Plateau(lr, jnp.where(better, loss, plateau.best), jnp.where(drop, 0, bad))


def image_rate(plateau: Plateau, iteration: Array, settings: Any) -> Array:
    """The rate of the images at this iteration: the plateau's, or a cosine to zero. settings: `config.synthesis`."""
    if settings.schedule == "cosine":
        return optax.cosine_decay_schedule(settings.lr, max(1, settings.iterations))(iteration)
    return plateau.lr


def learning_rate(settings: Any) -> optax.Schedule:
    """The student's rate at each step: a cosine to zero, or a division by 10 for each epoch in `lr_drops`.

    An epoch that is there twice divides by 100, as in PyTorch. settings: `config.finetune`.
    """
    if settings.schedule == "cosine":
        return optax.cosine_decay_schedule(settings.lr, settings.epochs * settings.steps_per_epoch)
    drops = {epoch * settings.steps_per_epoch: 0.1 ** settings.lr_drops.count(epoch) for epoch in settings.lr_drops}
    return optax.piecewise_constant_schedule(settings.lr, drops)


def optimizer(settings: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Optimizer of the student's `params`. settings: `config.finetune`. schedule: the rate of each step.

    sgd (the paper's): PyTorch's SGD with Nesterov momentum. The weight decay of each parameter is added before the momentum.
    adam: Adam with decoupled weight decay.
    """
    if settings.optimizer == "adam":
        return optax.adamw(schedule, weight_decay=settings.weight_decay)
    sgd = optax.sgd(schedule, momentum=settings.momentum, nesterov=True)
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)


def student_optimizer(settings: Any) -> optax.GradientTransformation:
    """Optimizer of all that is trained: {"params": ...}, and {"ranges": ...} if these are learned. settings: `config.finetune`.

    Adam trains the ranges. Each update is a share of the range's width, so that one rate fits activations of any magnitude.
    """
    schedule = learning_rate(settings)
    share = settings.ranges_lr / settings.lr
    ranges = optax.chain(
        optax.scale_by_adam(), scale_by_width(), optax.scale_by_learning_rate(lambda step: share * schedule(step))
    )
    return optax.partition({"params": optimizer(settings, schedule), "ranges": ranges}, lambda trained: {n: n for n in trained})


def scale_by_width() -> optax.GradientTransformation:
    """Multiply the update of each end of a range by high - low. The tree's leaves are {"low": array, "high": array}."""

    def scale(updates: Any, ranges: Any) -> Any:
        if isinstance(updates, optax.MaskedNode):  # `optax.partition` masks what is not a range
            return updates
        if ranges.keys() == {"low", "high"} and not isinstance(ranges["low"], Mapping):
            width = ranges["high"] - ranges["low"]
            return {end: update * width for end, update in updates.items()}
        return {name: scale(updates[name], ranges[name]) for name in updates}

    return optax.stateless(scale)
