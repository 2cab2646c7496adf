"""MobileNetV1 and MobileNetV2: depthwise convolutions; architecture and names of parts are those of pytorchcv."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from hast_jax.networks import names
from hast_jax.networks.layers import FULL_PRECISION, Activation, BatchNormTap, ConvNorm, Dense, Precision, Taps

Array = jax.Array

EXPANSION = 6


class SeparableUnit(nn.Module):
    """Depthwise and pointwise convolution; returns the output, the taps in order of execution and the pointwise branch."""

    features: int
    stride: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, list[BatchNormTap], Array]:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        bits, channels = self.precision.weights, x.shape[-1]
        x, depthwise = ConvNorm(channels, 3, self.stride, bits, groups=channels, name="dw_conv")(x, train)
        x = Activation(self.precision, name="dw_activ")(x)
        branch, pointwise = ConvNorm(self.features, 1, 1, bits, name="pw_conv")(x, train)
        return Activation(self.precision, name="pw_activ")(branch), [depthwise, pointwise], branch


class MobileNetV1(nn.Module):
    """pytorchcv's `mobilenet_w1`.

    classes: number of logits. widths: channels of each unit of each stage; each stage but the first halves the image.
    """

    classes: int
    widths: Sequence[Sequence[int]] = ((64,), (128,) * 2, (256,) * 2, (512,) * 6, (1024,) * 2)
    stem: int = 32
    precision: Precision = FULL_PRECISION

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """The name map of pytorchcv."""
        return {"pytorchcv": names.mobilenet_pytorchcv}

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Taps]:
        """Logits [batch, classes] and taps of normalised images [batch, height, width, channels]; see `ResNet`."""
        x, tap = ConvNorm(self.stem, 3, 2, self.precision.weights, name="init_block")(x, train)
        x = Activation(self.precision, name="init_activ")(x)
        taps, branches = [tap], []
        for i, stage in enumerate(self.widths):
            for j, features in enumerate(stage):
                stride = 2 if i > 0 and j == 0 else 1
                unit = SeparableUnit(features, stride, self.precision, name=f"stage{i + 1}_unit{j + 1}")
                x, unit_taps, branch = unit(x, train)
                taps += unit_taps
                branches.append(branch)
        logits = Dense(self.classes, self.precision.weights, name="output")(x.mean((1, 2)))
        return logits, Taps(tuple(taps), tuple(branches))


class LinearBottleneck(nn.Module):
    """Expansion, depthwise convolution and linear projection, with a skip where shapes allow; returns as `SeparableUnit`."""

    features: int
    stride: int
    expansion: int
    expand: bool
    precision: Precision

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, list[BatchNormTap], Array]:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        bits, shortcut, width, taps = self.precision.weights, x, x.shape[-1] * self.expansion, []
        if self.expand:
            x, tap = ConvNorm(width, 1, 1, bits, name="conv1")(x, train)
            x = Activation(self.precision, "relu6", name="activ1")(x)
            taps.append(tap)
        x, tap = ConvNorm(width, 3, self.stride, bits, groups=width, name="conv2")(x, train)
        x = Activation(self.precision, "relu6", name="activ2")(x)
        branch, last = ConvNorm(self.features, 1, 1, bits, name="conv3")(x, train)
        skip = self.stride == 1 and shortcut.shape[-1] == self.features
        return branch + shortcut if skip else branch, [*taps, tap, last], branch


class MobileNetV2(nn.Module):
    """pytorchcv's `mobilenetv2_w1`, or torchvision's `mobilenet_v2`.

    torchvision's first unit has no expanding convolution, and its last layer is linear with a bias instead of a 1x1
    convolution without.

    classes: number of logits. widths: channels of each unit of each stage; each stage but the first halves the image.
    """

    classes: int
    widths: Sequence[Sequence[int]] = ((16,), (24,) * 2, (32,) * 3, (64,) * 4 + (96,) * 3, (160,) * 3 + (320,))
    stem: int = 32
    head: int = 1280
    torchvision: bool = False
    precision: Precision = FULL_PRECISION

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """The name map of pytorchcv or torchvision."""
        if self.torchvision:
            return {"torchvision": partial(names.mobilenetv2_torchvision, units=tuple(map(len, self.widths)))}
        return {"pytorchcv": names.mobilenet_pytorchcv}

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Taps]:
        """Logits [batch, classes] and taps of normalised images [batch, height, width, channels]; see `ResNet`."""
        bits = self.precision.weights
        x, tap = ConvNorm(self.stem, 3, 2, bits, name="init_block")(x, train)
        x = Activation(self.precision, "relu6", name="init_activ")(x)
        taps, branches = [tap], []
        for i, stage in enumerate(self.widths):
            for j, features in enumerate(stage):
                first, name = i == j == 0, f"stage{i + 1}_unit{j + 1}"
                stride, expansion = 2 if i > 0 and j == 0 else 1, 1 if first else EXPANSION
                expand = not (first and self.torchvision)
                x, unit_taps, branch = LinearBottleneck(features, stride, expansion, expand, self.precision, name=name)(
                    x, train
                )
                taps += unit_taps
                branches.append(branch)
        x, tap = ConvNorm(self.head, 1, 1, bits, name="final_block")(x, train)
        x = Activation(self.precision, "relu6", name="final_activ")(x)
        logits = Dense(self.classes, bits, use_bias=self.torchvision, name="output")(x.mean((1, 2)))
        return logits, Taps((*taps, tap), tuple(branches))
