"""The arguments by which a network's call tells inference from training, found by their usual names."""

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

import flax.linen as nn

from hast_jax.errors import InputError
from hast_jax.networks.linear import name_of
from hast_jax.networks.refusals import no_linen_module

SWITCH = re.compile("train|infer|eval|test|determin|running|frozen")  # in names of arguments
# Usual names of the arguments that tell inference from training -> their values in inference.
TRAINING = {"train": False, "training": False, "is_training": False, "deterministic": True, "use_running_average": True}


def arguments(module: nn.Module, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The keyword arguments of a call: those that are given, and those of usual names that make `module` infer (`TRAINING`).

    An argument whose default is already its value in inference is left out, because `nn.jit` would trace its value.
    Raises UserError if the call needs another argument besides the images.
    """
    if not isinstance(module, nn.Module):
        raise InputError(no_linen_module(module))
    parameters = list(signature(type(module).__call__).parameters.values())[2:]
    usual = (each for each in parameters if each.name in TRAINING and each.default is not TRAINING[each.name])
    known = {each.name: TRAINING[each.name] for each in usual} | dict(given)
    named = (each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    needed = [each.name for each in named if each.default is each.empty and each.name not in known]
    if needed:
        raise InputError(f"the call of {name_of(module)} needs {needed[0]!r}: give it, as call={{{needed[0]!r}: ...}}.")
    return known


def training_arguments(module: nn.Module) -> dict[str, Any]:
    """The keyword arguments of a call that make `module` train: its arguments among `TRAINING`, with the opposite values."""
    parameters = signature(type(module).__call__).parameters
    return {name: not inferring for name, inferring in TRAINING.items() if name in parameters}


def advice(module: nn.Module, call: Mapping[str, Any]) -> str:
    """What a user can do so that a network infers, although its call with the arguments `call` trains."""
    parameters = signature(type(module).__call__).parameters
    now = {name: call.get(name, each.default) for name, each in parameters.items()}
    usual = [(name, value) for name, value in TRAINING.items() if name in now and now[name] is not value]
    others = [(n, not v) for n, v in now.items() if isinstance(v, bool) and n not in TRAINING and SWITCH.search(n)]
    attributes = [(name, value) for name, value in TRAINING.items() if getattr(module, name, value) is not value]
    if attributes:
        return "make it with {}={}".format(*attributes[0])
    if usual or others:
        return "set {}={} in its call, by the argument call or the field teacher.call".format(*(usual or others)[0])
    return "let it call its nn.BatchNorm with use_running_average=True"
