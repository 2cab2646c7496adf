"""Odd configs, weight files, image folders and synthetic sets end in success or in one sentence, before any stage begins.

Each case is one that a person could meet: a file of another tool, a damaged download, a value mistyped. `python -m pytest
-m slow tests/test_fuzz.py` tries 1,200 of them.
"""

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import serialization
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from hast_jax import config as config_lib
from hast_jax import fields, from_config, pipeline
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.networks import weights
from hast_jax.runs import run_folder, synthetic_set
from hast_jax.runs.progress import silent

MOST_MEMORY = 2**31  # bytes that all cases of a test may add
STATE, _ = weights.read(weights.locate("digits"))
NAMES = sorted(STATE)
tiny.config()  # it imports other tests, which must not happen within one of these

pytestmark = pytest.mark.slow


def many(count):
    return settings(
        max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    )


@pytest.fixture(autouse=True)
def memory():
    with tiny.Memory() as found:
        yield
    assert found.most < MOST_MEMORY


def one_sentence_or(attempt: Callable[[], Any]) -> Any:
    """What `attempt` returns; None where it is refused, as a person should be told."""
    try:
        found = attempt()
        event("success")
        return found
    except UserError as error:
        event(re.sub(r"[^a-z ]+", "*", str(error)[:60]))
        words = str(error)
        assert words and "\n" not in words and "Traceback" not in words and len(words) < 3000, words
        return None


def prepare(config) -> None:
    """What a run does before its first stage."""
    with tempfile.TemporaryDirectory() as place:
        pipeline._prepare(config, Path(place) / "run", silent, None)
        run_folder.release(Path(place) / "run")


# --- Configs ---

TEXTS = [
    "",
    "x",
    "none",
    "digits",
    "w3a3",
    "~",
    "a.py:B",
    "gs://b/c",
    "\n",
    "[",
    "{}",
    "((((",
    "conv=w2",
    "é" * 300,
    "/dev/null",
]
OF_KIND: dict[type, st.SearchStrategy] = {
    bool: st.booleans(),
    int: st.one_of(st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**31, 2**32, 10**12])),
    float: st.one_of(st.floats(0, 1), st.floats(0, allow_infinity=False), st.sampled_from([1e-45, 1e-30, 1e38, 1e300, -1.0])),
    tuple: st.one_of(st.lists(st.integers(-1, 64), max_size=4), st.lists(st.floats(0, 300), max_size=4)).map(tuple),
}
OF_ANY = st.one_of(st.sampled_from([None, True, "x", [], {}]), st.floats(), st.integers(), st.text(max_size=12))


@st.composite
def changes_of_a_config(draw) -> dict[str, Any]:
    """Mostly of the right kind, as those of another kind are refused one by one (test_config.py)."""
    found = {}
    for path in draw(st.lists(st.sampled_from(list(fields.FIELDS)), min_size=1, max_size=3, unique=True)):
        field = fields.FIELDS[path]
        of_kind = OF_KIND.get(type(field.default)) or st.sampled_from([*field.choices, *TEXTS])
        found[path] = draw(st.one_of(of_kind, of_kind, of_kind, OF_ANY))
    return found


@many(450)
@given(changes_of_a_config())
def test_an_odd_config_ends_in_one_sentence_at_worst(changes: dict[str, Any]) -> None:
    def attempt() -> None:
        config = tiny.config()
        config.update_from_flattened_dict(changes)
        config_lib.validate(config)
        if config.devices > 4 or config.synthesis.images > 10**5:
            return  # it is right, and more than this machine should try
        prepare(config)

    one_sentence_or(attempt)


# --- Weight files ---


def npz(state: dict) -> bytes:
    file = io.BytesIO()
    np.savez(file, **state)
    return file.getvalue()


CONTAINERS: dict[str, Callable[[dict], bytes]] = {
    ".safetensors": safetensors.numpy.save,
    ".npz": npz,
    ".msgpack": lambda state: serialization.msgpack_serialize(dict(state)),
}
NUMBERS = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 3e38, -3e38, 1e-45])


@st.composite
def weight_files(draw) -> tuple[str, bytes]:
    state = {name: np.array(array) for name, array in STATE.items()}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)):
        kind, array = draw(st.sampled_from(["value", "values", "shape", "dtype", "gone", "renamed", "extra"])), state.pop(name)
        if kind == "value":
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(NUMBERS)
        elif kind == "values":
            array = np.full_like(array, draw(NUMBERS))
        elif kind == "shape":
            array = draw(
                st.sampled_from([array.T, array[..., :1], array[None], array.reshape(-1), np.zeros((0, 3), np.float32)])
            )
        elif kind == "dtype":
            with np.errstate(all="ignore"):
                array = array.astype(draw(st.sampled_from([np.float16, np.float64, np.int8, np.int64, np.bool_, np.uint16])))
        elif kind == "extra":
            state[draw(st.text(max_size=20))] = np.ones(3, np.float32)
        if kind == "renamed":
            name = draw(st.sampled_from(["module.", "x", "../", "é"])) + name
        if kind != "gone":
            state[name] = np.ascontiguousarray(array)
    prefix = draw(st.sampled_from(["", "", "module.", "model.net."]))
    state = {prefix + name: array for name, array in state.items()}
    suffix = draw(st.sampled_from(list(CONTAINERS)))
    content = CONTAINERS[draw(st.sampled_from([suffix, suffix, suffix, *CONTAINERS]))](state)
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "byte"]))
    place = draw(st.integers(0, len(content) - 1))
    if damage == "cut":
        content = content[:place]
    elif damage == "byte":
        content = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
    return suffix, content


