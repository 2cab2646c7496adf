"""Pictures of synthetic images."""

from pathlib import Path

import numpy as np

PICTURE_IMAGES = 64


def save_picture(path: Path, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """A PNG of the first 64 normalised images [n, height, width, channels], eight to a row."""
    from matplotlib.image import imsave

    pixels = np.clip(images[:PICTURE_IMAGES] * np.asarray(std) + np.asarray(mean), 0, 1)
    side = 8
    pixels = np.concatenate([pixels, np.ones((-len(pixels) % side, *pixels.shape[1:]))])
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    rows, size = len(pixels) // side, pixels.shape[1]
    grid = pixels.reshape(rows, side, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * size, side * size, 3)
    enlarge = max(1, 1024 // grid.shape[1])
    imsave(path, np.ascontiguousarray(np.repeat(np.repeat(grid, enlarge, 0), enlarge, 1)))
