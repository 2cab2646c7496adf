"""Golden values: computed with the authors' PyTorch code, read from a folder of `.npz` files (see tests/golden/README.md).

How closely they must be met is read from the same files. `noise/KEY` there says how far the stored float32 run of the authors'
code is from another float32 run of it and from a float64 run; a correct implementation stays within a few times that. In
double precision ours must in fact be their float64 run, whose distance from the stored values is the noise itself. In float32
single ReLUs and codes fall on the other side and change all of an image: there most images have to agree, not each.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import networks
from hast_jax.method import quantizer
from hast_jax.networks import rules, weights
from hast_jax.stages import calibrate

IMAGES = {"resnet20": (32, 32, 3), "resnet18": (224, 224, 3)}
FEW = 4.0  # "a correct implementation stays within a few times" the noise
ROUNDING = 1e-6  # what is left of float32 over a network, where two runs happen to agree better than that
MOST_AT_A_FLIP = 5e-2  # of one image, where the file does not say
NO_FLIP = 1e-3


class Golden:
    """One file: `file["key"]`, `"key" in file`, `file.under("act/b3")`."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self._arrays = dict(file)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def need(self, key: str) -> None:
        """Skip the test where the file does not hold `key`, or nothing under it."""
        if key not in self and not self.under(key):
            pytest.skip(f"the file holds no {key}")

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose key begins with `prefix/`, by the rest of the key."""
        return {k[len(prefix) + 1 :]: v for k, v in self._arrays.items() if k.startswith(prefix + "/")}

    def groups(self, pattern: str) -> list[str]:
        """The distinct matches of `pattern` at the start of keys, sorted. Skips the test if there are none."""
        found = sorted({m.group() for m in (re.match(pattern, key) for key in self._arrays) if m})
        if not found:
            pytest.skip(f"the file holds nothing that matches {pattern}")
        return found

    def noise(self, key: str) -> np.ndarray | None:
        """What the file says of how far to trust its float32 value of `key`; None where it says nothing."""
        return self._arrays.get(f"noise/{key}")


def files(folder: str, kind: str) -> list[Path]:
    """Files of a kind in the folder, with or without `heldout_` before its name."""
    return sorted(p for p in Path(folder).glob("*.npz") if re.fullmatch(rf"(heldout_)?{kind}", p.stem))


# --- Networks: the only place where the golden tests make or apply one. ---


def teacher_of(name: str, classes: int) -> Any:
    """The full-precision network."""
    return networks.create(networks.module(name, classes), IMAGES[name])


def student_of(name: str, classes: int, bits: tuple[int, int]) -> Any:
    """The same network with weights and activations of so many bits."""
    return networks.create(networks.module(name, classes), IMAGES[name], rules=rules.normalise(bits))


def forward(network: Any, variables: weights.Variables, images: jax.Array) -> tuple[jax.Array, networks.Taps]:
    """Logits and taps; of a student, `variables` hold the fixed `ranges`."""
    return networks.apply(network, variables, images)


def observed_ranges(student: Any, variables: weights.Variables, images: jax.Array) -> weights.Variables:
    """The `ranges` that calibration on this one batch gives."""
    return calibrate.step(student, variables, {}, images)


def next_range(low: jax.Array, high: jax.Array, extremes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The range of one activation after calibration has seen a batch with these extremes, which are not negative."""
    return quantizer.running_range((low, high), extremes)


def activation_path(name: str) -> tuple[str, ...]:
    """Where the activation that the authors call e.g. `features.stage1.unit2.body.conv1.activ` is in a student."""
    parts = name.removeprefix("features.").split(".")
    return ("init_activ",) if parts[0] == "init_block" else ("_".join(parts[:2]), "activ1" if "body" in parts else "activ")


def ranges_of(names: Sequence[str], lows: Sequence[float], highs: Sequence[float], dtype: Any) -> weights.Variables:
    """Stored ranges as a `ranges` collection, by the authors' names of the activations."""
    flat = {}
    for name, low, high in zip(names, lows, highs, strict=True):
        path = activation_path(str(name))
        flat[(*path, "low")], flat[(*path, "high")] = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    return unflatten_dict(flat)


def limits_of(ranges: weights.Variables, name: str) -> tuple[jax.Array, jax.Array]:
    """Low and high of the activation that the authors call so: the inverse of `ranges_of`."""
    flat, path = flatten_dict(ranges), activation_path(name)
    return flat[(*path, "low")], flat[(*path, "high")]


