"""An image as a sum of pictures of several resolutions, which are optimised together.

Adam moves every number by about its rate. If the numbers are pixels, a large area changes its colour only if all its pixels
move the same way, so synthetic images come out grey with fine patterns. If an image is a sum of pictures of full size, half of
it, a quarter and so on, one number of a coarse picture moves a whole area. Changing the basis of the images in this way is
known from feature visualization (Olah et al., 2017, "Preconditioning and Parameterization").
"""

from collections.abc import Sequence

import jax

Array = jax.Array


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


def images(pyramid: Sequence[Array]) -> Array:
    """The sum of the pictures [..., height, width, channels] of a pyramid, enlarged to full size by bilinear interpolation."""
    full, *coarse = pyramid
    for each in coarse:
        full = full + jax.image.resize(each, full.shape, "bilinear", precision=jax.lax.Precision.HIGHEST)
    return full
