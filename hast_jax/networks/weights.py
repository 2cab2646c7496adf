"""Weights of networks: state dicts of any library become checked variables of Flax, by explicit name maps (names.py).

A state dict is a flat `{name: array}`. If a name begins with "params" or "batch_stats", or ends in "kernel", its array is in
Flax's layout. Any other array is in PyTorch's layout (convolutions OIHW, linear layers [out, in]). weight_files.py reads files
that hold state dicts. It encodes them as `.safetensors`, which can hold no code.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import paths
from hast_jax.errors import InputError, UserError
from hast_jax.networks import flax_trees, from_nnx, keras_files, name_fit, structure
from hast_jax.networks import names as names_lib
from hast_jax.networks.linear import name_of
from hast_jax.networks.weight_files import Metadata, StateDict, encoded, read

__all__ = [
    "BUILT_IN",
    "FLAX",
    "FLAX_DOTTED",
    "TORCH",
    "Metadata",
    "StateDict",
    "Variables",
    "abstract_variables",
    "check_collections",
    "encoded",
    "from_state_dict",
    "from_variables",
    "libraries",
    "locate",
    "name_map",
    "read",
    "to_our_layout",
    "to_state_dict",
    "to_torch_layout",
]

Variables = Mapping[str, Any]

Shape = tuple[int, ...]

BUILT_IN = ("digits", "cifar10", "cifar100")
FLAX = "flax"
FLAX_DOTTED = "flax with dots"
TORCH = "torch"
COUNTERS = ("num_batches_tracked", "n_averaged")  # of PyTorch, in no network of ours
SHOWN = 8  # faults that a message lists, at most
GIVE_BOTH = "give {'params': ..., 'batch_stats': ...}, or a TrainState with both"


class _FaultError(Exception):
    """One tensor cannot be used. The text is a clause of an error message."""


def libraries(model: nn.Module) -> dict[str, names_lib.NameOf]:
    """The libraries whose state dicts fit `model`, each with its name map: those that it declares, Flax (twice) and PyTorch.

    A model declares libraries with a method `state_dict_names`. PyTorch's map keeps the names of the modules.
    """
    declared = model.state_dict_names() if hasattr(model, "state_dict_names") else {}
    return {**declared, FLAX: names_lib.flax, FLAX_DOTTED: names_lib.flax_dotted, TORCH: names_lib.torch}


def name_map(
    model: nn.Module,
    library: str | None = None,
    image: Shape = (32, 32, 3),
    names: names_lib.NameOf | None = None,
    call: Mapping[str, Any] = {},
) -> dict[str, tuple[str, ...]]:
    """State dict name -> path of our variable, for each weight and running statistic of `model`.

    library: one of `libraries(model)`, by default the first. names: a name map to use instead. image, call: as in
    `abstract_variables`. Raises UserError if two variables share a name.
    """
    maps = libraries(model)
    return _name_map(flatten_dict(abstract_variables(model, image, call)), names or maps[library or next(iter(maps))])


def _name_map(variables: Mapping[tuple[str, ...], Any], name_of: names_lib.NameOf) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for path in variables:
        name = _called(name_of, path)
        other = names.setdefault(name, path)
        if other != path:
            both = f"{'/'.join(other)} and {'/'.join(path)}"
            raise InputError(f"the network's name map gives {both} the same name {name!r}: give each a name of its own.")
    return names


def _called(name_of: names_lib.NameOf, path: tuple[str, ...]) -> str:
    try:
        name = name_of(path)
    except Exception as error:  # a user's map may raise anything
        raise InputError(f"the name map fails on {path}: {type(error).__name__}: {error}.") from error
    if not isinstance(name, str):
        raise InputError(f"the name map gives {name!r} for {path}: it must give a text.")
    return name


def abstract_variables(model: nn.Module, image: Shape = (32, 32, 3), call: Mapping[str, Any] = {}) -> Variables:
    """Shapes and dtypes of the `params` and `batch_stats` of `model`, without computing anything.

    The arguments and the errors are those of `abstract_collections`.
    """
    variables = abstract_collections(model, image, call)
    return {name: variables.get(name, {}) for name in flax_trees.COLLECTIONS}


def abstract_collections(model: nn.Module, image: Shape = (32, 32, 3), call: Mapping[str, Any] = {}) -> Variables:
    """Shapes and dtypes of all variables of `model`, without computing anything.

    image: (height, width, channels) of one image. call: keyword arguments of `__call__` besides the images, as
    {"train": False}. Raises UserError if the network fails on such an image.
    """
    images = jax.ShapeDtypeStruct((1, *image), jnp.zeros(()).dtype)
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    try:
        return nn.unbox(jax.eval_shape(partial(model.init, **call), keys, images))
    except UserError:
        raise
    except Exception as error:  # whatever the network does wrong
        words = str(error).split("\n")[0].rstrip(".")
        given = f" with {dict(call)}" if call else ""
        raise InputError(
            f"{name_of(model)} fails on an image {tuple(image)}{given}: {type(error).__name__}: {words}; "
            "give an image and arguments that its __call__ takes."
        ) from error


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, for any number of spatial axes; [in, out] -> [out, in]; vectors and scalars stay as they are."""
    axes = array.ndim
    return np.transpose(array, (axes - 1, axes - 2, *range(axes - 2))) if axes > 1 else array


