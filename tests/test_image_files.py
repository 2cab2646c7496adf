"""Images in class folders are read in order, cropped as torchvision does it, and judged by top-1 and top-5."""

import io
from pathlib import Path
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image
from rich.console import Console

from hast_jax import config as config_lib
from hast_jax.data import datasets, image_files
from hast_jax.deliver.console import Bar
from hast_jax.errors import UserError
from hast_jax.runs import parallel
from hast_jax.runs.progress import silent
from hast_jax.stages.evaluate import evaluator

CROP = 224 / 256
SIZES = [(300, 200), (200, 300), (257, 255), (64, 500), (256, 256), (301, 299)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes with two or three images each, of several forms."""
    for label in range(10):
        place = tmp_path / "val" / f"n{label:04d}"
        place.mkdir(parents=True)
        for i in range(2 + label % 2):
            name, mode = [("a.JPEG", "RGB"), ("b.png", "L"), ("c.jpg", "RGB")][i]
            picture(80 + 10 * label, 100, label).convert(mode).save(place / name)
    (tmp_path / "val" / "n0000" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_crop_is_pillows_resize_of_the_shorter_side_to_256_and_its_centre(width: int, height: int) -> None:
    image = picture(width, height)
    if width <= height:
        resized = image.resize((256, 256 * height // width), Image.Resampling.BILINEAR)
    else:
        resized = image.resize((256 * width // height, 256), Image.Resampling.BILINEAR)
    top, left = (round((length - 224) / 2) for length in reversed(resized.size))
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(image_files.centre_crop(image, (224, 224), CROP), expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_crop_is_torchvisions(width: int, height: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="needs pip install -e '.[parity]'")
    image = picture(width, height)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    np.testing.assert_array_equal(image_files.centre_crop(image, (224, 224), CROP), np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [(96, 224), (224, 96)])
def test_a_crop_that_is_not_square_is_the_centre_of_the_smallest_image_that_covers_it(
    width: int, height: int, size: tuple[int, int]
) -> None:
    image = picture(width, height)
    grown = max(round(size[0] / CROP) / height, round(size[1] / CROP) / width)
    resized = np.asarray(image.resize((int(width * grown + 1e-6), int(height * grown + 1e-6)), Image.Resampling.BILINEAR))
    top, left = (round((length - cut) / 2) for length, cut in zip(resized.shape, size))
    expected = resized[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(image_files.centre_crop(image, size, CROP), expected)


def test_image_files_are_refused_for_a_network_of_other_channels(folder: Path) -> None:
    with pytest.raises(UserError, match="image files have 1 or 3 channels, but the network takes 4"):
        image_files.folder(folder / "val", (64, 64, 4), CROP)


def test_a_folder_is_read_in_the_order_of_classes_and_names(folder: Path) -> None:
    dataset = image_files.folder(folder / "val", (64, 64, 3), CROP)
    assert dataset.shape == (64, 64, 3) and dataset.classes == 10
    assert np.array_equal(np.bincount(dataset.labels), [2 + label % 2 for label in range(10)])
    batches = list(dataset.batches(7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 4] and batches[0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(batches), dataset.read(np.arange(25)))
    with Image.open(folder / "val" / "n0001" / "b.png") as image:
        expected = image_files.centre_crop(image.convert("RGB"), (64, 64), CROP)
    np.testing.assert_array_equal(dataset.read(np.asarray([3]))[0], expected)


def test_imagenet_of_tfds_is_decoded_and_cropped_like_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = image_files.folder(folder / "val", (64, 64, 3), CROP)
    paths = sorted(path for path in (folder / "val").rglob("*") if path.suffix != ".txt" and path.is_file())
    records = [{"image": path.read_bytes(), "label": int(label)} for path, label in zip(paths, files.labels)]

    class Source(list):
        def __getitems__(self, rows: range) -> list:
            return [self[row] for row in rows]

    monkeypatch.setattr(tfds, "data_source", create_autospec(tfds.data_source, return_value=Source(records)))
    config = tiny.config(eval__dataset="imagenet2012", eval__split="validation")
    config.teacher.image, config.teacher.classes = (64, 64, 3), 1000
    dataset = datasets.load(config, "validation")
    np.testing.assert_array_equal(dataset.labels, files.labels)
    np.testing.assert_array_equal(np.concatenate(list(dataset.batches(7))), files.read(np.arange(25)))


def pixels(variables: dict, images: jax.Array) -> jax.Array:
    """Logits that are the image's first pixels."""
    return images.reshape(len(images), -1)[:, :10]


def test_top_1_and_top_5_are_those_of_sorted_logits(folder: Path) -> None:
    config = tiny.config(eval__dataset="folder", eval__data_dir=str(folder), eval__split="val", eval__batch=7)
    config.teacher.image, config.teacher.mean, config.teacher.std = (64, 64, 3), (0.5,) * 3, (0.2,) * 3
    dataset = datasets.load(config, "val")
    found = evaluator(pixels, dataset, config, parallel.setup(2), silent)({})
    logits = dataset.read(np.arange(25)).astype(np.float64) / 255
    logits = ((logits - 0.5) / 0.2).reshape(25, -1)[:, :10]
    ranked = np.argsort(-logits.round(6), 1, kind="stable")
    hits = ranked == dataset.labels[:, None]
    assert found.top1 == pytest.approx(100 * hits[:, 0].mean()) and found.top5 == pytest.approx(100 * hits[:, :5].any(1).mean())
    assert found.top1 < found.top5


def test_a_network_without_finite_logits_is_right_about_nothing() -> None:
    config = tiny.config()
    dataset = datasets.load(config, "test")

    def not_a_number(variables: dict, images: jax.Array) -> jax.Array:
        return jnp.full((len(images), 10), jnp.nan)

    assert evaluator(not_a_number, dataset, config, 1, silent)({}) == (0, 0)


def test_what_is_wrong_with_a_folder_is_said(folder: Path) -> None:
    config = tiny.config(eval__dataset="folder", eval__data_dir=str(folder), eval__split="val")
    config.teacher.image, config.teacher.mean, config.teacher.std = (64, 64, 3), (0.5,) * 3, (0.2,) * 3
    config.teacher.classes = 1000
    with pytest.raises(UserError, match="holds 10 folders, but the network has 1000 classes"):
        datasets.load(config, "val")
    with pytest.raises(UserError, match="one folder for each class"):
        datasets.load(config, "test")
    (folder / "val" / "n0003" / "a.JPEG").write_bytes(b"no jpeg")
    with pytest.raises(Exception, match=r"n0003/a.JPEG cannot be decoded"):
        list(image_files.folder(folder / "val", (64, 64, 3), CROP).batches(8))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"P5 99999 99999 255\n"])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path: Path, content: bytes) -> None:
    """Nothing; a text; a PNG without its chunks; nine billion pixels that are not there."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"class/a.png cannot be decoded"):
        image_files.folder(tmp_path, (8, 8, 3), CROP).read(np.arange(1))


def test_an_evaluation_batch_is_no_larger_than_the_data_and_its_progress_is_shown() -> None:
    """A run folder from a stranger may name any size."""
    config = tiny.config(eval__batch=8_000_000)
    config_lib.validate(config)
    terminal = io.StringIO()
    with Bar(Console(file=terminal, force_terminal=True)) as progress:
        evaluate = evaluator(pixels, datasets.load(config, "test"), config, 2, progress)
        assert evaluate({}).top1 >= 0 and "evaluate" in terminal.getvalue()
    config.eval.batch = 10**11
    with pytest.raises(UserError, match=r"config.eval.batch is .* at most 8388608"):
        config_lib.validate(config)


def classes_of(path: Path, names: list[str], save=None) -> Path:
    """A folder of classes, each with one image of its own colour."""
    for i, name in enumerate(names):
        (path / name).mkdir(parents=True)
        image = Image.new("RGB", (32, 32), (10 * i, 0, 0))
        (save or (lambda image, file: image.save(file)))(image, path / name / "a.png")
    return path


def test_class_folders_that_are_numbers_are_refused_where_text_and_number_order_them_differently(tmp_path: Path) -> None:
    place = classes_of(tmp_path / "val", [str(i) for i in range(12)])
    with pytest.raises(UserError, match="as text 10 comes before 2") as refused:
        image_files.folder(place, (32, 32, 3), 1)
    assert "set eval.class_order to number" in str(refused.value)

    def first(order):
        return [int(image[0, 0, 0]) // 10 for image in image_files.folder(place, (32, 32, 3), 1, order).read(np.arange(12))]

    assert first("number") == list(range(12)) and first("name") == [0, 1, 10, 11, *range(2, 10)]
    padded = classes_of(tmp_path / "padded", [f"{i:02d}" for i in range(12)])
    assert image_files.folder(padded, (32, 32, 3), 1).classes == 12
    with pytest.raises(UserError, match="not all folders"):
        image_files.folder(classes_of(tmp_path / "words", ["cat", "dog"]), (32, 32, 3), 1, "number")


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path: Path) -> None:
    place = classes_of(tmp_path / "val", ["a", "b", ".thumbnails"])
    (place / "a" / "._a.png").write_bytes(b"a resource fork")
    (place / "notes.png").write_bytes(b"not in a class")
    dataset = image_files.folder(place, (32, 32, 3), 1)
    assert (dataset.classes, len(dataset.labels)) == (2, 2)
    config = tiny.config(eval__dataset="folder", eval__data_dir=str(tmp_path), eval__split="val", eval__crop=1.0)
    config.teacher.image, config.teacher.mean, config.teacher.std = (32, 32, 3), (0.5,) * 3, (0.2,) * 3
    with pytest.raises(UserError, match="holds 2 folders, but the network has 10 classes"):
        datasets.load(config, "val")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for place in ("val/a", "val/b", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        picture(32, 32).save(tmp_path / place / "1.png")
    class_folder = tmp_path / "val" / "a"
    (class_folder / "more").symlink_to(tmp_path / "elsewhere")
    (class_folder / "around").symlink_to(tmp_path / "val")
    (class_folder / "itself").symlink_to(class_folder)
    (class_folder / "z").mkdir()
    picture(32, 32).save(class_folder / "z" / "2.png")
    (class_folder / "a").symlink_to(class_folder / "z")  # the folder comes before its link
    found = image_files.folder(tmp_path / "val", (8, 8, 3), CROP)
    assert found.labels.tolist() == [0, 0, 0, 1]
    names = [str(path.relative_to(tmp_path / "val")) for path in found._sources]
    assert names == ["a/1.png", "a/more/1.png", "a/z/2.png", "b/1.png"]


def test_a_network_of_one_channel_reads_folders_in_grey(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    place = classes_of(tmp_path / "val", ["a"], lambda image, file: Image.fromarray(colours).save(file))
    (found,) = image_files.folder(place, (32, 32, 1), 1).read(np.arange(1))
    assert found.shape == (32, 32, 1)
    np.testing.assert_allclose(found[..., 0], colours @ [0.299, 0.587, 0.114], atol=1)


def test_images_that_have_the_networks_size_are_not_cropped_silently(tmp_path: Path) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    place = classes_of(tmp_path / "val", ["a", "b"], lambda image, file: small.save(file))
    with pytest.raises(UserError, match=r"have the network's size already, .*: set eval.crop to 1\."):
        image_files.folder(place, (32, 32, 3), CROP)
    (found, *_) = image_files.folder(place, (32, 32, 3), 1).read(np.arange(2))
    np.testing.assert_array_equal(found, np.asarray(small))
    small.resize((40, 32)).save(place / "b" / "wide.png")
    assert len(image_files.folder(place, (32, 32, 3), CROP).labels) == 3  # as ImageNet, in which some images are small


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".pgm"])
def test_sixteen_bits_a_pixel_become_eight_and_keep_their_values(tmp_path: Path, channels: int, suffix: str) -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    place = classes_of(tmp_path / "val", ["a"], lambda image, file: Image.fromarray(values).save(file.with_suffix(suffix)))
    (found,) = image_files.folder(place, (32, 32, channels), 1).read(np.arange(1))
    np.testing.assert_allclose(found, np.repeat((values / 257)[..., None], channels, -1), atol=1)


@pytest.mark.parametrize(
    ("mode", "words"), [("RGBA", "transparent in places"), ("LA", "transparent in places"), ("F", "32 bits per channel")]
)
def test_an_image_whose_pixels_are_not_clear_is_refused_by_name(tmp_path: Path, mode: str, words: str) -> None:
    image = Image.new(mode, (32, 32), 0 if mode == "F" else (7,) * len(mode))
    suffix = "tif" if mode == "F" else "png"
    place = classes_of(tmp_path / "val", ["a"], lambda _, file: image.save(file.with_suffix(f".{suffix}")))
    with pytest.raises(UserError, match=rf"a\.{suffix} .*{words}"):
        image_files.folder(place, (32, 32, 3), 1).read(np.arange(1))


def test_an_opaque_image_with_an_alpha_channel_is_read_as_it_is(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    opaque = np.concatenate([colours, np.full((32, 32, 1), 255, np.uint8)], -1)
    place = classes_of(tmp_path / "val", ["a"], lambda _, file: Image.fromarray(opaque).save(file))
    np.testing.assert_array_equal(image_files.folder(place, (32, 32, 3), 1).read(np.arange(1))[0], colours)


def test_of_a_very_long_image_no_more_is_resized_than_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: resized.append(size) or resize(self, size, *rest))
    strip = Image.fromarray(np.linspace(0, 255, 20_000).astype(np.uint8)[None].repeat(2, 0))
    found = image_files.centre_crop(strip, (224, 224), CROP)
    assert found.shape == (224, 224) and max(resized[0]) <= 256 * 33
    assert abs(int(found.mean()) - 127) <= 1  # the middle of the strip
