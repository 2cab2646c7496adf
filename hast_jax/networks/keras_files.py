"""Weights that Keras wrote: `.h5` of Keras 2, `.weights.h5` and `.keras` of Keras 3. They are read with h5py, without Keras.

A layer NAME is the Flax module NAME; a nested model is a nested module, and so is what a "/" in a name parts. In it,

    kernel, bias                  params: kernel, bias
    gamma, beta                   params: scale, bias          (absent where the layer has no scale or no center)
    moving_mean, moving_variance  batch_stats: mean, var
    depthwise_kernel [h, w, c, m] params: kernel [h, w, 1, c * m] of a convolution with feature_group_count=c

and other names are kept. So the state dict of Conv1 has "params/Conv1/kernel" in Flax's layout, which is Keras' own but for
depthwise kernels. Where the network's modules are called otherwise, a name map says so:
`names=lambda path: "/".join({"stem": "Conv1"}.get(part, part) for part in path)`.

Keras 3 numbers the variables of a layer: their names are "params/Conv1/vars/0" until `resolve` has seen the network. Older
files of Keras 3 call layers by class and number (`conv2d_1`): a `.keras` says whose those are; a `.weights.h5` cannot.

TensorFlow's padding "same", asymmetric at stride 2, is Flax's "SAME". Keras' batch norm has epsilon 1e-3, Flax's 1e-5.
Kernels of transposed convolutions differ from Flax's in more than their layout and are not converted.
"""

import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hast_jax.errors import UserError
from hast_jax.networks.packed import check_archive, check_size

Shape = tuple[int, ...]

LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var", "depthwise_kernel": "kernel"}
STATISTICS = ("mean", "var")
# The variables of a layer in Keras' order, where their number and the network's module leave no doubt of which is which.
ORDERS = (("kernel",), ("kernel", "bias"), ("scale", "bias"), ("mean", "var"), ("scale", "bias", "mean", "var"))
CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
NO_LAYERS = ("optimizer", "optimizer_weights", "metrics")
NUMBERED = re.compile(r"(.+)/vars/(\d{1,4})")


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """State dict of an `.h5` file, with the names that the module's page gives.

    Raises UserError where h5py is missing, and ValueError or OSError where the file is not what it says.
    """
    return _read(path, path.stat().st_size, path, {})


def read_keras(path: Path) -> dict[str, np.ndarray]:
    """State dict of a `.keras` archive, as `read_h5`."""
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        config, packed = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    return _read(io.BytesIO(packed), len(packed), path, config)