def to_our_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return np.transpose(array, (*range(2, array.ndim), 1, 0)) if array.ndim > 1 else array


def from_state_dict(
    model: nn.Module,
    state: Mapping[str, np.ndarray],
    image: Shape = (32, 32, 3),
    names: names_lib.NameOf | None = None,
    call: Mapping[str, Any] = {},
) -> Variables:
    """`params` and `batch_stats` of `model`, in float32, from a state dict of any of its libraries.

    names: a name map to use instead of the libraries': path of our variable -> name in `state`. image, call: as in
    `abstract_variables`. A prefix that all names in `state` share is removed if more names then fit.

    Raises UserError if tensors are missing, unknown, of a wrong shape or not in floating point. If all fit, raises UserError if
    values are not finite or variances are negative by `epsilon` or more. The message names the tensors.
    """
    state = {name: array for name, array in state.items() if not name.endswith(COUNTERS)}
    expected = flatten_dict(abstract_variables(model, image, call))
    if isinstance(model, from_nnx.FromNnx):
        unused = from_nnx.unused(model, expected, image, call)
        state = {name: array for name, array in from_nnx.renamed(state).items() if name not in unused}
    maps = [_name_map(expected, names)] if names else _library_maps(model, expected)
    fit, chosen = name_fit.best(state, maps)
    faults = keras_files.doubts(fit.unknown, chosen) + name_fit.faults(fit, translatable=names is None)
    variables: dict[tuple[str, ...], jax.Array] = {}
    for name, ours in sorted(fit.pairs.items()):
        try:
            variables[chosen[ours]] = _variable(name, ours, np.asarray(state[name]), chosen[ours], expected[chosen[ours]])
        except _FaultError as fault:
            faults.append(str(fault))
    behind = f", without the {fit.prefix!r} before each name," if fit.prefix else ""
    _refuse(f"the weights{behind} do not fit the network on images of {tuple(image)}", faults)
    epsilon = partial(_epsilon, model, image, call)
    damages = [_damage(name, chosen[ours], variables[chosen[ours]], epsilon) for name, ours in sorted(fit.pairs.items())]
    _refuse("the weights are damaged", [clause for clause in damages if clause])
    return unflatten_dict(variables)


