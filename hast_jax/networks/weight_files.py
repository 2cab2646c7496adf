"""Files of weights, by format. Each reader gives a flat state dict `{name: array}`.

`.safetensors` and `.npz` hold arrays alone. `.pth`, `.pt`, `.pth.tar`, `.ckpt` and `.bin` are PyTorch's, and reading them needs
torch. `.msgpack` is Flax's, and a folder is Orbax's (flax_trees.py). `.h5`, `.hdf5` and `.keras` are Keras' (keras_files.py).
No reader runs code that is in a file, or takes far more memory than the file takes on the disk.
"""

import ast
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from hast_jax.errors import Notice, UserError, pip_install
from hast_jax.kinds import shown
from hast_jax.networks import flax_trees, keras_files
from hast_jax.networks.packed import check_archive

StateDict = dict[str, np.ndarray]

LONGEST = 1000  # characters of a text that is read as numbers: parsing takes far more memory than the text
ALONE = "save the state dict alone, as torch.save(model.state_dict(), FILE)"


class Metadata(NamedTuple):
    """What a weight file says of itself. A field is None if the file does not say.

    mean, std: of images in [0, 1]. crop: as `config.eval.crop`. top1: in per cent.
    """

    dataset: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | None = None
    top1: float | None = None


def read(path: Path) -> tuple[StateDict, Metadata]:
    """State dict and metadata of a weight file or of an Orbax folder. Raises UserError if it cannot be read."""
    kind = "an Orbax checkpoint" if path.is_dir() else next((end for end in READERS if path.name.lower().endswith(end)), None)
    if kind is None:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending that says what it is"
        raise UserError(
            f"{path} {ending}: give a folder of Orbax, or a file that ends in {', '.join(READERS)}; rename a file of "
            "flax.serialization to .msgpack."
        )
    try:
        if path.is_dir():
            return flax_trees.read_orbax(path), Metadata()
        metadata = _safetensors_metadata(path) if kind == ".safetensors" else Metadata()
        return READERS[kind](path), metadata
    except (UserError, ImportError):
        raise
    except Exception as error:  # on a damaged file, each library raises errors of its own
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise UserError(
            f"{path} cannot be read as {kind}: {reason}; if the file is damaged, copy or download it again."
        ) from error


def encoded(state: StateDict, metadata: Mapping[str, str]) -> bytes:
    """The content of a `.safetensors` file with a state dict and text metadata."""
    return safetensors.numpy.save(state, dict(metadata))


def _read_safetensors(path: Path) -> StateDict:
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _safetensors_metadata(path: Path) -> Metadata:
    with safetensors.safe_open(path, "np") as file:
        raw = file.metadata() or {}

    def numbers(key):
        """One or several numbers, as in JSON or Python; None if the key is missing."""
        if key not in raw:
            return None
        try:
            if len(raw[key]) > LONGEST:
                raise ValueError
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                found = ast.literal_eval(raw[key].strip())
            found = tuple(found) if isinstance(found, tuple | list) else (found,)
            if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in found):
                raise ValueError
            return tuple(map(float, found))
        except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):
            # Another program may mean something else by this key.
            warnings.warn(f"{path}: its {key}, {shown(raw[key])}, is no list of numbers and is ignored.", Notice, stacklevel=2)
            return None

    def number(key):
        found = numbers(key)
        return found[0] if found else None

    return Metadata(raw.get("dataset"), numbers("mean"), numbers("std"), number("crop"), number("test_top1"))


def _read_npz(path: Path) -> StateDict:
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
        try:
            return dict(file)
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            words = f"{path} holds Python objects, which are never loaded: save one array for each name"
            raise UserError(f"{words}, as numpy.savez(FILE, **flatten_dict(variables, sep='/')).") from error


def _read_torch(path: Path) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch: {pip_install('torch')}, or save the weights as .safetensors."
        ) from error
    if zipfile.is_zipfile(path):
        check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read, or holds more than tensors, which is never loaded: copy it again, or {ALONE}."
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds one {type(state).__name__} instead of a state dict, which names each tensor: {ALONE}.")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"{path} is not a bare state dict: some entries are no tensors ({', '.join(map(repr, others[:3]))}); {ALONE}."
        )
    return {str(name): _from_torch(path, name, tensor) for name, tensor in state.items()}


def _from_torch(path: Path, name: Any, tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array, in float32 if NumPy lacks its type."""
    import torch

    if tensor.is_quantized or tensor.layout != torch.strided:
        what = "quantized" if tensor.is_quantized else "sparse"
        raise UserError(f"{name!r} in {path} is {what}: save the state dict of the dense network in floating point.")
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


READERS: dict[str, Callable[[Path], StateDict]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".msgpack": flax_trees.read_msgpack,
    ".h5": keras_files.read_h5,
    ".hdf5": keras_files.read_h5,
    ".keras": keras_files.read_keras,
    **dict.fromkeys((".pth", ".pt", ".pth.tar", ".ckpt", ".bin"), _read_torch),
}
