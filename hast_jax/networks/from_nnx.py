"""A `flax.nnx` network as a Linen module: each of its layers computes by the Linen layer of the same kind.

Everything else of the network runs as it is, on a copy that lasts for one call. So a layer is found, observed and quantized as
in a network that was written in Linen.
"""

import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import bridge
from flax.nnx.nn import dtypes
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from hast_jax.errors import InputError, Notice
from hast_jax.networks import names
from hast_jax.networks.graph import Graph

Path = tuple[str, ...]

PARAMS = "params"

NUMBERS = ("use_bias", "dtype", "param_dtype", "precision")
CONVOLUTION = ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask")
NORM = ("axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "axis_name", "use_fast_variance")
# nnx layer -> the Linen layer of the same kind, and name there -> name in nnx of each setting.
LAYERS: dict[type, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    nnx.Conv: (nn.Conv, {"features": "out_features", **{name: name for name in (*CONVOLUTION, *NUMBERS)}}),
    nnx.Linear: (nn.Dense, {"features": "out_features", **{name: name for name in NUMBERS}}),
    nnx.LinearGeneral: (nn.DenseGeneral, {"features": "out_features", **{name: name for name in ("axis", *NUMBERS)}}),
    nnx.Einsum: (nn.Einsum, {"shape": "kernel_shape", **{name: name for name in ("einsum_str", *NUMBERS[1:])}}),
    nnx.BatchNorm: (nn.BatchNorm, {name: name for name in NORM}),
}
# Settings of nnx layers that a Linen layer does not take, with the values that change nothing.
USUAL = {
    "preferred_element_type": None,
    "dot_general_cls": None,
    "dot_general": lax.dot_general,
    "conv_general_dilated": lax.conv_general_dilated,
    "einsum_op": jnp.einsum,
    "promote_dtype": dtypes.promote_dtype,
}
# Layers that cannot be quantized, with the reason.
REFUSED: dict[type, str] = {
    nnx.MultiHeadAttention: "attention multiplies activations with each other",
    nnx.ConvTranspose: "a transposed convolution is not quantized",
    nnx.Embed: "an embedding is not quantized",
    nnx.RNNCellBase: "a recurrent network is not quantized",
    nnx.WeightNorm: "its weights are computed from others",
    nnx.SpectralNorm: "its weights are computed from others",
    nnx.LoRA: "its weights are computed from others",
    bridge.ToNNX: "a Linen module in a flax.nnx module is not taken apart",
}
RANDOM = (nnx.Rngs, nnx.RngStream, nnx.RngState)  # of no use in inference


@dataclass(frozen=True, eq=False)
class Part:
    """A part of an nnx network.

    origin: the part itself. layer: makes the Linen layer that computes in its place, if it is a layer. Otherwise parts: its
    parts, by the names that Linen gives them; and variables: those of its own, by their names. A part that several share
    belongs to the first one.
    """

    origin: Any
    layer: Callable[[], nn.Module] | None
    parts: Mapping[str, "Part"]
    variables: Mapping[str, nnx.Variable]


class FromNnx(nn.Module):
    """The Linen module of a `Part`. Its variables have the names of a Linen network with the same attributes."""

    part: Part

    def setup(self) -> None:
        """Make the Linen layers and the variables."""
        for name, part in self.part.parts.items():
            setattr(self, name, part.layer() if part.layer else FromNnx(part))
        for name, variable in self.part.variables.items():
            first = partial(jnp.asarray, variable.get_value())
            if _collection(variable) == PARAMS:
                setattr(self, name, self.param(name, lambda _, first=first: first()))
            else:
                setattr(self, name, self.variable(_collection(variable), name, first).value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the nnx network gives for these arguments."""
        network = nnx.clone(self.part.origin)
        _bind(network, self)
        return network(*arguments, **named)

    def state_dict_names(self) -> dict[str, Callable[[Path], str]]:
        """The name maps of nnx (`renamed`) and of PyTorch, by the paths in the nnx network, in which lists have numbers."""
        paths = {path: place for path, (place, _) in _variables(self.part).items()}
        sequences = {place for place, part in nnx.iter_graph(self.part.origin) if isinstance(part, nnx.Sequential)}

        def torch(path: Path) -> str:
            place = paths[path]  # PyTorch's Sequential has no `layers` in the names of its members
            inner = [str(step) for end, step in enumerate(place) if place[:end] not in sequences]
            return names.torch((path[0], *inner))

        return {"flax.nnx": lambda path: "/".join((PARAMS, *map(str, paths[path]))), "torch, from flax.nnx": torch}


# Names that members of a Linen module cannot have.
TAKEN = {*dir(FromNnx), "name", "parent", "part"}


def linen(model: Any, variables: Any = None) -> tuple[Any, Any]:
    """The Linen module and the variables of an nnx network. Any other network is returned as it is, with `variables`.

    variables: None for those that the nnx network holds; or its state, as an `nnx.State` or a tree; or what a Linen network
    takes. Raises UserError if the network has a layer that cannot be quantized, or if the state is that of another network.
    """
    if not isinstance(model, nnx.Module):
        return model, variables
    network = nnx.clone(model)
    network.eval()
    root = _part(network, (), _of_layers(network))
    if variables is None:
        variables = _tree({path: variable.get_value() for path, (_, variable) in _variables(root).items()})
    elif isinstance(variables, nnx.State) or _is_state(variables):
        variables = _tree(_values(root, variables))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        raise InputError(f"{type(model).__name__} holds shapes instead of weights: give its state as the variables.")
    _drop_arrays(root)
    return FromNnx(root), variables


def _is_state(variables: Any) -> bool:
    nested = isinstance(variables, Mapping) and any(isinstance(each, Mapping) for each in variables.values())
    return nested and PARAMS not in variables


def _values(root: Part, state: Mapping[str, Any]) -> dict[Path, Any]:
    """Path of each variable of the Linen module -> its value in the state of an nnx network.

    Raises InputError if the state has other variables than the network.
    """
    given = _named_leaves(state)
    wanted = {path: "/".join(map(str, place)) for path, (place, _) in _variables(root).items()}
    if not given.keys() >= set(wanted.values()):  # a checkpoint has the value of each variable under a name of its own
        given = {name.removesuffix("/value"): value for name, value in given.items()}
    others = _named_leaves(nnx.state(root.origin))  # such as random keys and plain arrays
    for path, array in nnx.iter_graph(root.origin):
        name = "/".join(map(str, path))
        if isinstance(array, jax.Array | np.ndarray) and name in given and not np.array_equal(array, given[name]):
            raise InputError(f"the array {name} of the state is not that of this {type(root.origin).__name__}: put it there.")
    missing = sorted(set(wanted.values()) - given.keys())
    besides = given.keys() - set(wanted.values()) - others.keys()
    unknown = sorted(name for name in besides if not _is_random(name.split("/")))  # other versions of Flax keep keys elsewhere
    if missing or unknown:
        words = f"lacks {missing[0]}" if missing else f"has {unknown[0]} besides"
        raise InputError(f"the variables are not the state of this {type(root.origin).__name__}: it {words}.")
    return {path: given[name] for path, name in wanted.items()}


def _named_leaves(state: Any) -> dict[str, Any]:
    pure = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
    return {"/".join(map(str, path)): value for path, value in flatten_dict(dict(pure)).items()}


def _of_layers(network: nnx.Module) -> set[int]:
    """The ids of the variables of layers. Other attributes of the network may name them too.

    Gives a notice if two layers share a variable.
    """
    found: set[int] = set()
    for path, layer in nnx.iter_graph(network):
        if isinstance(layer, tuple(LAYERS)):
            own = {id(each) for each in vars(layer).values() if isinstance(each, nnx.Variable)}
            if found & own:
                place = _place(layer, tuple(map(str, path)))
                words = f"{place} shares a weight with another layer: each gets a copy of its own."
                warnings.warn(words, Notice, stacklevel=2)
            found |= own
    return found


def unused(module: FromNnx, found: Collection[Path], image: tuple[int, ...], call: Mapping[str, Any]) -> set[str]:
    """The names of what an nnx network holds besides the variables that inference has `found`, such as an auxiliary head.

    Each has the name of a Linen network and that of `renamed`. Raises InputError if inference reads such a variable after all:
    that of a layer which is never called.
    """
    places = _variables(module.part)
    others = {path: places[path][0] for path in places.keys() - set(found) if path[0] in (PARAMS, "batch_stats")}
    names = {"/".join(path) for path in others}
    state = nnx.state(module.part.origin)
    known = {place for place, _ in places.values()} - set(others.values())
    names |= {"/".join((PARAMS, *map(str, place))) for place in flatten_dict(nnx.to_pure_dict(state)).keys() - known}
    for path in sorted(others.keys() & _read(module, state, others, image, call)):
        raise InputError(
            f"{type(module.part.origin).__name__} uses {'/'.join(path[1:])} but never calls its layer: call the layer instead."
        )
    return names


def _read(
    module: FromNnx, state: Any, places: Mapping[Path, Any], image: tuple[int, ...], call: Mapping[str, Any]
) -> set[Path]:
    """Those of the variables at these places that inference depends on."""
    if not places:
        return set()
    definition, _ = nnx.split(module.part.origin)
    flat = flatten_dict(nnx.to_pure_dict(state))

    def logits(values: list[Any], images: Any) -> Any:
        nnx.replace_by_pure_dict(state, unflatten_dict(dict(zip(flat, values))))
        return nnx.merge(definition, state)(images, **call)

    traced = Graph(jax.make_jaxpr(logits)(list(flat.values()), jax.ShapeDtypeStruct((1, *image), jnp.float32)))
    numbers = dict(zip(flat, traced.inputs))
    above = traced.upstream(traced.inputs)
    read = frozenset().union(*(above.get(output, ()) for output in traced.outputs if output is not None))
    return {path for path, place in places.items() if numbers[place] in read}


def _tree(values: Mapping[Path, Any]) -> dict[str, Any]:
    return {"batch_stats": {}, **unflatten_dict(values)}


def _is_random(path: Sequence[str]) -> bool:
    """Whether this path in an nnx network is that of a random key or of its counter, which inference does not need."""
    return path[-1] in ("key", "count") and "rngs" in path


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of nnx with the names of `FromNnx.state_dict_names`. Random numbers are left out.

    A file of an `nnx.State` has names such as `blocks/0/conv/kernel/value`, with slashes or dots, for all kinds of variables.
    Any other state dict, such as one of PyTorch, is returned as it is.
    """
    parts = {name: re.split("[./]", name) for name in state}
    parts = {name: path[:-1] if path[-1] == "value" else path for name, path in parts.items()}
    if not any(path[-1] == "kernel" for path in parts.values()) or any(path[0] == "batch_stats" for path in parts.values()):
        return dict(state)
    inner = {name: path[1:] if path[0] == PARAMS else path for name, path in parts.items() if not _is_random(path)}
    return {"/".join((PARAMS, *path)): state[name] for name, path in inner.items()}


def _part(found: Any, path: Path, seen: set[int]) -> Part:
    seen.add(id(found))
    for kind, why in REFUSED.items():
        if isinstance(found, kind):
            raise InputError(f"{_place(found, path)} is a {kind.__name__}: {why}.")
    for kind in LAYERS:
        if isinstance(found, kind):
            return Part(found, _layer(kind, found, path), {}, {})
    parts, variables = {}, {}
    for name, member in _members(found).items():
        if id(member) in seen:
            continue
        if isinstance(member, nnx.Variable):
            seen.add(id(member))
            variables[name] = member
        else:
            parts[name] = _part(member, (*path, name), seen)
    return Part(found, None, parts, variables)


def _members(found: Any) -> dict[str, Any]:
    """The modules and variables among the attributes of an nnx object. Members of lists and dicts are named as in Linen."""
    members: dict[str, Any] = {}
    for attribute, value in vars(found).items():
        for name, member in _named(attribute, value):
            name += "_" * (name in TAKEN)
            if members.setdefault(name, member) is not member:
                raise InputError(f"{type(found).__name__} has two members that Linen would call {name}: rename one.")
    return members


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nnx.List | list | tuple):
        for number, member in enumerate(value):
            yield from _named(f"{name}_{number}", member)
    elif isinstance(value, nnx.Dict | Mapping):
        for key, member in value.items():
            yield from _named(f"{name}_{key}", member)
    elif isinstance(value, nnx.Pytree | nnx.Variable) and not isinstance(value, RANDOM):
        yield name, value


def _layer(kind: type, found: Any, path: Path) -> Callable[[], nn.Module]:
    """Makes the Linen layer that computes as the nnx layer `found`. Raises InputError if there is none."""
    if type(found).__call__ is not kind.__call__:
        raise InputError(
            f"{_place(found, path)} is a {type(found).__name__} with a call of its own: use flax.nnx.{kind.__name__} itself."
        )
    if getattr(found, "batch_axis", None):
        raise InputError(f"{_place(found, path)} is a LinearGeneral that is no linear layer: it has axes of batches.")
    for name, usual in USUAL.items():
        if getattr(found, name, None) not in (None, usual):
            raise InputError(f"{_place(found, path)} has a {name} of its own: leave it out.")
    make, shared = LAYERS[kind]
    settings = {ours: getattr(found, theirs) for ours, theirs in shared.items()}
    if kind is nnx.Einsum:
        settings["use_bias"] = found.bias_shape is not None
    return partial(make, **settings)


def _bind(network: Any, module: FromNnx) -> None:
    """Let the layers of an nnx network compute by the Linen layers of `module`, and give its variables their values."""
    members = _members(network)
    for name, part in module.part.parts.items():
        ours = getattr(module, name)
        if part.layer:
            member = members[name]
            kind: Any = type(part.origin)
            member.__class__ = _computing_elsewhere(kind)
            object.__setattr__(member, "linen", ours)  # nnx would look for variables in it
            for given in ours.variables.values():  # the network may use a kernel outside of its layer
                for inner, value in given.items():
                    getattr(member, inner).set_value(value)
        else:
            _bind(members[name], ours)
    for name in module.part.variables:
        members[name].set_value(getattr(module, name))


@functools.cache
def _computing_elsewhere(kind: Any) -> Any:
    """The class of an nnx layer that computes by the Linen layer in its attribute `linen`."""
    call = _normalise if issubclass(kind, nnx.BatchNorm) else _compute
    return type(kind)(kind.__name__, (kind,), {"__call__": call})


def _compute(layer: Any, *arguments: Any, out_sharding: Any = None, **named: Any) -> Any:
    del out_sharding  # changes no value
    return layer.linen(*arguments, **named)


def _normalise(layer: Any, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    given = layer.use_running_average if use_running_average is None else use_running_average
    return layer.linen(x, use_running_average=given, mask=mask)


def _collection(variable: nnx.Variable) -> str:
    return PARAMS if isinstance(variable, nnx.Param) else type(variable).__name__.lower()


def _variables(root: Part) -> dict[Path, tuple[tuple[str | int, ...], nnx.Variable]]:
    """Path of each variable of the Linen module -> its path in the nnx network, and the variable there."""
    places: dict[int, Any] = {id(variable): path for path, variable in nnx.iter_graph(root.origin)}
    found = {}

    def walk(part: Part, path: Path) -> None:
        if part.layer:
            for name, value in vars(part.origin).items():
                if isinstance(value, nnx.Variable):
                    collection = "batch_stats" if isinstance(value, nnx.BatchStat) else PARAMS
                    found[(collection, *path, name)] = value
        for name, inner in part.parts.items():
            walk(inner, (*path, name))
        for name, variable in part.variables.items():
            found[(_collection(variable), *path, name)] = variable

    walk(root, ())
    return {path: (places[id(variable)], variable) for path, variable in found.items()}


def _drop_arrays(part: Part) -> None:
    """Zeros that take no memory in place of the layers' weights, which the Linen module has as variables of its own.

    Other variables keep their values, as NumPy arrays, which have no weak type (unlike `jnp.full(4, 1.5)`).
    """
    layers = [value for value in vars(part.origin).values() if isinstance(value, nnx.Variable)] if part.layer else []
    for variable in (*layers, *part.variables.values()):
        value = variable.get_value()
        empty = part.layer or isinstance(value, jax.ShapeDtypeStruct)
        variable.set_value(np.broadcast_to(np.zeros((), value.dtype), value.shape) if empty else np.asarray(value))
    for each in part.parts.values():
        _drop_arrays(each)


def _place(found: Any, path: Path) -> str:
    return "/".join(path) or type(found).__name__
