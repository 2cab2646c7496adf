"""Networks: any Linen or nnx module as teacher or student, built-in networks by name, and weights from files."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from hast_jax.errors import InputError
from hast_jax.method.losses import BatchNormTap
from hast_jax.networks import user_files
from hast_jax.networks.codes import Codes, kernel_codes
from hast_jax.networks.forward import Taps, apply, logits, observe
from hast_jax.networks.mobilenet import MobileNetV1, MobileNetV2
from hast_jax.networks.network import Network, create
from hast_jax.networks.ranges import kernel_ranges, proper_ranges, quantized_params, settled
from hast_jax.networks.resnet import ResNet
from hast_jax.networks.teacher_agreement import agreement

ARCHITECTURES: dict[str, Any] = {
    "resnet8": partial(ResNet, widths=(16, 32, 64), units=(1, 1, 1)),
    "resnet20": partial(ResNet, widths=(16, 32, 64), units=(3, 3, 3)),
    "resnet18": partial(ResNet, widths=(64, 128, 256, 512), units=(2, 2, 2, 2), imagenet_stem=True),
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_torchvision": partial(MobileNetV2, torchvision=True),
}


def module(name: str, classes: int, arguments: Mapping[str, Any] = {}) -> nn.Module:
    """The module called `name`: one of `ARCHITECTURES`, or "FILE.py:NAME" for a network in a user's file.

    arguments: of the constructor. They win over `classes` if they give the number of classes too. Raises UserError if there is
    no such network or if its constructor fails.
    """
    if name in ARCHITECTURES:
        try:
            return ARCHITECTURES[name](**{"classes": classes, **arguments})
        except TypeError as error:
            raise InputError(f"{name} takes no such arguments ({error}): leave config.teacher.arguments empty.") from error
    return user_files.make(name, classes, arguments)


__all__ = [
    "ARCHITECTURES",
    "BatchNormTap",
    "Codes",
    "Network",
    "ResNet",
    "Taps",
    "agreement",
    "apply",
    "create",
    "kernel_codes",
    "kernel_ranges",
    "logits",
    "module",
    "observe",
    "proper_ranges",
    "quantized_params",
    "settled",
]
