"""The networks that a config names: the teacher with its weights, and the student."""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import networks
from hast_jax.errors import UserError
from hast_jax.method import quantizer
from hast_jax.networks import user_files, weights


def bare_teacher(config: ConfigDict) -> nn.Module:
    """The full-precision network without its variables."""
    precision = networks.Precision(arithmetic=config.teacher.arithmetic)
    return networks.create(config.teacher.network, config.teacher.classes, precision)


def teacher(config: ConfigDict) -> tuple[nn.Module, weights.Variables]:
    """The full-precision network and its variables.

    Raises UserError where the network cannot be quantized by the stages, or the file does not fit the config.
    """
    model = bare_teacher(config)
    image = tuple(config.teacher.image)
    if user_files.is_own(config.teacher.network):
        user_files.check(model, student(config), image, alignment=config.finetune.lam > 0)
    path = weights.locate(config.teacher.weights)
    state, metadata = weights.read(path)
    for field in ("teacher.mean", "teacher.std", "eval.crop"):
        name = field.split(".")[1]
        said, ours = getattr(metadata, name), config_lib.field(config, field)
        if said is not None and not (np.shape(said) == np.shape(ours) and np.allclose(said, ours, atol=1e-3)):
            raise UserError(f"{path} was trained for the {name} {said}, not config.{field} {ours}: change the config.")
    return model, weights.from_state_dict(model, state, image)


def student(config: ConfigDict) -> nn.Module:
    """The same network with quantized weights and activations."""
    rule = quantizer.RANGE_RULES[config.calibration.range]
    precision = networks.Precision(config.bits.weights, config.bits.activations, rule, config.finetune.straight_through)
    return networks.create(config.teacher.network, config.teacher.classes, precision)
