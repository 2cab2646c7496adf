"""The arguments by which a network's call tells inference from training, found by their usual names."""

import re
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import flax.linen as nn
from flax import nnx

from hast_jax.errors import InputError
from hast_jax.networks.from_nnx import FromNnx
from hast_jax.networks.linear import name_of

SWITCH = re.compile("train|infer|eval|test|determin|running|frozen")  # in names of arguments
# Usual names of the arguments that tell inference from training -> their values in inference.
TRAINING = {"train": False, "training": False, "is_training": False, "deterministic": True, "use_running_average": True}


def arguments(module: nn.Module, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The keyword arguments of a call: those that are given, and those of usual names that make `module` infer (`TRAINING`).

    An argument whose default is already its value in inference is left out, because `nn.jit` would trace its value.
    Raises UserError if the call needs another argument besides the images.
    """
    if isinstance(module, type) and issubclass(module, nn.Module | nnx.Module):
        raise InputError(f"the network is the class {module.__name__}: give an instance, such as {module.__name__}(...).")
    if not isinstance(module, nn.Module):
        raise InputError(f"the network is a {name_of(module)}: give an instance of a flax.linen.Module or a flax.nnx.Module.")
    if not isinstance(given, Mapping):
        raise InputError(f"call is {given!r}: give a dict of keyword arguments, such as {{'train': False}}.")
    taken = list(_parameters(module).values())[1:]
    if taken and taken[0].name in TRAINING:
        raise InputError(f"the call of {name_of(module)} takes {taken[0].name!r} first: let it take the images first.")
    parameters = taken[1:]
    usual = (each for each in parameters if each.name in TRAINING and each.default is not TRAINING[each.name])
    known = {each.name: TRAINING[each.name] for each in usual} | dict(given)
    named = (each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    needed = [each.name for each in named if each.default is each.empty and each.name not in known]
    if needed:
        raise InputError(f"the call of {name_of(module)} needs {needed[0]!r}: give it, as call={{{needed[0]!r}: ...}}.")
    return known


def training_arguments(module: nn.Module) -> dict[str, Any]:
    """The keyword arguments of a call that make `module` train: its arguments among `TRAINING`, with the opposite values."""
    parameters = _parameters(module)
    return {name: not inferring for name, inferring in TRAINING.items() if name in parameters}


def advice(module: nn.Module, call: Mapping[str, Any]) -> str:
    """What a user can do so that a network infers, although its call with the arguments `call` trains."""
    parameters = _parameters(module)
    now = {name: call.get(name, each.default) for name, each in parameters.items()}
    usual = [(name, value) for name, value in TRAINING.items() if name in now and now[name] is not value]
    others = [(n, not v) for n, v in now.items() if isinstance(v, bool) and n not in TRAINING and SWITCH.search(n)]
    attributes = [(name, value) for name, value in TRAINING.items() if getattr(_own(module), name, value) is (not value)]
    if attributes:
        return "make it with {}={}".format(*attributes[0])
    if usual or others:
        return "set {}={} in its call, by the argument call or the field teacher.call".format(*(usual or others)[0])
    return "let it call its nn.BatchNorm with use_running_average=True, or give an argument that makes it infer, as call={...}"


def _parameters(module: nn.Module) -> Mapping[str, Parameter]:
    """Those of the network's call, of which the first two are the network and the images."""
    return signature(type(_own(module)).__call__).parameters


def _own(module: nn.Module) -> Any:
    """The network as the user wrote it."""
    return module.part.origin if isinstance(module, FromNnx) else module
