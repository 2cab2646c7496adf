"""Networks that cannot be quantized, each with the reason."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
from flax import nnx

from hast_jax.errors import InputError
from hast_jax.networks.from_nnx import REFUSED
from hast_jax.networks.graph import PRODUCTS, Graph
from hast_jax.networks.linear import name_of, place
from hast_jax.networks.matrices import SAME_NUMBERS, has_uniform_factors

Path = tuple[str, ...]

# Layers whose outputs are not products of input vectors with the columns of a kernel in `params`.
KINDS: dict[type, str] = {
    nn.MultiHeadDotProductAttention: REFUSED[nnx.MultiHeadAttention],
    nn.ConvLocal: "a kernel for every pixel is not quantized",
    nn.ConvTranspose: REFUSED[nnx.ConvTranspose],
    nn.Embed: REFUSED[nnx.Embed],
    nn.RNNCellBase: REFUSED[nnx.RNNCellBase],
    nn.WeightNorm: REFUSED[nnx.WeightNorm],
    nn.SpectralNorm: REFUSED[nnx.SpectralNorm],
}


# jaxlib 0.10.2 and later versions compute some sums by YNNPACK on a CPU, which gets a sum wrong if the summed numbers come from
# a product with an array of equal numbers (https://github.com/jax-ml/jax/issues/39103). This flag turns that off.
OWN_REDUCTIONS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


class Kernel(NamedTuple):
    """A kernel of a layer. layer: the layer's path. axes: as in `Layer`. calls: how often the layer is called.

    leaf: the kernel's shape and dtype. number: the number of the kernel's value in the trace. Both are None if `params` lack
    the kernel.
    """

    layer: Path
    axes: tuple[int, ...]
    calls: int
    leaf: Any
    number: int | None


def refuse_bridge(module: Any, inner: Any) -> None:
    """Refuse a `flax.nnx` module inside a Linen network."""
    if isinstance(inner, nnx.bridge.ToLinen):
        raise InputError(
            f"{name_of(module)} holds {place(inner)}, a flax.nnx module, whose layers cannot be found there: write the whole "
            "network in flax.linen, or in flax.nnx."
        )


def refuse_collections(module: nn.Module, collections: Mapping[str, Any]) -> None:
    """Refuse a network with a collection of a name that a student needs."""
    if "ranges" in collections:
        raise InputError(
            f"{name_of(module)} has a collection named ranges, which a student needs for its own: rename the collection."
        )


def refuse_kernel(module: nn.Module, traced: Graph, kernel: Kernel) -> None:
    """Refuse a kernel that a loop stacks, one from which the layer computes its weights, and one that is used elsewhere too.

    The products that read a kernel as it is must be as many as the calls of its layer.
    """
    layer = "/".join(kernel.layer)
    if kernel.leaf is None or kernel.leaf.ndim != len(kernel.axes) + 1:
        shape = None if kernel.leaf is None else kernel.leaf.shape
        raise InputError(f"{name_of(module)} has {layer} in a loop (nn.scan, nn.vmap; kernel {shape}): unroll it.")
    products = _products(traced, kernel.number)
    if products < kernel.calls:
        raise InputError(
            f"{name_of(module)} computes the weights of {layer} from its kernel (weight standardisation?): put the "
            "computed weights into the kernel of a plain layer."
        )
    if products > kernel.calls:
        raise InputError(f"{name_of(module)} uses the kernel of {layer} outside of this layer too: call the layer instead.")


def refuse_miscompiled(module: nn.Module, traced: Graph) -> None:
    """Refuse a network whose logits this version of jaxlib would silently compute wrong on a CPU."""
    if has_uniform_factors(traced) and jax.default_backend() == "cpu" and not _sums_are_right():
        raise InputError(
            f"{name_of(module)} multiplies activations with an array of equal numbers, which jaxlib {jaxlib.__version__} gets "
            f"wrong on a CPU: set the environment variable XLA_FLAGS={OWN_REDUCTIONS} before Python starts."
        )


@functools.cache
def _sums_are_right() -> bool:
    """Whether this process correctly sums the products with an array of equal numbers."""

    def total(x: jax.Array) -> jax.Array:
        return (x @ jnp.ones((12, 2), jnp.float32)).sum((1, 2))  # float32 [64, 2]

    found = jax.jit(total)(jnp.ones((64, 8, 8, 12), jnp.float32))
    return bool((found == 8 * 8 * 12).all())


def _products(traced: Graph, number: int | None) -> int:
    """How many products read the value of this number, or its numbers in another shape."""
    same, found = {number}, 0
    for operation in traced.operations:
        if same.intersection(operation.reads):
            found += operation.name in PRODUCTS
            if operation.name in SAME_NUMBERS:
                same.update(operation.makes)
    return found


def refuse_products_of_activations(module: nn.Module, traced: Graph) -> None:
    """Refuse products of activations with each other, such as attention's. The images are the last input of the trace."""
    activations = traced.descendants(traced.inputs[-1:])
    for operation in traced.operations:
        if operation.name in PRODUCTS and all(value in activations for value in operation.reads[:2]):
            raise InputError(
                f"{name_of(module)} multiplies activations with each other (attention?): only products of activations with "
                "weights are quantized, so a transformer cannot be quantized; write a pooling with computed weights as a "
                "multiplication and a sum."
            )