@many(350)
@given(weight_files())
def test_an_odd_weight_file_ends_in_one_sentence_at_worst(file: tuple[str, bytes]) -> None:
    suffix, content = file
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"weights{suffix}"
        path.write_bytes(content)
        config = tiny.config(teacher__weights=str(path), eval__dataset="none")

        def attempt() -> None:
            prepare(config)
            _, variables = from_config.teacher(config)
            assert all(np.isfinite(leaf).all() for leaf in _leaves(variables))

        one_sentence_or(attempt)


def _leaves(tree: Any) -> list[np.ndarray]:
    return [leaf for each in tree.values() for leaf in _leaves(each)] if isinstance(tree, dict) else [np.asarray(tree)]


# --- Image folders ---

FOLDERS = st.one_of(st.sampled_from(["a", "b", "0", "1", "2", "10", "007", ".hidden", "a b", "é"]), st.integers(0, 12).map(str))
MODES = st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
SIDES = st.sampled_from([1, 2, 7, 16, 33, 2000])


@st.composite
def image_files(draw) -> list[tuple[str, bytes]]:
    files = []
    for folder in draw(st.lists(FOLDERS, max_size=5, unique=True)):
        for i in range(draw(st.integers(0, 2))):
            suffix = draw(st.sampled_from([".png", ".jpg", ".JPEG", ".tif", ".bmp", ".webp", ".txt", ".ppm"]))
            size, mode = (draw(SIDES), draw(SIDES)), draw(MODES)
            file = io.BytesIO()
            try:
                Image.new(mode, size, 5).save(
                    file, {"jpg": "JPEG", "tif": "TIFF", "txt": "PNG"}.get(suffix[1:], suffix[1:].upper())
                )
            except (OSError, KeyError, ValueError):  # no such file holds this mode
                file = io.BytesIO(b"no image")
            content = file.getvalue()
            if draw(st.sampled_from([True] + [False] * 5)):
                content = content[: draw(st.integers(0, len(content)))]
            files.append((f"{folder}/{draw(st.sampled_from(['', '._', 'x ']))}{i}{suffix}", content))
    return files


@many(250)
@given(image_files(), st.sampled_from([1, 3]), st.sampled_from(["", "name", "number"]))
def test_an_odd_folder_of_images_ends_in_one_sentence_at_worst(
    files: list[tuple[str, bytes]], channels: int, order: str
) -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, content in files:
            path = Path(place) / "val" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        config = tiny.config(eval__dataset="folder", eval__data_dir=place, eval__split="val", eval__class_order=order)
        config.teacher.image, config.teacher.mean, config.teacher.std = (8, 8, channels), (0.5,) * channels, (0.5,) * channels
        config.teacher.classes = max(1, len({name.split("/")[0] for name, _ in files if not name.startswith(".")}))

        def attempt() -> None:
            dataset = datasets.load(config, "val")
            images = dataset.read(np.arange(len(dataset.labels)))
            assert images.shape == (len(dataset.labels), 8, 8, channels) and images.dtype == np.uint8
            assert dataset.labels.min() >= 0 and dataset.labels.max() < config.teacher.classes

        one_sentence_or(attempt)


# --- Synthetic sets from elsewhere ---


@many(150)
@given(
    st.sampled_from([*[(64, 8, 8, 1)] * 5, (64, 1, 8, 8), (0, 8, 8, 1), (3, 8, 8, 1), (64, 64), ()]),
    st.sampled_from([*[np.float32] * 5, np.float64, np.float16, np.uint8, np.complex64, object]),
    st.sampled_from([0.0, 0.0, np.nan, np.inf, 1e30]),
    st.sampled_from([*[(64,)] * 4, (3,), (64, 10), ()]),
    st.sampled_from([*[np.int32] * 3, np.int64, np.uint8, np.float32, np.bool_]),
    st.sampled_from([0, 9, 9, 10, -1, 200]),
    st.sampled_from(
        [None, None, None, "{", "[]", '{"batch": 0, "done": {}}', '{"batch": 32, "done": {"0": 1, "1": 2}}', '{"batch": "x"}']
    ),
    st.one_of(st.just(-1), st.just(-1), st.integers(0, 300)),
)
def test_an_odd_synthetic_set_ends_in_one_sentence_at_worst(
    shape, dtype, value, of_labels, label_dtype, label, index, cut
) -> None:
    with tempfile.TemporaryDirectory() as place, np.errstate(all="ignore"):
        images = np.zeros(shape, dtype)
        if images.size and dtype is not object:
            images.reshape(-1)[-1] = value if np.issubdtype(dtype, np.inexact) else 1
        labels = np.zeros(of_labels, label_dtype)
        if labels.size:
            labels.reshape(-1)[-1] = np.asarray(label).astype(label_dtype)
        np.save(Path(place) / "images.npy", images, allow_pickle=True)
        np.save(Path(place) / "labels.npy", labels)
        if cut >= 0:
            path = Path(place) / "images.npy"
            path.write_bytes(path.read_bytes()[:cut])
        if index is not None:
            (Path(place) / "index.json").write_text(index)
        found = one_sentence_or(lambda: synthetic_set.load(Path(place), (8, 8, 1), 10))
        if found is not None:
            assert np.isfinite(found[0]).all() and found[1].min(initial=0) >= 0 and found[1].max(initial=0) < 10

        def prepared():
            return prepare(tiny.config(synthesis__source=place, synthesis__images=64, eval__dataset="none"))

        one_sentence_or(prepared)
