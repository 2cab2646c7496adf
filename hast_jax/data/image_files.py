"""Images in files, as most people have ImageNet: decoded in parallel when they are asked for, cropped as torchvision does."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hast_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
THREADS = 16


class ImageFiles:
    """Images [n, size, size, 3], uint8, in a fixed order. labels: int32 [n]; classes: how many there are."""

    def __init__(self, sources: list[Path] | Callable[[int], bytes], labels: np.ndarray, classes: int, size: int, crop: float):
        """sources: the files, or a function from an index to the bytes of a file. crop: see `centre_crop`."""
        self.labels, self.classes, self.shape = labels, classes, (size, size, 3)
        self._sources, self._crop = sources, crop

    def batches(self, size: int, first: int = 0, every: int = 1) -> Iterator[np.ndarray]:
        """As `data.Arrays.batches`; read ahead by threads."""
        import grain

        starts = range(first * size, len(self.labels), every * size)
        rows = [row for start in starts for row in range(start, min(start + size, len(self.labels)))]
        images = grain.MapDataset.source(rows).map(self._read)
        yield from images.to_iter_dataset(grain.ReadOptions(THREADS, 2 * size)).batch(size)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows."""
        return np.stack([self._read(int(row)) for row in rows])

    def _read(self, row: int) -> np.ndarray:
        source = self._sources(row) if callable(self._sources) else self._sources[row]
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return centre_crop(image.convert("RGB"), self.shape[0], self._crop)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
            name = f"image {row}" if isinstance(source, bytes) else str(source)
            raise UserError(f"{name} cannot be decoded ({error}): remove it, or copy it again.") from error


def centre_crop(image: Image.Image, size: int, crop: float) -> np.ndarray:
    """Resize the shorter side to size / crop, bilinearly, and cut out the centre: uint8 [size, size, 3].

    As torchvision's Resize and CenterCrop on Pillow images, with their rounding.
    """
    shorter, side = round(size / crop), min(image.size)
    width, height = (int(shorter * length / side) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def folder(path: Path, size: int, crop: float) -> ImageFiles:
    """A folder with one folder of images for each class, numbered in the order of their names. crop: see `centre_crop`.

    Raises UserError where it is none.
    """
    names = sorted(each.name for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in EXTENSIONS)
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"there are no images in {path}: it must hold one folder for each class, with {', '.join(EXTENSIONS)} files; "
            "set --config.eval.data_dir, or --config.eval.dataset=none to run without evaluation."
        )
    return ImageFiles(files, np.asarray(labels, np.int32), len(names), size, crop)
