"""The integers of a student in a safetensors file, which numpy alone can read (layout: docs/export.md)."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from hast_jax import __version__
from hast_jax.networks.flax_trees import COLLECTIONS, leaves
from hast_jax.networks.marks import activation_grid
from hast_jax.student import Student

FORMAT = 1
HEADER = "hast_jax"


def build(student: Student, *, packed: bool = False) -> bytes:
    """The content of the file.

    packed: each integer of a kernel of k bits takes k bits, because a channel spans at most 2^k integers. Otherwise a kernel is
    stored as int8, or as int32 if its integers do not fit.
    """
    codes = student.codes()
    arrays: dict[str, np.ndarray] = {}
    kernels: dict[str, Any] = {}
    for path, kernel in codes.items():
        integers, bits = kernel.integers, kernel["bits"]
        arrays[f"{path}/step"] = kernel.spread("step")
        kernels[path] = {"bits": bits, "shape": integers.shape, "packed": packed}
        if packed:
            lowest = kernel.spread("zero_point").astype(np.int32) - 2 ** (bits - 1)
            arrays[f"{path}/lowest"] = lowest
            arrays[path] = pack(integers - lowest, bits)
        else:
            fits = np.abs(integers).max() <= 127
            arrays[path] = integers.astype(np.int8 if fits else np.int32)
    others = {name: tree for name, tree in student.variables.items() if name != "ranges"}
    for (collection, *names), leaf in leaves(others).items():
        name = "/".join(names)
        if collection == "params" and name in codes:
            continue
        if collection not in COLLECTIONS or name in arrays:
            name = f"{collection}/{name}"
        narrow = leaf.dtype == jnp.bfloat16  # a type that numpy alone does not have
        arrays[name] = np.asarray(leaf, np.float32) if narrow else np.asarray(leaf)
    header = {
        "format": FORMAT,
        "hast_jax": __version__,
        "network": student.record.get("network"),
        "classes": student.network.classes,
        "image": student.image,
        "mean": student.mean,
        "std": student.std,
        "kernels": kernels,
        "activations": _activations(student),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(arrays, {HEADER: json.dumps(header)})


def kernel(content: bytes, path: str) -> np.ndarray:
    """The float32 values of the kernel `path`, computed from the content of a file as its readers do."""
    arrays = safetensors.numpy.load(content)
    length = int.from_bytes(content[:8], "little")
    said = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])["kernels"][path]
    integers = arrays[path]
    if said["packed"]:
        integers = unpack(integers, said["bits"], said["shape"]) + arrays[f"{path}/lowest"]
    return integers.astype(np.float32) * arrays[f"{path}/step"]


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Pack whole numbers from 0 to 2^bits - 1, in C order, into uint8: `bits` bits each, the lowest bit first."""
    each = (numbers.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(each.astype(np.uint8).ravel(), bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers that `pack` packed, as int64 of this shape."""
    each = np.unpackbits(packed, count=bits * int(np.prod(shape)), bitorder="little").reshape(-1, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(1).reshape(shape)


def _activations(student: Student) -> dict[str, Any]:
    """The grid of each quantized activation: its step, its smallest integer and its bits."""
    ranges = flatten_dict(student.variables["ranges"])
    found = {}
    for site in student.network.sites.values():
        step, lowest = activation_grid(student.network, ranges[*site.name, "low"], ranges[*site.name, "high"], site.bits)
        found["/".join(site.name)] = {"step": step, "lowest": lowest, "bits": site.bits}
    return found
