"""A student as a LiteRT (TensorFlow Lite) model: a StableHLO program with marks of quantization, converted without TensorFlow.

The converter's Python interface is not documented: its version is pinned, and the file is run after it is made.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver.measure import fake_quantized
from hast_jax.errors import UserError
from hast_jax.networks.marks import activation_grid
from hast_jax.networks.sites import Site
from hast_jax.student import Student

Array = jax.Array

LOW, HIGH = -128, 127  # of int8
COMPOSITE = "quant.fake_quant"


def build(student: Student, *, normalised: bool = False) -> bytes:
    """The model for one image float32 [1, height, width, channels]: pixels of 0 ... 255, or `normalised` already.

    Raises UserError where the converter cannot carry the network.
    """
    codes = student.codes()
    traced = jax.jit(lambda images: _logits(student, codes, images, normalised))
    program = traced.lower(jax.ShapeDtypeStruct((1, *student.image), jnp.float32))
    try:
        return _converted(program.as_text())
    except Exception as error:  # whatever the converter raises
        words = str(error).strip().split("\n")[0]
        raise UserError(
            f"the converter of LiteRT cannot carry this network ({type(error).__name__}: {words}): choose the format onnx."
        ) from error


class Interpreter:
    """A model of LiteRT, on one thread."""

    def __init__(self, content: bytes):
        from ai_edge_litert import interpreter

        self._interpreter = interpreter.Interpreter(model_content=content, num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of images, one after the other."""
        found = []
        for image in images:
            self._interpreter.set_tensor(self._input, image[None])
            self._interpreter.invoke()
            found.append(self._interpreter.get_tensor(self._output)[0])
        return np.stack(found)

    def operators(self) -> tuple[tuple[str, str, int], ...]:
        """(type, "integer", "between" or "float", number) of its operators."""
        kind = lambda tensor: np.dtype(self._interpreter._get_tensor_details(int(tensor), 0)["dtype"]).kind
        counted: Counter[tuple[str, str]] = Counter()
        for each in self._interpreter._get_ops_details():
            if each["op_name"] != "DELEGATE":  # stands for operators that are listed too
                ends = {kind(each[side][0]) in "iu" for side in ("inputs", "outputs")}
                counted[each["op_name"], "between" if len(ends) == 2 else "integer" if ends == {True} else "float"] += 1
        return tuple((name, kind, number) for (name, kind), number in sorted(counted.items(), key=lambda item: -item[1]))


def _logits(student: Student, kernels: Mapping[str, networks.Codes], images: Array, normalised: bool) -> Array:
    """The student with a composite wherever something is quantized."""

    def quantize(x: Array, low: Array, high: Array, site: Site) -> Array:
        step, lowest = activation_grid(student.network, low, high, site.bits)
        highest = lowest + 2**site.bits - 1
        zero_point = 0 if lowest >= LOW and highest <= HIGH else LOW - lowest
        if not LOW <= zero_point <= HIGH:  # far from zero: no int8 holds it
            return fake_quantized(student.network, x, low, high, site.bits)
        x = jnp.clip(x, np.float32(lowest * step), np.float32(highest * step))
        return _marked(x, np.asarray([step]), zero_point)

    network = dataclasses.replace(student.network, kernels={}, fast_convolution=False, quantize_activation=quantize)
    params = flatten_dict(student.variables["params"])
    for path, codes in kernels.items():
        values = jnp.asarray(codes.integers.astype(np.float32) * codes.spread("step"))
        channel = next(axis for axis in range(values.ndim) if axis not in codes["axes"])
        fits = np.abs(codes.integers).max() <= HIGH
        params[tuple(path.split("/"))] = _marked(values, codes.step, 0, channel) if fits else values
    images = images if normalised else normalise(images, student.mean, student.std)
    return networks.apply(network, {**student.variables, "params": unflatten_dict(params)}, images)[0]


def _marked(x: Array, steps: np.ndarray, zero_point: int, axis: int | None = None) -> Array:
    """`x` as int8 with these steps, one for each place on `axis`, in the words that the converter knows."""
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
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(program)
        config = converter.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        # Any other mode rounds biases to integers, which changes the student.
        config.qdq_conversion_mode = "NONE"
        config.strict_qdq_mode = True
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        return bytes(converter.export_flatbuffer_to_bytes(module.operation))