def activations(student: Any, variables: weights.Variables, images: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """The quantized outputs of the activations that the authors call so."""
    _, taps = forward(student, variables, images)
    return {name: taps.activations[activation_path(name)] for name in names}


def state_dict(network: Any, variables: weights.Variables) -> weights.StateDict:
    """Variables by pytorchcv's names, in PyTorch's layout."""
    return weights.to_state_dict(network.module, variables)


def recipe_weights(network: Any, seed: int, head_scale: float = 1.0, dtype: Any = np.float32) -> weights.Variables:
    """Variables filled by the recipe of tests/golden/README.md: each tensor from the seed and its name alone."""
    module = network.module
    abstract = flatten_dict(weights.abstract_variables(module))
    state = {}
    for name, path in weights.name_map(module).items():
        shape = weights.to_torch_layout(np.empty(abstract[path].shape, np.bool_)).shape
        state[name] = _recipe_tensor(name, shape, seed)
        if name.startswith("output."):
            state[name] = state[name] * np.float32(head_scale)
    return weights.from_state_dict(module, {name: array.astype(dtype) for name, array in state.items()})


def _recipe_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    *_, block, leaf = name.split(".")
    if leaf == "running_mean":
        array = 0.1 * rng.standard_normal(shape)
    elif leaf == "running_var":
        array = rng.uniform(0.5, 1.5, shape)
    elif block == "bn":
        array = rng.uniform(0.5, 1.5, shape) if leaf == "weight" else 0.1 * rng.standard_normal(shape)
    elif leaf == "weight":
        array = np.sqrt(2 / np.prod(shape[1:])) * rng.standard_normal(shape)
    else:
        array = 0.01 * rng.standard_normal(shape)
    return array.astype(np.float32)


def nhwc(array: np.ndarray) -> jax.Array:
    """Images or features [.., channels, height, width] -> [.., height, width, channels]."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def nchw(array: jax.Array) -> np.ndarray:
    """The inverse of `nhwc`."""
    return np.moveaxis(np.asarray(array), -1, -3)


# --- Comparisons ---


def assert_agrees(golden: Golden, key: str, actual: Any, otherwise: float = 1e-5) -> None:
    """An array, or all that are stored under `key`, agrees: its largest and its mean distance are within FEW times the noise.

    actual: an array, or {the rest of the key: array}, of which the file may hold a part though its noise is that of all.
    otherwise: relative to the largest value, where the file says nothing.
    """
    part = 1.0
    if isinstance(actual, Mapping):
        stored = golden.under(key)
        part = sum(array.size for array in stored.values()) / sum(np.size(array) for array in actual.values())
        actual = np.concatenate([np.ravel(actual[name]) for name in stored])
        expected = np.concatenate([array.ravel() for array in stored.values()])
    else:
        expected = golden[key]
    assert np.shape(actual) == np.shape(expected)
    size, distance = np.abs(expected.astype(np.float64)), np.abs(np.asarray(actual, np.float64) - expected)
    noise = golden.noise(key)
    if noise is None:
        assert distance.max() <= otherwise * size.max(), (key, distance.max(), size.max())
        return
    if not np.isfinite(noise).all():
        return  # a run of the authors' code diverged: it says nothing of what is right
    _, most_b, mean_b, most_c, mean_c = noise
    most, mean = FEW * max(most_b, most_c), FEW * max(mean_b, mean_c)
    assert distance.max() <= most + ROUNDING * size.max(), (key, distance.max(), most)
    assert part * distance.mean() <= mean + ROUNDING * size.mean(), (key, part * distance.mean(), mean)


def relative_noise(golden: Golden, key: str) -> np.ndarray:
    """The larger one of the relative differences of two other runs from the stored one, for each step that it is known for.

    Zero for the first step alone, where the file says nothing.
    """
    noise = golden.noise(f"{key}_rel")
    return np.zeros(1) if noise is None else noise.max(0)


def per_image(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Relative L2 distance of each row."""
    a, b = np.asarray(a, np.float64).reshape(len(a), -1), np.asarray(b, np.float64).reshape(len(b), -1)
    return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)


def assert_each_image_agrees(golden: Golden, key: str, actual: np.ndarray) -> None:
    """In double precision: no image is further from the stored float32 run than FEW times what the file says of it.

    Where it says nothing: one in a thousand, but five in a hundred for two images, in which a ReLU or a code may have flipped.
    """
    distances, noise = per_image(actual, golden[key]), golden.noise(f"{key}_per_image")
    if noise is None:
        distances = np.sort(distances)
        assert (distances <= MOST_AT_A_FLIP).all() and (distances[:-2] <= NO_FLIP).all(), (key, distances)
    else:
        assert (distances <= FEW * noise.max(0) + ROUNDING).all(), (key, distances, noise)


def assert_most_images_agree(golden: Golden, key: str, actual: np.ndarray) -> None:
    """In float32: at least half of the images agree as closely as any two float32 runs in which nothing has flipped.

    How many have a flip, and how much it changes them, differs from one order of summation to the other, and with two bits a
    flip is large. What is wrong for all images shows in those without one; assert_each_image_agrees looks at the others.
    """
    assert np.isfinite(actual).all(), key
    noise = golden.noise(f"{key}_per_image")
    allowed = NO_FLIP if noise is None else np.maximum(NO_FLIP, FEW * noise.max(0))
    distances = per_image(actual, golden[key])
    assert np.mean(distances <= allowed) >= 0.5, (key, distances)


def on_edge(x: Any, scale: Any, zero_point: Any) -> np.ndarray:
    """Where S * x - Z lies between two codes as far as float32 can tell: each of its terms is known to some last places."""
    scaled, zero_point = np.asarray(scale, np.float64) * np.asarray(x, np.float64), np.asarray(zero_point, np.float64)
    position = scaled - zero_point
    return np.abs(position - np.floor(position) - 0.5) <= 2.0**-22 * (np.abs(scaled) + np.abs(zero_point))


def assert_codes_agree(actual: Any, expected: np.ndarray, edge: np.ndarray) -> None:
    """Codes are equal, but for values on a rounding edge, which may be one apart."""
    distance = np.abs(np.asarray(actual, np.float64) - expected)
    assert (distance <= edge).all(), (distance[distance > edge], np.mean(edge))
