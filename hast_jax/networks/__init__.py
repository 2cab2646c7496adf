"""Networks by name. Every network is a Linen module that returns `(logits, Taps)`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from hast_jax.networks import user_files
from hast_jax.networks.layers import ACTIVATIONS, FULL_PRECISION, BatchNormTap, Precision, Taps
from hast_jax.networks.mobilenet import MobileNetV1, MobileNetV2
from hast_jax.networks.resnet import ResNet

ARCHITECTURES: dict[str, Any] = {
    "resnet8": partial(ResNet, widths=(16, 32, 64), units=(1, 1, 1)),
    "resnet20": partial(ResNet, widths=(16, 32, 64), units=(3, 3, 3)),
    "resnet18": partial(ResNet, widths=(64, 128, 256, 512), units=(2, 2, 2, 2), imagenet_stem=True),
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_torchvision": partial(MobileNetV2, torchvision=True),
}


def create(name: str, classes: int, precision: Precision = FULL_PRECISION) -> nn.Module:
    """The network called `name`: the teacher by default, a student with a `precision`.

    name: one of `ARCHITECTURES`, or "FILE.py:CLASS" for a network of one's own (docs/your_network.md). Raises UserError where
    there is none.
    """
    make = ARCHITECTURES[name] if name in ARCHITECTURES else user_files.load(name)
    return make(classes=classes, precision=precision)


def apply(model: nn.Module, variables: Any, images: jax.Array) -> tuple[jax.Array, Taps]:
    """Logits [batch, classes] and taps of normalised images [batch, height, width, channels], nothing updated."""
    with jax.default_matmul_precision(model.precision.arithmetic):  # type: ignore[attr-defined]
        outputs: Any = model.apply(variables, images)
    return outputs


__all__ = ["ACTIVATIONS", "ARCHITECTURES", "BatchNormTap", "Precision", "ResNet", "Taps", "apply", "create"]
