"""Pictures of synthetic images."""

from pathlib import Path

import numpy as np

PICTURE_IMAGES = 64


def save_picture(path: Path, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write a PNG of the first 64 normalised images [n, height, width, channels], eight in a row."""
    from matplotlib.image import imsave

    pixels = grid(images, mean, std)
    enlarge = max(1, 1024 // pixels.shape[1])
    imsave(path, np.ascontiguousarray(np.repeat(np.repeat(pixels, enlarge, 0), enlarge, 1)))


def grid(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The first 64 normalised images, eight in a row, as colours in [0, 1]: float [rows * (size + 2), 8 * (size + 2), 3].

    images: square, [n, size, size, channels]. Each has a white margin of one pixel.
    """
    pixels = np.clip(images[:PICTURE_IMAGES] * np.asarray(std) + np.asarray(mean), 0, 1)
    side = 8
    pixels = np.concatenate([pixels, np.ones((-len(pixels) % side, *pixels.shape[1:]))])
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    rows, size = len(pixels) // side, pixels.shape[1]
    joined = pixels.reshape(rows, side, size, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(joined.reshape(rows * size, side * size, 3))
