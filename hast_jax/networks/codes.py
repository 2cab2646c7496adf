"""Quantized kernels as whole numbers."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from hast_jax.method import learned, quantizer
from hast_jax.networks.network import ENDS, Network, Variables


class Codes(dict[str, Any]):
    """The integer form of one kernel: `codes` (int8), with the `scale` S and the `zero_point` Z of each output channel.

    The weights are (codes + Z) / S. `bits`: the number k of bits. `axes`: those axes of the kernel that one output channel sums
    over.
    """

    @property
    def integers(self) -> np.ndarray:
        """codes + Z: int64, in the shape of the kernel; within -127 ... 127 if ranges are learned."""
        return self["codes"].astype(np.int64) + self.spread("zero_point").astype(np.int64)

    @property
    def step(self) -> np.ndarray:
        """1 / S, float32, one for each output channel: a weight is an integer times its step."""
        return (1 / self["scale"].astype(np.float64)).astype(np.float32)

    def spread(self, name: str) -> np.ndarray:
        """`scale`, `step` or `zero_point` as an array that broadcasts against the kernel."""
        shape = [1 if axis in self["axes"] else size for axis, size in enumerate(self["codes"].shape)]
        return (self.step if name == "step" else self[name]).reshape(shape)


def kernel_codes(network: Network, params: Variables, ranges: Variables) -> dict[str, Codes]:
    """The integer form of each quantized kernel, by its path. params, ranges: the student's."""
    flat, limits, found = flatten_dict(params), flatten_dict(ranges), {}
    for layer, bits in network.kernels.items():
        kernel = flat[layer.kernel]
        if network.learned_ranges:
            low, high = (limits[*layer.kernel, end] for end in ENDS)
            codes, scale, zero_point = _learned_codes(kernel, low, high, bits)
        else:
            codes, scale, zero_point = _codes(kernel, bits, layer.axes)
        found["/".join(layer.kernel)] = Codes(
            codes=np.asarray(codes, np.int8),
            scale=np.asarray(scale).ravel(),
            zero_point=np.asarray(zero_point).ravel(),
            bits=bits,
            axes=layer.axes,
        )
    return found


@partial(jax.jit, static_argnums=(1, 2))
def _codes(kernel: jax.Array, bits: int, axes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    scale, zero_point = quantizer.scale_and_zero_point(*quantizer.kernel_range(kernel, axes), bits)
    return quantizer.quantize(kernel, scale, zero_point, bits), scale, zero_point


def _learned_codes(kernel: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> tuple[Any, Any, Any]:
    integers, step, z = map(np.asarray, _learned_grid(kernel, low, high, bits))
    largest = np.abs(integers).max()
    assert largest <= learned.LARGEST_INTEGER, largest
    zero_point = z + 2 ** (bits - 1)
    # S is in double precision, so that 1 / S gives back the float32 step exactly.
    return integers - zero_point, 1 / step.astype(np.float64), zero_point


@partial(jax.jit, static_argnums=3)
def _learned_grid(kernel: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The integers of a kernel, and the step and the smallest integer of each output channel."""
    return (learned.integers(kernel, low, high, bits, learned.LARGEST_INTEGER), *learned.grid(low, high, bits))
