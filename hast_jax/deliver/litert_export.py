"""A student as a LiteRT (TensorFlow Lite) model: a StableHLO program with marks of quantization, converted without TensorFlow.

The converter's Python interface is not documented. Its version is therefore pinned, and each model is run after it is made.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver import litert_process
from hast_jax.deliver.measure import fake_quantized
from hast_jax.errors import UserError
from hast_jax.networks.marks import activation_grid
from hast_jax.networks.sites import Site
from hast_jax.student import Student

Array = jax.Array

LOW, HIGH = -128, 127  # of int8
COMPOSITE = "quant.fake_quant"


def build(student: Student, *, normalised: bool = False) -> bytes:
    """The model, which takes one image float32 [1, height, width, channels]: pixels of 0 ... 255, or a normalised image.

    Raises UserError if LiteRT cannot convert the network.
    """
    codes = student.codes()
    traced = jax.jit(lambda images: _logits(student, codes, images, normalised))
    program = traced.lower(jax.ShapeDtypeStruct((1, *student.image), jnp.float32))
    return _converted(program.as_text())


class Found(NamedTuple):
    """Logits and operators of the first model, and the milliseconds of each model for one image."""

    logits: np.ndarray
    operators: tuple[tuple[str, str, int], ...]
    milliseconds: list[float]


def run(images: np.ndarray, *models: bytes) -> Found:
    """Run models on images float32 [n, height, width, channels], one image at a time. Raises UserError if LiteRT fails."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.tflite" for i in range(len(models))]
        for path, model in zip(paths, models):
            path.write_bytes(model)
        np.save(f"{folder}/images.npy", images)
        _call("run", f"{folder}/images.npy", folder, *map(str, paths))
        said = json.loads(Path(folder, "found.json").read_text())
        operators = tuple((name, kind, number) for name, kind, number in said["operators"])
        return Found(np.load(f"{folder}/logits.npy"), operators, said["milliseconds"])


def _logits(student: Student, kernels: Mapping[str, networks.Codes], images: Array, normalised: bool) -> Array:
    """The student's logits, with a composite wherever a value is quantized."""

    def quantize(x: Array, low: Array, high: Array, site: Site) -> Array:
        step, lowest = activation_grid(student.network, low, high, site.bits)
        highest = lowest + 2**site.bits - 1
        zero_point = 0 if lowest >= LOW and highest <= HIGH else LOW - lowest
        if not LOW <= zero_point <= HIGH:  # a range far from zero: its integers do not fit into int8
            return fake_quantized(student.network, x, low, high, site.bits)
        x = jnp.clip(x, np.float32(lowest * step), np.float32(highest * step))
        return _marked(x, np.asarray([step]), zero_point)

    network = dataclasses.replace(student.network, kernels={}, fast_convolution=False, quantize_activation=quantize)
    params = flatten_dict(student.variables["params"])
    paths = {"/".join(path): path for path in params}
    for path, codes in kernels.items():
        values = jnp.asarray(codes.integers.astype(np.float32) * codes.spread("step"))
        channel = next(axis for axis in range(values.ndim) if axis not in codes["axes"])
        fits = np.abs(codes.integers).max() <= HIGH
        params[paths[path]] = _marked(values, codes.step, 0, channel) if fits else values
    images = images if normalised else normalise(images, student.mean, student.std)
    return networks.logits(network, {**student.variables, "params": unflatten_dict(params)}, images)


def _marked(x: Array, steps: np.ndarray, zero_point: int, axis: int | None = None) -> Array:
    """`x` marked as int8 by a composite that the converter knows. steps: one for each index on `axis`, or a single one."""
    attributes: dict[str, Any] = {
        "scale": steps.astype(np.float64),
        "zero_point": np.full(len(steps), zero_point, np.int64),
        "dtype": "i8",
        "narrow_range": False,
    }
    if axis is not None:
        attributes["quantization_dimension"] = np.int32(axis)
    return jax.lax.composite(lambda x, **_: x, COMPOSITE)(x, **attributes)


def _converted(program: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.mlir").write_text(program)
        _call("convert", f"{folder}/program.mlir", f"{folder}/model.tflite")
        return Path(folder, "model.tflite").read_bytes()


def _call(*arguments: str) -> None:
    command = [sys.executable, "-m", litert_process.__name__, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        words = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise UserError(f"LiteRT cannot convert or run this network ({words}): choose the format onnx.")
