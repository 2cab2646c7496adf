"""An image as a sum of pictures of several resolutions, which are optimised together.

Adam moves every number by about its rate. If the numbers are pixels, a large area changes its colour only if all its pixels
move the same way, so synthetic images come out grey with fine patterns. If an image is a sum of pictures of full size, half of
it, a quarter and so on, one number of a coarse picture moves a whole area. Changing the basis of the images in this way is
known from feature visualization (Olah et al., 2017, "Preconditioning and Parameterization").
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array

# Pixels of photographs, in [0, 1], have about this mean and this standard deviation.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
NORMALISED_STD = (PIXEL_STD / 2, PIXEL_STD * 2)  # limits of the `std` of a network whose inputs have a spread of about 1


class Unit(NamedTuple):
    """The mean and the spread of a network's inputs in each channel [1, 1, 1, channels]. Noise n becomes offset + scale * n."""

    offset: np.ndarray
    scale: np.ndarray


def unit_of(mean: Sequence[float], std: Sequence[float]) -> Unit | None:
    """The `Unit` of a network that takes (x - mean) / std for pixels x in [0, 1].

    None for normalised inputs, with a `std` within `NORMALISED_STD`. Then noise N(0, 1) is an input as it is, as in the paper.
    Other networks take pixels of 0 ... 1 or 0 ... 255, and may normalise these themselves.
    """
    means, stds = (np.asarray(each, np.float32).reshape(1, 1, 1, -1) for each in (mean, std))
    if ((stds >= NORMALISED_STD[0]) & (stds <= NORMALISED_STD[1])).all():
        return None
    return Unit((PIXEL_MEAN - means) / stds, PIXEL_STD / stds)


def start(key: Array, shape: tuple[int, ...], scales: int) -> tuple[Array, ...]:
    """Noise at the first `scales` resolutions, the full one first.

    shape: of the images, [batch, height, width, channels]. Each side is half of the one before, rounded up. Halving stops at
    1 x 1, so a small image has fewer than `scales` resolutions. Each of n resolutions starts as N(0, 1/n) before it is
    enlarged. This spreads the variance about evenly over the octaves of frequencies, as in photographs. With one resolution
    the start is N(0, 1), as in the paper.
    """
    batch, height, width, channels = shape
    sides = [(height, width)]
    while len(sides) < scales and max(sides[-1]) > 1:
        height, width = -(-height // 2), -(-width // 2)
        sides.append((height, width))
    keys = [key, *(jax.random.fold_in(key, max(side)) for side in sides[1:])]
    noise = (jax.random.normal(key, (batch, *side, channels)) for key, side in zip(keys, sides))
    return tuple(each / len(sides) ** 0.5 for each in noise)


def images(pyramid: Sequence[Array], unit: Unit | None = None) -> Array:
    """The sum of the pictures [..., height, width, channels] of a pyramid, enlarged to full size by bilinear interpolation.

    unit: of the network's inputs, which the sum then becomes.
    """
    full, *coarse = pyramid
    for each in coarse:
        full = full + jax.image.resize(each, full.shape, "bilinear", precision=jax.lax.Precision.HIGHEST)
    return full if unit is None else unit.offset + unit.scale * full
