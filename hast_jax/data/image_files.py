"""Images in files, as most people have ImageNet: decoded in parallel when they are asked for, cropped as torchvision does."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hast_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
THREADS = 16
LONGEST = 32  # times the shorter side: more of an image is not resized
ORDERS = ("name", "number")  # of class folders


class ImageFiles:
    """Images [n, size, size, channels], uint8, in a fixed order. labels: int32 [n]; classes: how many there are."""

    def __init__(
        self,
        sources: list[Path] | Callable[[int], bytes],
        labels: np.ndarray,
        classes: int,
        image: tuple[int, ...],
        crop: float,
    ):
        """sources: the files, or a function from an index to the bytes of a file. image: (size, size, channels), in grey with
        one channel. crop: see `centre_crop`.
        """
        self.labels, self.classes, self.shape = labels, classes, image
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
        name = f"image {row}" if isinstance(source, bytes) else str(source)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = centre_crop(_eight_bits(image, self.shape[2]), self.shape[0], self._crop)
        except _UnclearError as error:
            raise UserError(f"{name} {error}.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
            raise UserError(f"{name} cannot be decoded ({error}): remove it, or copy it again.") from error
        return pixels.reshape(self.shape)


class _UnclearError(Exception):
    """An image whose pixels are not known to be what a network was trained on."""


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """`image` with three channels of eight bits, or in grey. Raises _UnclearError."""
    if image.mode.startswith("I;16"):  # Pillow itself would cut off what is above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _UnclearError("has 32 bits a pixel: save it with 8 or 16")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise _UnclearError("is transparent in places, and nobody says what is behind it: save it without transparency")
    return image.convert("L" if channels == 1 else "RGB")


def centre_crop(image: Image.Image, size: int, crop: float) -> np.ndarray:
    """Resize the shorter side to size / crop, bilinearly, and cut out the centre: uint8 [size, size] or [size, size, channels].

    As torchvision's Resize and CenterCrop on Pillow images, with their rounding.
    """
    shorter, side = round(size / crop), min(image.size)
    if max(image.size) > LONGEST * side:  # only its centre is seen, and all of it would take gigabytes
        left, top = (max(0, (length - LONGEST * side) // 2) for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = (int(shorter * length / side) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def folder(path: Path, image: tuple[int, ...], crop: float, order: str = "") -> ImageFiles:
    """A folder with one folder of images for each class. Hidden files and folders, and other files, are not seen.

    image: (size, size, channels). crop: see `centre_crop`. order: of the classes, one of `ORDERS`: "name", as PyTorch's
    ImageFolder has them, or "number", for folders whose names are whole numbers; "": by name where both are the same.

    Raises UserError where there are no images, or the order of the classes is not clear.
    """
    names = [each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")] if path.is_dir() else []
    names = _in_order(path, names, order)
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(file for file in (path / name).rglob("*") if _is_image(file.relative_to(path)))
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"there are no images in {path}: it must hold one folder for each class, with {', '.join(EXTENSIONS)} files; "
            "set --config.eval.data_dir, or --config.eval.dataset=none to run without evaluation."
        )
    return ImageFiles(files, np.asarray(labels, np.int32), len(names), image, crop)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in file.parts)


def _in_order(path: Path, names: list[str], order: str) -> list[str]:
    numbers = all(name.isdecimal() for name in names)
    if order == "number":
        if not numbers:
            raise UserError(f"config.eval.class_order is number, and not all folders in {path} are whole numbers: use name.")
        return sorted(names, key=int)
    swapped = [pair for pair in zip(sorted(names), sorted(names, key=int)) if pair[0] != pair[1]] if numbers else []
    if order == "" and swapped:
        raise UserError(
            f"the class folders in {path} are whole numbers, and as text {swapped[0][0]} comes before {swapped[0][1]}: "
            "set --config.eval.class_order=number, or =name for the order that PyTorch's ImageFolder has."
        )
    return sorted(names)