def resolve(found: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Name of the file -> name of the network, for those variables in `found` that have a number.

    found, expected: names such as "params/Conv1/vars/0" and "batch_stats/bn/mean". A layer whose variables could be told apart
    in more than one way, or in none, is left out.
    """
    resolved: dict[str, str] = {}
    for layer, numbered in _layers(found).items():
        names = _leaves(layer, expected)
        if tuple(names) in ORDERS and len(names) == len(numbered):
            resolved |= dict(zip(numbered, names.values()))
    return resolved


def doubts(unknown: Collection[str], expected: Collection[str]) -> list[str]:
    """A clause for each layer of the network that `resolve` left out."""
    layers = {layer: (numbered, _leaves(layer, expected)) for layer, numbered in _layers(unknown).items()}
    return [
        f"the {len(numbered)} numbered arrays of {layer} could be any of {', '.join(names)} (save the model as .keras or .h5)"
        for layer, (numbered, names) in sorted(layers.items())
        if names
    ]


def is_numbered(name: str) -> bool:
    """Whether the name says only which variable of its layer it is."""
    return NUMBERED.fullmatch(name) is not None


def depthwise(kernel: np.ndarray) -> np.ndarray:
    """[h, w, c, m] -> [h, w, 1, c * m]: output m of channel c is number c * M + m for Keras and for Flax."""
    height, width, channels, multiplier = kernel.shape
    return kernel.reshape(height, width, 1, channels * multiplier)


def as_expected(array: np.ndarray, wanted: Shape) -> np.ndarray:
    """A numbered variable in the shape that the network wants, if it is the kernel of a depthwise convolution."""
    is_depthwise = array.ndim == 4 and array.shape != wanted and math.prod(array.shape) == math.prod(wanted)
    return depthwise(array) if is_depthwise and wanted[:3] == (*array.shape[:2], 1) else array


def _layers(names: Collection[str]) -> dict[str, list[str]]:
    """Layer -> names of its numbered variables, in their order."""
    layers: dict[str, dict[int, str]] = {}
    for name in names:
        if found := NUMBERED.fullmatch(name):
            layers.setdefault(found[1], {})[int(found[2])] = name
    return {layer: [numbered[i] for i in sorted(numbered)] for layer, numbered in layers.items()}


def _leaves(layer: str, expected: Collection[str]) -> dict[str, str]:
    """Leaf -> name of each variable of the network in the module that `layer` names, in Keras' order."""
    names = {
        leaf: _named(layer.removeprefix("params/").split("/"), leaf) for leaf in ("kernel", "scale", "bias", "mean", "var")
    }
    return {leaf: name for leaf, name in names.items() if name in expected}


def _named(modules: list[str], leaf: str) -> str:
    return "/".join(["batch_stats" if leaf in STATISTICS else "params", *modules, leaf])


def _read(file: Any, size: int, path: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """file, size: what h5py opens, and its bytes. path: for messages. config: of the model, empty where it is not known."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"reading {path} needs h5py: pip install 'hast_jax[keras]'.") from error
    state: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as opened:
        config = config or json.loads(opened.attrs.get("model_config", "{}"))
        root = opened.get("model_weights", opened)  # a whole model of Keras 2, or its weights
        found: dict[str, Any] = {}
        root.visititems(lambda name, each: found.update({name: each}))  # it follows no link out of the file
        arrays = {name: each for name, each in found.items() if isinstance(each, h5py.Dataset) and _is_weight(name)}
        for name, array in arrays.items():
            if array.external or array.is_virtual or array.dtype.hasobject:
                raise ValueError(f"{name} in it is no array of numbers of this file")
        check_size(sum(map(_bytes, arrays.values())), size)
        name_of = _keras_3(found, config) if any(map(is_numbered, arrays)) else _keras_2(root)
        kernels = tuple(f"/{layer['config']['name']}/kernel" for _, layer in _groups(config) if _is_depthwise(layer))
        for source, array in arrays.items():
            name = name_of(source)
            if name in state:
                raise ValueError(f"two arrays in it are {name}")
            values = np.asarray(array)
            if array.attrs.get("dtype") == "bfloat16":  # HDF5 has no such type
                values = values.view(np.dtype(jnp.bfloat16))
            if source.partition(":")[0].endswith("/depthwise_kernel") or name.endswith(kernels):
                values = depthwise(values)
            state[name] = values
    return state


def _is_weight(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in NO_LAYERS and not any(part.startswith("seed_generator") for part in parts)


def _is_depthwise(layer: Mapping[str, Any]) -> bool:
    return layer["class_name"] == "DepthwiseConv2D"


def _bytes(array: Any) -> int:
    """What reading a dataset takes: whole chunks are unpacked, also of a smaller array."""
    return max(math.prod(array.shape), math.prod(array.chunks or ())) * array.dtype.itemsize


def _keras_2(root: Any) -> Callable[[str], str]:
    """Dataset -> name: "block/block_1/conv/kernel:0", in the group of the layer "block", is "params/block/conv/kernel"."""
    said = [name for key, names in root.attrs.items() if re.fullmatch(r"layer_names\d*", key) for name in names]
    layers = [name.decode() if isinstance(name, bytes) else str(name) for name in said]

    def name_of(source: str) -> str:
        group = max((layer for layer in layers if source.startswith(f"{layer}/")), key=len, default=source.split("/")[0])
        # Inside of its group, a variable has the layer's name once more, and may have the model's before it.
        inside = re.split(rf"(?:^|/){re.escape(group)}(?:_\d+)?/", source.removeprefix(f"{group}/"), maxsplit=1)[-1]
        *modules, variable = inside.partition(":")[0].split("/")
        return _named([*group.split("/"), *modules], LEAVES.get(variable, variable))

    return name_of


def _keras_3(found: Mapping[str, Any], config: Mapping[str, Any]) -> Callable[[str], str]:
    """Dataset -> name: "layers/conv2d/vars/0" is "params/Conv1/vars/0", if the file calls its first Conv2D so."""
    configs = dict(_groups(config))

    def name_of(source: str) -> str:
        *parts, _, number = source.replace("\\", "/").split("/")  # Keras on Windows writes a backslash
        modules: list[str] = []
        layer: Mapping[str, Any] = {}
        for end, part in enumerate(parts, start=1):
            if part in CONTAINERS:
                continue
            group = "/".join(parts[:end])
            layer = configs.get(group.replace(CONTAINERS[1], CONTAINERS[0]), {})
            variables = found.get(f"{group}/vars")
            said = variables.attrs.get("name") if variables is not None else None
            modules += str(said or layer.get("config", {}).get("name", part)).split("/")
        if layer.get("class_name") == "BatchNormalization":
            has = layer["config"]
            leaves = [leaf for leaf, field in (("scale", "scale"), ("bias", "center")) if has.get(field, True)] + [*STATISTICS]
            return _named(modules, leaves[int(number)])
        return _named([*modules, "vars"], number)

    return name_of


def _groups(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Group in a file of Keras 3 -> config of each layer of a model, counted as Keras does, of nested models too."""
    inner = config.get("config", {})
    counts: Counter[str] = Counter()
    for layer in inner if isinstance(inner, list) else inner.get("layers", []):
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", layer["class_name"])).lower()
        group = f"{place}layers/{kind}" + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        yield group, layer
        yield from _groups(layer, f"{group}/")
