"""Weights that Keras wrote: `.h5` of Keras 2, `.weights.h5` and `.keras` of Keras 3. They are read with h5py, without Keras.

The layer NAME becomes the Flax module NAME. A nested model becomes a nested module, and a "/" in a name separates nested
modules. The variables of a layer become

    kernel, bias                  params: kernel, bias
    gamma, beta                   params: scale, bias          (absent where the layer has no scale or no center)
    moving_mean, moving_variance  batch_stats: mean, var
    depthwise_kernel [h, w, c, m] params: kernel [h, w, 1, c * m] of a convolution with feature_group_count=c

Other names are kept. The state dict of the layer Conv1 has "params/Conv1/kernel" in Flax's layout, which differs from Keras'
for depthwise kernels alone. If the network's modules have other names than the layers, a name map translates them:
`names=lambda path: "/".join({"stem": "Conv1"}.get(part, part) for part in path)`.

Keras 3 numbers the variables of a layer. Their names are "params/Conv1/vars/0" and so on, until `resolve` finds their names in
the network. Older files of Keras 3 name a layer by class and number (`conv2d_1`). A `.keras` file also holds the layer's own
name; a `.weights.h5` file does not.

TensorFlow's padding "same", which is asymmetric at stride 2, is Flax's "SAME". Keras' batch norm has epsilon 1e-3, Flax's 1e-5.
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

from hast_jax.errors import UserError, pip_install
from hast_jax.networks.packed import check_archive, check_size

Shape = tuple[int, ...]

LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var", "depthwise_kernel": "kernel"}
STATISTICS = ("mean", "var")
# Sets of variables of a layer, in Keras' order, in which a number stands for one variable without doubt.
ORDERS = (("kernel",), ("kernel", "bias"), ("scale", "bias"), ("mean", "var"), ("scale", "bias", "mean", "var"))
CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
NO_LAYERS = ("optimizer", "optimizer_weights", "metrics")
NUMBERED = re.compile(r"(.+)/vars/(\d{1,4})")


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """State dict of an `.h5` file, with the names that the docstring of this module gives.

    Raises UserError if h5py is missing, and ValueError or OSError if the file is not valid.
    """
    return _read(path, path.stat().st_size, path, {})


def read_keras(path: Path) -> dict[str, np.ndarray]:
    """State dict of a `.keras` archive, as from `read_h5`."""
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        config, packed = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    return _read(io.BytesIO(packed), len(packed), path, config)


def resolve(found: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Name in the file -> name in the network, for each variable in `found` that has a number.

    found: names in the file, such as "params/Conv1/vars/0". expected: names in the network, such as "batch_stats/bn/mean". A
    layer is left out if it is not certain which variable each number stands for.
    """
    resolved: dict[str, str] = {}
    for layer, numbered in _layers(found).items():
        names = _leaves(layer, expected)
        if tuple(names) in ORDERS and len(names) == len(numbered):
            resolved |= dict(zip(numbered, names.values()))
    return resolved


def doubts(unknown: Collection[str], expected: Collection[str]) -> list[str]:
    """One clause of an error message for each layer of the network that `resolve` left out."""
    layers = {layer: (numbered, _leaves(layer, expected)) for layer, numbered in _layers(unknown).items()}
    return [
        f"the {len(numbered)} numbered arrays of {layer} could be any of {', '.join(names)} (save the model as .keras or .h5)"
        for layer, (numbered, names) in sorted(layers.items())
        if names
    ]


def is_numbered(name: str) -> bool:
    """Whether `name` gives only the number of a variable in its layer."""
    return NUMBERED.fullmatch(name) is not None


def depthwise(kernel: np.ndarray) -> np.ndarray:
    """[h, w, C, M] -> [h, w, 1, C * M]. Output m of input channel c has the number c * M + m, in Keras and in Flax."""
    height, width, channels, multiplier = kernel.shape
    return kernel.reshape(height, width, 1, channels * multiplier)


def as_expected(array: np.ndarray, wanted: Shape) -> np.ndarray:
    """A numbered variable. If it is the kernel of a depthwise convolution, it is reshaped to `wanted`, the network's shape."""
    is_depthwise = array.ndim == 4 and array.shape != wanted and math.prod(array.shape) == math.prod(wanted)
    return depthwise(array) if is_depthwise and wanted[:3] == (*array.shape[:2], 1) else array


def _layers(names: Collection[str]) -> dict[str, list[str]]:
    """Layer -> names of its numbered variables, in the order of the numbers."""
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
    """file: for h5py to open. size: of the file, in bytes. path: for messages. config: of the model, empty if unknown."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"reading {path} needs h5py: {pip_install('keras')}.") from error
    state: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as opened:
        config = config or json.loads(opened.attrs.get("model_config", "{}"))
        root = opened.get("model_weights", opened)  # in a whole model of Keras 2, a group; else the file
        found: dict[str, Any] = {}
        root.visititems(lambda name, each: found.update({name: each}))  # `visititems` follows no link out of the file
        arrays = {name: each for name, each in found.items() if isinstance(each, h5py.Dataset) and _is_weight(name)}
        for name, array in arrays.items():
            if array.external or array.is_virtual or array.dtype.hasobject:
                raise ValueError(f"{name} is not an array of numbers in the file itself")
        check_size(sum(map(_bytes, arrays.values())), size)
        name_of = _keras_3(found, config) if any(map(is_numbered, arrays)) else _keras_2(root)
        kernels = tuple(f"/{layer['config']['name']}/kernel" for _, layer in _groups(config) if _is_depthwise(layer))
        for source, array in arrays.items():
            name = name_of(source)
            if name in state:
                raise ValueError(f"two arrays in it have the name {name}")
            values = np.asarray(array)
            if array.attrs.get("dtype") == "bfloat16":  # HDF5 lacks this type: the array holds its bytes
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
    """Bytes that reading a dataset takes. Whole chunks are unpacked, even if the array is smaller."""
    return max(math.prod(array.shape), math.prod(array.chunks or ())) * array.dtype.itemsize


def _keras_2(root: Any) -> Callable[[str], str]:
    """A function, path in the file -> name: "block/block_1/conv/kernel:0" of layer "block" is "params/block/conv/kernel"."""
    said = [name for key, names in root.attrs.items() if re.fullmatch(r"layer_names\d*", key) for name in names]
    layers = [name.decode() if isinstance(name, bytes) else str(name) for name in said]

    def name_of(source: str) -> str:
        group = max((layer for layer in layers if source.startswith(f"{layer}/")), key=len, default=source.split("/")[0])
        # Inside its group, a variable's path has the layer's name once more, perhaps behind the model's name.
        inside = re.split(rf"(?:^|/){re.escape(group)}(?:_\d+)?/", source.removeprefix(f"{group}/"), maxsplit=1)[-1]
        *modules, variable = inside.partition(":")[0].split("/")
        return _named([*group.split("/"), *modules], LEAVES.get(variable, variable))

    return name_of


def _keras_3(found: Mapping[str, Any], config: Mapping[str, Any]) -> Callable[[str], str]:
    """A function, path in the file -> name: "layers/conv2d/vars/0" is "params/Conv1/vars/0" if that layer is Conv1."""
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
    """(group in a file of Keras 3, config) of each layer of a model, nested models included. Keras numbers groups so."""
    inner = config.get("config", {})
    counts: Counter[str] = Counter()
    for layer in inner if isinstance(inner, list) else inner.get("layers", []):
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", layer["class_name"])).lower()
        group = f"{place}layers/{kind}" + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        yield group, layer
        yield from _groups(layer, f"{group}/")