def from_variables(
    model: nn.Module, variables: Variables, image: Shape = (32, 32, 3), call: Mapping[str, Any] = {}
) -> Variables:
    """`params` and `batch_stats` of `model`, in float32, from a tree of Flax: nested mappings of NumPy's or JAX's arrays.

    variables: {"params": ..., "batch_stats": ...}, another tree that flax_trees.py takes, an object with attributes `params`
    and `batch_stats`, or a state dict: flat, with the names that a file would have. image, call, errors: as in
    `from_state_dict`.
    """
    if variables is None:
        raise InputError(f"the variables are missing: {GIVE_BOTH}.")
    if isinstance(variables, str | os.PathLike):
        raise InputError(
            f"the variables are the path {str(variables)!r}: read the file, and give hast_jax.read_weights({str(variables)!r})."
        )
    if _is_state_dict(variables):
        state = {"/".join(map(str, n)) if isinstance(n, tuple) else str(n): array for n, array in variables.items()}
        return from_state_dict(model, state, image, None, call)
    if not isinstance(variables, Mapping):  # a TrainState
        variables = {name: getattr(variables, name) for name in flax_trees.COLLECTIONS if hasattr(variables, name)}
    if not variables:
        raise InputError(f"the variables hold no params: {GIVE_BOTH}.")
    state = flax_trees.flat(nn.unbox(variables))
    given = "batch_stats" in variables or any(name.startswith("batch_stats/") for name in state)
    if not given and abstract_variables(model, image, call)["batch_stats"]:
        raise InputError(f"the variables hold no batch_stats, the statistics of batch norms: {GIVE_BOTH}.")
    return from_state_dict(model, state, image, names_lib.flax, call)


def _is_state_dict(variables: Any) -> bool:
    """Whether it is flat, with whole paths as the names: texts with dots or slashes, or tuples, as of `flatten_dict`."""
    if not isinstance(variables, Mapping) or not variables or any(isinstance(each, Mapping) for each in variables.values()):
        return False
    return any(isinstance(name, tuple) or re.search("[./]", str(name)) for name in variables)


def _library_maps(model: nn.Module, expected: Mapping[tuple[str, ...], Any]) -> list[dict[str, tuple[str, ...]]]:
    """The name map of each library. PyTorch's map is left out if it fails, because the model did not declare it."""
    maps = []
    for library, name in libraries(model).items():
        try:
            maps.append(_name_map(expected, name))
        except UserError:
            if library != TORCH:
                raise
    return maps


def check_collections(model: nn.Module, variables: Variables, image: Shape, call: Mapping[str, Any] = {}) -> None:
    """Raise InputError if `variables` lack a collection that `model` reads. image, call: as in `abstract_variables`."""
    if set(structure.inspect(model, image, call).collections) <= set(variables):
        return
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    try:  # the network may make a collection that it does not read
        jax.eval_shape(lambda v, x: model.apply(v, x, **call), variables, images)
    except (ScopeCollectionNotFound, ScopeVariableNotFoundError) as error:
        words = str(error).split(". ")[0]
        raise InputError(
            f"{name_of(model)} has variables besides params and batch_stats, which are not given ({words}): give all of "
            "its variables in Python, because weight files hold only these two collections."
        ) from error


