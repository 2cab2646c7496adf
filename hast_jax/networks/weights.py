"""Weights of networks as files: state dicts of other libraries, read and written by explicit name maps (names.py).

A state dict is a flat `{name: array}` in PyTorch's layout (convolutions OIHW, linear layers [out, in]); under Flax's names in
Flax's. It is read from `.safetensors`, `.npz`, or, where torch is installed, `.pth`; it is written as `.safetensors`, which
can hold no code.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax.errors import UserError
from hast_jax.networks import names as names_lib

Variables = Mapping[str, Any]
StateDict = dict[str, np.ndarray]

Shape = tuple[int, ...]

BUILT_IN = ("digits", "cifar10", "cifar100")
FLAX = "flax"
MAX_COMPRESSION = 100  # trained weights hardly compress at all


class Metadata(NamedTuple):
    """What a weight file says of itself; None where it says nothing.

    mean, std: of images in [0, 1]. crop: as `config.eval.crop`. top1: in per cent.
    """

    dataset: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | None = None
    top1: float | None = None


def libraries(model: nn.Module) -> dict[str, names_lib.NameOf]:
    """The libraries whose state dicts fit `model`, each with its name map: those that the model declares, and Flax."""
    declared = model.state_dict_names() if hasattr(model, "state_dict_names") else {}
    return {**declared, FLAX: names_lib.flax}


def name_map(model: nn.Module, library: str | None = None, image: Shape = (32, 32, 3)) -> dict[str, tuple[str, ...]]:
    """State dict name -> path of our variable, for each weight and running statistic of `model`.

    library: one of `libraries(model)`, by default the first. Raises UserError where two variables share a name.
    """
    maps = libraries(model)
    name_of = maps[library or next(iter(maps))]
    names: dict[str, tuple[str, ...]] = {}
    for path in flatten_dict(abstract_variables(model, image)):
        other = names.setdefault(name_of(path), path)
        if other != path:
            both = f"{'/'.join(other)} and {'/'.join(path)}"
            raise UserError(f"the network's state_dict_names calls both {both} {name_of(path)!r}: give each a name of its own.")
    return names


def abstract_variables(model: nn.Module, image: Shape = (32, 32, 3)) -> Variables:
    """Shapes and dtypes of the `params` and `batch_stats` of `model`, without computing anything."""
    images = jax.ShapeDtypeStruct((1, *image), jnp.zeros(()).dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {name: variables.get(name, {}) for name in ("params", "batch_stats")}


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, for any number of spatial axes; [in, out] -> [out, in]; vectors and scalars as they are."""
    axes = array.ndim
    return np.transpose(array, (axes - 1, axes - 2, *range(axes - 2))) if axes > 1 else array


def to_our_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return np.transpose(array, (*range(2, array.ndim), 1, 0)) if array.ndim > 1 else array


def from_state_dict(model: nn.Module, state: Mapping[str, np.ndarray], image: Shape = (32, 32, 3)) -> Variables:
    """`params` and `batch_stats` of `model` for images [height, width, channels], from a state dict of any of its libraries.

    Raises UserError that names each tensor that is missing, unknown or of the wrong shape.
    """
    state = {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")}
    maps = {library: name_map(model, library, image) for library in libraries(model)}
    library, names = max(maps.items(), key=lambda each: len(each[1].keys() & state.keys()))
    expected = flatten_dict(abstract_variables(model, image))
    faults = [f"{name} is missing" for name in sorted(names.keys() - state.keys())]
    faults += [f"{name} is unknown" for name in sorted(state.keys() - names.keys())]
    variables = {}
    for name in sorted(names.keys() & state.keys()):
        wanted, array = expected[names[name]].shape, np.asarray(state[name])
        ours = array if library == FLAX else _from_torch(array, len(wanted))
        if ours.shape != wanted:
            shown = wanted if library == FLAX else to_torch_layout(np.empty(wanted, np.bool_)).shape
            faults.append(f"{name} has the shape {array.shape} instead of {shown}")
            continue  # it may be a view of far more numbers than its file holds
        if not jnp.issubdtype(ours.dtype, jnp.floating):
            faults.append(f"{name} holds {ours.dtype} instead of floating point numbers")
            continue
        variables[names[name]] = jnp.asarray(ours, jnp.promote_types(ours.dtype, jnp.float32))
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"the weights do not fit the network: {shown}.")
    return unflatten_dict(variables)


