"""Schedules and optimizer: PyTorch's plateau schedule for images, steps or a cosine and SGD for the student."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Plateau(NamedTuple):
    """Learning rate of PyTorch's ReduceLROnPlateau with what it remembers; scalars."""

    lr: Array
    best: Array
    bad: Array


def plateau_update(plateau: Plateau, loss: Array, settings: Any) -> Plateau:
    """Multiply the rate by `factor` once the loss has not improved by `threshold` (relative) for `patience` iterations.

    settings: `threshold`, `patience`, `factor` and `min_lr` of `config.synthesis`.
    """
    better = loss < plateau.best * (1 - settings.threshold)
    bad = jnp.where(better, 0, plateau.bad + 1)
    drop = bad > settings.patience
    lower = jnp.maximum(plateau.lr * settings.factor, settings.min_lr)
    # PyTorch ignores a drop of the rate by less than 1e-8.
    lr = jnp.where(drop & (plateau.lr - lower > 1e-8), lower, plateau.lr)
    return Plateau(lr, jnp.where(better, loss, plateau.best), jnp.where(drop, 0, bad))


def learning_rate(settings: Any) -> optax.Schedule:
    """The rate of each step. settings: `config.finetune`; `lr_drops` counts epochs of fine-tuning."""
    if settings.schedule == "cosine":
        return optax.cosine_decay_schedule(settings.lr, settings.epochs * settings.steps_per_epoch)
    drops = {epoch * settings.steps_per_epoch: 0.1 for epoch in settings.lr_drops}
    return optax.piecewise_constant_schedule(settings.lr, drops)


def optimizer(schedule: optax.ScalarOrSchedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """PyTorch's SGD with Nesterov momentum; weight decay on every parameter enters before the momentum."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum, nesterov=True))
