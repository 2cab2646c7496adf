"""Golden values: computed with the authors' PyTorch code, read from a folder of `.npz` files (see tests/golden/README.md)."""

import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hast_jax.networks import ResNet, weights


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
        """The distinct matches of `pattern` at the start of keys, sorted."""
        return sorted({m.group() for m in (re.match(pattern, key) for key in self._arrays) if m})


def files(folder: str, kind: str) -> list[Path]:
    """Files of a kind in the folder, with or without `heldout_` before its name."""
    return sorted(p for p in Path(folder).glob("*.npz") if re.fullmatch(rf"(heldout_)?{kind}", p.stem))


def recipe_weights(model: ResNet, seed: int, head_scale: float = 1.0, dtype=np.float32) -> weights.Variables:
    """Variables filled by the recipe of tests/golden/README.md: each tensor from the seed and its name alone."""
    abstract = flatten_dict(weights.abstract_variables(model))
    state = {}
    for name, path in weights.name_map(model).items():
        shape = weights.to_torch_layout(np.empty(abstract[path].shape, np.bool_)).shape
        state[name] = _recipe_tensor(name, shape, seed)
        if name.startswith("output."):
            state[name] = state[name] * np.float32(head_scale)
    return weights.from_state_dict(model, {name: array.astype(dtype) for name, array in state.items()})


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


def per_image(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Relative L2 distance of each row."""
    a, b = np.asarray(a, np.float64).reshape(len(a), -1), np.asarray(b, np.float64).reshape(len(b), -1)
    return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)


def assert_close_per_image(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-3, loose: float = 5e-2) -> None:
    """Relative L2 below `tolerance` for each image, but `loose` for at most two of them: ReLU and rounding may flip."""
    distances = np.sort(per_image(actual, expected))
    assert (distances <= loose).all(), distances
    assert (distances[: len(distances) - 2] <= tolerance).all(), distances
