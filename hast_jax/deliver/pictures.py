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
    """The first 64 normalised images, eight in a row, as colours in [0, 1]: float [rows * (height + 2), 8 * (width + 2), 3].

    images: [n, height, width, channels]. Each has a white margin of one pixel. Of more than three channels, the first three are
    shown as red, green and blue. Of two, the first is shown in grey.
    """
    pixels = np.clip(images[:PICTURE_IMAGES] * np.asarray(std) + np.asarray(mean), 0, 1)
    side = 8
    pixels = np.concatenate([pixels, np.ones((-len(pixels) % side, *pixels.shape[1:]))])
    pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, -1)
    rows, height, width = len(pixels) // side, *pixels.shape[1:3]
    joined = pixels.reshape(rows, side, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(joined.reshape(rows * height, side * width, 3))