def _variable(name: str, ours: str, array: np.ndarray, path: tuple[str, ...], variable: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a file as the `variable` at `path`, which the file's library calls `ours`.

    Raises _FaultError if the array does not fit.
    """
    wanted = variable.shape
    if array.dtype == object:
        raise _FaultError(f"{name} is no array of numbers, such as a jax.ShapeDtypeStruct")
    is_flax = name_fit.is_flax(ours)
    if not is_flax:
        converted = _from_torch(array, wanted, is_kernel=path[-1] == "kernel")
    else:
        converted = keras_files.as_expected(array, wanted) if keras_files.is_numbered(name) else array
    if converted.shape != wanted:  # asked first, because an array may be a view of far more numbers than its file holds
        shown = wanted if is_flax or path[-1] != "kernel" else to_torch_layout(np.empty(wanted, np.bool_)).shape
        raise _FaultError(f"{name} has the shape {array.shape} instead of {shown}")
    if converted.dtype.type is np.void:  # NumPy's files hold bfloat16 without its name
        raise _FaultError(f"{name} holds {converted.dtype}, numbers without a type (bfloat16?): save float32, or .safetensors")
    converted = converted.astype(converted.dtype.newbyteorder("="), copy=False)
    if jnp.issubdtype(variable.dtype, jnp.integer) and jnp.issubdtype(converted.dtype, jnp.integer):
        return jnp.asarray(converted)  # a counter
    if not jnp.issubdtype(converted.dtype, jnp.floating):
        raise _FaultError(f"{name} holds {converted.dtype} instead of floating point numbers")
    wide = jax.dtypes.canonicalize_dtype(jnp.promote_types(converted.dtype, jnp.float32))  # float64 only if JAX has it enabled
    return jnp.asarray(converted.astype(wide))


def _damage(name: str, path: tuple[str, ...], value: jax.Array, epsilon: Callable[[tuple[str, ...]], float]) -> str | None:
    """A clause if values are not finite, or if a variance is negative and `epsilon` does not make it positive; else None.

    epsilon: path of a variable -> epsilon of its batch norm.
    """
    if not np.isfinite(value).all():
        return f"{name} holds numbers that are not finite"
    if path[0] == "batch_stats" and path[-1] == "var" and np.any(np.asarray(value) < 0) and np.min(value) <= -epsilon(path):
        return f"{name} holds a variance below zero"
    return None


def _epsilon(model: nn.Module, image: Shape, call: Mapping[str, Any], path: tuple[str, ...]) -> float:
    """The epsilon that the batch norm with the variable at `path` adds to its variance; zero if there is no such batch norm."""
    found: dict[tuple[str, ...], float] = {}

    def note(function: Any, arguments: Any, named: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            found[context.module.path] = context.module.epsilon
        return function(*arguments, **named)

    with nn.intercept_methods(note):
        abstract_variables(model, image, call)
    return found.get(path[1:-1], 0.0)


def _refuse(what: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(f"{what}: {'; '.join(faults[:SHOWN])}{more}.")


def _from_torch(array: np.ndarray, wanted: tuple[int, ...], is_kernel: bool) -> np.ndarray:
    """An array of PyTorch in our layout: kernels are transposed, and other arrays have the shape that the user gave them.

    But a vector may lie along another axis, such as the gain of each channel: (C, 1, 1) in PyTorch, (1, 1, C) here.
    """
    if not is_kernel:
        is_vector = array.size == max((*array.shape, 1)) == max((*wanted, 1)) == math.prod(wanted)
        return array.reshape(wanted) if is_vector else array
    if len(wanted) == 2 and array.shape[2:] == (1, 1):  # a 1x1 convolution after pooling is a linear layer
        array = array[:, :, 0, 0]
    return to_our_layout(array)


def to_state_dict(
    model: nn.Module, variables: Variables, image: Shape = (32, 32, 3), call: Mapping[str, Any] = {}
) -> StateDict:
    """A state dict of the first of the model's libraries, as contiguous NumPy arrays: the inverse of `from_state_dict`."""
    flat = flatten_dict({name: variables.get(name, {}) for name in flax_trees.COLLECTIONS})
    state = {}
    for name, path in name_map(model, None, image, call=call).items():
        array, is_torch_kernel = np.asarray(flat[path]), path[-1] == "kernel" and not name_fit.is_flax(name)
        state[name] = np.ascontiguousarray(to_torch_layout(array) if is_torch_kernel else array)
    return state


def locate(name: str | Path) -> Path:
    """The file of the built-in teacher `name` (one of `BUILT_IN`), or else the path `name` of a file or a folder of Orbax.

    Raises UserError if there is no such file or folder.
    """
    if name == "":
        raise InputError("the path of the weight file is empty: give the file of the trained network's weights.")
    if name in BUILT_IN:
        return Path(str(resources.files("hast_jax") / "teachers" / f"{name}.safetensors"))
    path = paths.local(name)
    if not path.exists():
        known = ", ".join(BUILT_IN)
        raise InputError(
            f"there is no weight file {path}: give the path of a weight file, or the name of a built-in teacher: {known}."
        )
    return path
