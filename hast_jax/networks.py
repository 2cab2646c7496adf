"""The networks that a config names: the teacher with its weights, and the student."""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from hast_jax import models, quant
from hast_jax.errors import UserError
from hast_jax.models import own, weights


def bare_teacher(config: ConfigDict) -> nn.Module:
    """The full-precision network without its variables."""
    precision = models.Precision(arithmetic=config.teacher.arithmetic)
    return models.create(config.teacher.network, config.teacher.classes, precision)


def teacher(config: ConfigDict) -> tuple[nn.Module, weights.Variables]:
    """The full-precision network and its variables.

    Raises UserError where the network cannot be quantized by the stages, or the file does not fit the config.
    """
    model = bare_teacher(config)
    image = tuple(config.teacher.image)
    if own.is_own(config.teacher.network):
        own.check(model, student(config), image, alignment=config.finetune.lam > 0)
    path = weights.locate(config.teacher.weights)
    state, metadata = weights.read(path)
    for name in ("mean", "std"):
        said, ours = getattr(metadata, name), config.teacher[name]
        if said is not None and not (len(said) == len(ours) and np.allclose(said, ours, atol=1e-3)):
            raise UserError(f"{path} was trained with {name} {said}, not config.teacher.{name} {ours}: change the config.")
    return model, weights.from_state_dict(model, state, image)


def student(config: ConfigDict) -> nn.Module:
    """The same network with quantized weights and activations."""
    rule = quant.RANGE_RULES[config.calibration.range]
    precision = models.Precision(config.bits.weights, config.bits.activations, rule, config.finetune.straight_through)
    return models.create(config.teacher.network, config.teacher.classes, precision)
