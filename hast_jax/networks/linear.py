"""Layers that multiply vectors by a kernel: the axes of the kernel that one output channel sums over."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from hast_jax.errors import InputError
from hast_jax.networks.from_nnx import FromNnx

LINEAR = (nn.Conv, nn.Dense, nn.DenseGeneral, nn.Einsum)


def summed_axes(module: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, ...]:
    """Axes of the kernel that one output channel sums over. Raises UserError if the layer is no linear map of vectors."""
    own_call = next(kind for kind in LINEAR if isinstance(module, kind)).__call__
    if type(module).__call__ is not own_call:
        raise InputError(f"{place(module)} is a {name_of(module)} with a call of its own: use the layer of Flax itself.")
    if getattr(module, "mask", None) is not None:
        raise InputError(f"{place(module)} has a mask over its kernel: multiply the weights by the mask, and leave it out.")
    if isinstance(module, nn.Conv):
        sizes = module.kernel_size
        return tuple(range(1 + (1 if isinstance(sizes, int) else len(sizes))))
    if isinstance(module, nn.DenseGeneral):
        features = module.features if isinstance(module.features, tuple | list) else (module.features,)
        if len(features) != 1 or (module.batch_dims and len(module.batch_dims)):
            raise InputError(
                f"{place(module)} is a DenseGeneral that is no linear layer: it must have one axis of outputs, which the "
                "network may reshape."
            )
        return tuple(range(1 if isinstance(module.axis, int) else len(module.axis)))
    if isinstance(module, nn.Einsum):
        given = arguments[1] if len(arguments) > 1 else named.get("einsum_str")
        return _einsum_axes(module, given or module.einsum_str or "")
    return (0,)


def _einsum_axes(module: nn.Einsum, text: str) -> tuple[int, ...]:
    operands, _, result = text.replace(" ", "").replace("...", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    outputs = [axis for axis, letter in enumerate(kernel) if letter in result and letter not in inputs]
    summed = [axis for axis, letter in enumerate(kernel) if letter in inputs and letter not in result]
    if len(outputs) != 1 or len(outputs) + len(summed) != len(kernel):
        raise InputError(f"{place(module)} is an Einsum {text!r} that is no linear layer: it must have one axis of outputs.")
    return tuple(summed)


def name_of(module: Any) -> str:
    """The name of a network or layer in messages."""
    return type(module.part.origin if isinstance(module, FromNnx) else module).__name__


def place(module: nn.Module) -> str:
    """The path of a bound module in its network, or its class if it is the network itself."""
    return "/".join(module.path) or name_of(module)
