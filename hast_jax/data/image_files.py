"""Images in files, the usual form of ImageNet. They are decoded in parallel when needed, and cropped as in torchvision."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hast_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
THREADS = 16
LONGEST = 32  # times the shorter side: the longer side is cut to this length before the resize
ORDERS = ("name", "number")  # of class folders
LOOKED_AT = 16


class ImageFiles:
    """Images [n, height, width, channels], uint8, in a fixed order. labels: int32 [n]; classes: their number."""

    def __init__(
        self,
        sources: list[Path] | Callable[[int], bytes],
        labels: np.ndarray,
        classes: int,
        image: tuple[int, ...],
        crop: float,
    ):
        """sources: the files, or a function from an index to the bytes of a file. image: (height, width, 1 or 3). Images with
        one channel are grey. crop: see `centre_crop`.
        """
        self.labels, self.classes, self.shape = labels, classes, image
        self._sources, self._crop = sources, crop

    def batches(self, size: int, first: int = 0, every: int = 1) -> Iterator[np.ndarray]:
        """As `datasets.Arrays.batches`. Threads read ahead."""
        import grain

        starts = range(first * size, len(self.labels), every * size)
        rows = [row for start in starts for row in range(start, min(start + size, len(self.labels)))]
        images = grain.MapDataset.source(rows).map(self._read)
        yield from images.to_iter_dataset(grain.ReadOptions(THREADS, max(THREADS, 2 * size))).batch(size)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images with these indices."""
        return np.stack([self._read(int(row)) for row in rows])

    def _read(self, row: int) -> np.ndarray:
        source = self._sources(row) if callable(self._sources) else self._sources[row]
        name = f"image {row}" if isinstance(source, bytes) else str(source)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = centre_crop(_eight_bits(image, self.shape[2]), self.shape[:2], self._crop)
        except _UnclearError as error:
            raise UserError(f"{name} {error}.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all raised by Pillow
            raise UserError(f"{name} cannot be decoded ({error}): remove it, or copy it again.") from error
        return pixels.reshape(self.shape)


class _UnclearError(Exception):
    """An image whose conversion to eight bits per channel is ambiguous."""


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """`image` with eight bits per channel, in grey if `channels` is 1, else in RGB. Raises _UnclearError."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow itself would clip above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _UnclearError("has 32 bits per channel: save it with 8 or 16")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise _UnclearError("is transparent in places, so its colours are unknown there: save it without transparency")
    return image.convert("L" if channels == 1 else "RGB")


def centre_crop(image: Image.Image, size: tuple[int, ...], crop: float) -> np.ndarray:
    """Resize `image` until it just covers size / crop, bilinearly, and cut out the centre: uint8 [*size] or [*size, channels].

    size: height and width. For square sizes this is torchvision's Resize and CenterCrop on Pillow images, with their rounding.
    """
    longest = LONGEST * min(image.size) * max(size) // min(size)
    if max(image.size) > longest:  # only its centre is used, and resizing all of it could take gigabytes
        left, top = (max(0, (length - longest) // 2) for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    wanted = (round(size[1] / crop), round(size[0] / crop))
    to, side = max(zip(wanted, image.size), key=lambda pair: pair[0] / pair[1])  # the side that has to grow most
    width, height = (max(int(to * length / side), least) for length, least in zip(image.size, wanted))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.uint8)


def folder(path: Path, image: tuple[int, ...], crop: float, order: str = "") -> ImageFiles:
    """The images of a folder that holds one folder for each class. Hidden folders and all other files are ignored.

    image: (height, width, channels). crop: see `centre_crop`. order: of the classes. "name" sorts their folders as text, like
    PyTorch's ImageFolder. "number" is for folders whose names are whole numbers. "" means "name" if both orders agree.

    Raises UserError if there are no images, if the order of the classes is not clear, if `crop` would cut the borders of images
    that have the network's size already, or if images have another number of channels than 1 or 3.
    """
    if image[2] not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, but the network takes {image[2]}: set eval.dataset to none, or evaluate in "
            "Python with arrays."
        )
    names = [each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")] if path.is_dir() else []
    names = _in_order(path, names, order)
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(file for file in _files(path / name) if _is_image(file.relative_to(path)))
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"there are no images in {path}: it must hold one folder for each class, with {', '.join(EXTENSIONS)} files; "
            "name another eval.data_dir or eval.split; a run also works without evaluation, with eval.dataset none."
        )
    if crop < 1 and _have_size(files, image):
        raise UserError(
            f"the images in {path} have the network's size already, and eval.crop={crop:g} would cut off their borders: set "
            "eval.crop to 1."
        )
    return ImageFiles(files, np.asarray(labels, np.int32), len(names), image, crop)


def _have_size(files: list[Path], image: tuple[int, ...]) -> bool:
    """Whether the images have this size: `LOOKED_AT` of them, spread over the folder, are looked at."""
    try:
        for file in files[:: -(-len(files) // LOOKED_AT)]:
            with Image.open(file) as opened:
                if opened.size != (image[1], image[0]):
                    return False
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # told when this image is read
        return False
    return True


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links to folders are followed, but not to those around it, and no folder is read twice."""
    itself, seen = folder.resolve(), set()
    for place, inside, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen or real in itself.parents:
            inside.clear()
            continue
        seen.add(real)
        inside.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))  # the same order on every file system
        yield from (Path(place) / name for name in names)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in file.parts)


def _in_order(path: Path, names: list[str], order: str) -> list[str]:
    numbers = all(name.isdecimal() for name in names)
    if order == "number":
        if not numbers:
            raise UserError(f"eval.class_order is number, but not all folders in {path} are named by numbers: use name.")
        return sorted(names, key=int)
    swapped = [pair for pair in zip(sorted(names), sorted(names, key=int)) if pair[0] != pair[1]] if numbers else []
    if order == "" and swapped:
        raise UserError(
            f"the class folders in {path} are named by numbers, and as text {swapped[0][0]} comes before {swapped[0][1]}: "
            "set eval.class_order to number, or to name for the order of PyTorch's ImageFolder."
        )
    return sorted(names)
