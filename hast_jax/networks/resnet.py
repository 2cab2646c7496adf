"""ResNets with basic blocks: ResNet-20 for CIFAR, ResNet-18 for ImageNet, and a small one for 8 x 8 digits.

The architecture and the names of its parts are those of pytorchcv: the shortcut of a unit that changes the shape is a
1x1 convolution with batch norm. Teacher and student are the same module: a student is one with a `Precision`.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from hast_jax.networks import names
from hast_jax.networks.layers import FULL_PRECISION, Activation, BatchNormTap, ConvNorm, Dense, Precision, Taps

Array = jax.Array


class ResUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the output, the taps in order of execution and the branch."""

    features: int
    stride: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, list[BatchNormTap], Array]:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        bits, taps = self.precision.weights, []
        activation = lambda name: Activation(self.precision, name=name)
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.features:
            shortcut, tap = ConvNorm(self.features, 1, self.stride, bits, name="identity_conv")(x, train)
            taps.append(tap)
        x, tap = ConvNorm(self.features, 3, self.stride, bits, name="conv1")(x, train)
        taps.append(tap)
        branch, tap = ConvNorm(self.features, 3, 1, bits, name="conv2")(activation("activ1")(x), train)
        taps.append(tap)
        return activation("activ")(branch + shortcut), taps, branch


class ResNet(nn.Module):
    """A ResNet of basic blocks.

    classes: number of logits. widths, units: channels and number of units of each stage; each stage but the first
    halves the image. imagenet_stem: 7x7 stride-2 convolution and max pooling instead of one 3x3 convolution.
    """

    classes: int
    widths: Sequence[int]
    units: Sequence[int]
    imagenet_stem: bool = False
    precision: Precision = FULL_PRECISION

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """Name maps of pytorchcv and, for the ImageNet network, torchvision."""
        ours = {"pytorchcv": partial(names.resnet_pytorchcv, imagenet_stem=self.imagenet_stem)}
        return ours | ({"torchvision": names.resnet_torchvision} if self.imagenet_stem else {})

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Taps]:
        """Logits [batch, classes] and taps of normalised images [batch, height, width, channels].

        `train=True` normalises with the moments of the batch and updates `batch_stats` (only for pretraining).
        """
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        stem = ConvNorm(self.widths[0], size, stride, self.precision.weights, name="init_block")
        x, tap = stem(x, train)
        x = Activation(self.precision, name="init_activ")(x)
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        taps, branches = [tap], []
        for i, (width, units) in enumerate(zip(self.widths, self.units)):
            for j in range(units):
                unit = ResUnit(width, 2 if i > 0 and j == 0 else 1, self.precision, name=f"stage{i + 1}_unit{j + 1}")
                x, unit_taps, branch = unit(x, train)
                taps += unit_taps
                branches.append(branch)
        logits = Dense(self.classes, self.precision.weights, name="output")(x.mean((1, 2)))
        return logits, Taps(tuple(taps), tuple(branches))