def _from_torch(array: np.ndarray, axes: int) -> np.ndarray:
    if axes == 2 and array.shape[2:] == (1, 1):  # a 1x1 convolution after pooling is a linear layer
        array = array[:, :, 0, 0]
    return to_our_layout(array)


def to_state_dict(model: nn.Module, variables: Variables, image: Shape = (32, 32, 3)) -> StateDict:
    """A state dict of the first of the model's libraries, as contiguous NumPy arrays: the inverse of `from_state_dict`."""
    library = next(iter(libraries(model)))
    flat = flatten_dict({name: variables.get(name, {}) for name in ("params", "batch_stats")})
    layout = (lambda array: array) if library == FLAX else to_torch_layout
    names = name_map(model, library, image)
    return {name: np.ascontiguousarray(layout(np.asarray(flat[path]))) for name, path in names.items()}


def locate(name: str) -> Path:
    """The file of a built-in teacher (`BUILT_IN`) or the path itself. Raises UserError where there is no file."""
    if not name:
        raise UserError("config.teacher.weights is empty: give the file of the trained network's weights.")
    path = Path(str(resources.files("hast_jax") / "teachers" / f"{name}.safetensors")) if name in BUILT_IN else Path(name)
    if not path.is_file():
        known = ", ".join(BUILT_IN)
        raise UserError(f"there is no weight file {path}: give the path of one, or one of the built-in teachers: {known}.")
    return path


def read(path: Path) -> tuple[StateDict, Metadata]:
    """State dict and metadata of a weight file. Raises UserError where it cannot be read."""
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".pth": _read_torch}
    if path.suffix not in readers:
        raise UserError(f"{path} ends in {path.suffix!r}: weights are read from .safetensors, .npz or .pth files.")
    try:
        return readers[path.suffix](path)
    except (UserError, ImportError):
        raise
    except Exception as error:  # each library raises its own on a damaged file
        raise UserError(f"{path} cannot be read as {path.suffix}: {error}; copy or download it again.") from error


def write(path: Path, state: StateDict, metadata: Mapping[str, str]) -> None:
    """Write a state dict as `.safetensors` with text metadata."""
    safetensors.numpy.save_file(state, path, dict(metadata))


def _read_safetensors(path: Path) -> tuple[StateDict, Metadata]:
    with safetensors.safe_open(path, "np") as file:
        raw = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}
    numbers = lambda key: tuple(map(float, json.loads(raw[key]))) if key in raw else None
    number = lambda key: float(raw[key]) if key in raw else None
    return state, Metadata(raw.get("dataset"), numbers("mean"), numbers("std"), number("crop"), number("test_top1"))


def _read_npz(path: Path) -> tuple[StateDict, Metadata]:
    _check_archive(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file), Metadata()


def _check_archive(path: Path) -> None:
    """Raise ValueError where a zip file would become far larger in memory than it is on disk."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_COMPRESSION * path.stat().st_size:
        raise ValueError(f"{unpacked / 2**30:.1f} GiB are packed into {path.stat().st_size} bytes, as no weights are")


def _read_torch(path: Path) -> tuple[StateDict, Metadata]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch: pip install -e '.[torch]', or save the weights as .safetensors."
        ) from error
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read, or holds more than tensors, which is never loaded: copy it again, or save the state dict "
            "alone, as torch.save(model.state_dict(), FILE)."
        ) from error
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"{path} is not a bare state dict: {', '.join(map(repr, others[:3]))} of it is no tensor; "
            "save the state dict alone, as torch.save(model.state_dict(), FILE)."
        )
    widened = {n: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for n, tensor in state.items()}  # NumPy lacks it
    return {name: tensor.detach().numpy() for name, tensor in widened.items()}, Metadata()


def from_variables(model, variables, image, call=None):
    """stub"""
    return {name: jax.tree.map(jnp.asarray, dict(variables.get(name, {}))) for name in ("params", "batch_stats")}
