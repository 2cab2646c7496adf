"""Weights in files of Keras 2 and 3, whose layers have names or numbers."""

import io
import itertools
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from strangers import H5PY, Net, Plain, Renamed, by_name, load, same, values

from hast_jax.errors import UserError
from hast_jax.networks import keras_files, weights


def keras_layers(variables: Any, multiplier: int = 2) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Layer -> its variables in Keras' order and under Keras' names; the layers of a nested model are "block/..."."""
    flat = by_name(variables)
    order = {"kernel": "kernel", "scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    layers: dict[str, list[tuple[str, np.ndarray]]] = {}
    for layer, (leaf, name) in itertools.product(("stem", "block/dw", "block/bn", "head"), order.items()):
        for collection in ("params", "batch_stats"):
            if (array := flat.get(f"{collection}/{layer}/{leaf}")) is not None:
                called = "bias" if name == "beta" and layer != "block/bn" else name
                depth = (called, array.reshape(3, 3, -1, multiplier)) if layer == "block/dw" else (called, array)
                layers.setdefault(layer, []).append(depth)
    return layers


def keras_2(path: Path, variables: Any, whole: bool) -> Path:
    """As `model.save_weights("x.h5")` of Keras 2, or as `model.save("x.h5")` of Keras 3, whose depthwise kernels are kernels.

    The head belongs to a second model of the process.
    """
    h5py = pytest.importorskip("h5py", reason=H5PY)
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole else file
        root.attrs["layer_names"] = [b"stem", b"re_lu", b"block", b"head"]
        root.create_group("re_lu").attrs["weight_names"] = []
        for layer, arrays in keras_layers(variables).items():
            outer, _, inner = layer.rpartition("/")
            group = root.require_group(outer or inner)
            for name, array in arrays:
                if whole:
                    group[f"net/{layer}/{name}"] = array
                else:
                    name = "depthwise_kernel" if inner == "dw" else name
                    group[f"{'head_1' if inner == 'head' else inner}/{name}:0"] = array
        if whole:
            file.attrs["model_config"] = json.dumps(config())
            file.create_group("optimizer_weights")["Adam/iterations:0"] = np.int64(3)
    return path


CLASSES = {
    "stem": "layers/conv2d",
    "block": "layers/functional",
    "block/dw": "layers/functional/layers/depthwise_conv2d",
    "block/bn": "layers/functional/layers/batch_normalization",
    "head": "layers/dense",
}


def keras_3(file: Any, variables: Any, named: bool = True) -> None:
    """As Keras 3 writes weights: groups called by class, from 3.7 on with the layers' names as attributes."""
    h5py = pytest.importorskip("h5py", reason=H5PY)
    layers = keras_layers(variables)
    with h5py.File(file, "w") as opened:
        for layer, group in CLASSES.items():
            numbered = opened.create_group(f"{group}/vars")
            for number, (_, array) in enumerate(layers.get(layer, [])):
                numbered[str(number)] = array
            if named:
                numbered.attrs["name"] = layer.split("/")[-1]
        opened["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
        opened["optimizer/vars/0"] = np.int64(3)


def config(scale: bool = True) -> dict:
    def layer(kind, name, **more):
        return {"class_name": kind, "config": {"name": name, **more}}

    inner = [layer("DepthwiseConv2D", "dw"), layer("BatchNormalization", "bn", scale=scale, center=True)]
    outer = [layer("Conv2D", "stem"), layer("Functional", "block", layers=inner), layer("Dropout", "d"), layer("Dense", "head")]
    return layer("Functional", "net", layers=outer)


def keras_archive(path: Path, variables: Any, scale: bool = True) -> Path:
    """A `.keras` of an early Keras 3, whose layers have names in its config alone."""
    content = io.BytesIO()
    keras_3(content, variables, named=False)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(config(scale)))
        file.writestr("model.weights.h5", content.getvalue())
    return path


@pytest.mark.parametrize("whole", [False, True])
def test_legacy_files_of_weights_and_of_models_are_read(tmp_path: Path, whole: bool) -> None:
    variables = values()
    assert same(load(keras_2(tmp_path / "a.h5", variables, whole)), variables)


def test_a_slash_in_a_layers_name_parts_modules(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason=H5PY)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names0"], file.attrs["layer_names1"] = [b"a"], [b"a/b"]
        file["a/a/kernel:0"] = file["a/b/a/b/kernel:0"] = np.zeros(3)
    assert weights.read(tmp_path / "a.h5")[0].keys() == {"params/a/kernel", "params/a/b/kernel"}


def test_the_numbered_weights_of_keras_3_are_told_apart_by_the_network(tmp_path: Path) -> None:
    variables = values()
    keras_3(tmp_path / "a.weights.h5", variables)
    assert same(load(tmp_path / "a.weights.h5"), variables)


def test_weights_of_keras_in_bfloat16_are_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason=H5PY)
    variables = values(Plain())
    keras_3(tmp_path / "a.weights.h5", variables)
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        half = file["layers/conv2d/vars/1"][()].astype(jnp.bfloat16)
        del file["layers/conv2d/vars/1"]
        file.create_dataset("layers/conv2d/vars/1", data=half).attrs["dtype"] = "bfloat16"
    bias = load(tmp_path / "a.weights.h5", Plain())["params"]["stem"]["bias"]
    np.testing.assert_array_equal(bias, half.astype(np.float32))


def test_an_archive_of_keras_says_what_its_layers_are_called(tmp_path: Path) -> None:
    variables = values()
    assert same(load(keras_archive(tmp_path / "a.keras", variables)), variables)


def test_a_batch_norm_of_three_numbered_variables_is_refused_unless_the_archive_says_which(tmp_path: Path) -> None:
    variables = values(Net(scale=False))
    keras_3(tmp_path / "a.weights.h5", variables)
    with pytest.raises(UserError, match="the 3 numbered arrays of params/block/bn could be any of bias, mean, var"):
        load(tmp_path / "a.weights.h5", Net(scale=False))
    assert same(load(keras_archive(tmp_path / "a.keras", variables, scale=False), Net(scale=False)), variables)


def test_layers_of_other_names_are_found_by_a_name_map(tmp_path: Path) -> None:
    variables = values(Renamed())
    theirs = {"stem": variables["params"]["first"], "head": variables["params"]["last"]}
    keras_3(tmp_path / "a.weights.h5", {"params": theirs})
    called = {"first": "stem", "last": "head"}

    def names(path):
        return "/".join(called.get(part, part) for part in path)

    assert same(load(tmp_path / "a.weights.h5", Renamed(), names=names), {"params": variables["params"]})


@pytest.mark.parametrize("multiplier", [1, 3])
def test_a_depthwise_kernel_does_what_it_does_in_keras(multiplier: int) -> None:
    """Keras: output channel c * multiplier + m is channel c through kernel[:, :, c, m]."""
    random = np.random.default_rng(0)
    kernel, image = random.normal(size=(3, 3, 2, multiplier)), random.normal(size=(1, 3, 3, 2))
    theirs = [(image[0, ..., c] * kernel[..., c, m]).sum() for c in range(2) for m in range(multiplier)]
    conv = nn.Conv(2 * multiplier, (3, 3), padding="VALID", feature_group_count=2, use_bias=False)
    ours = conv.apply({"params": {"kernel": keras_files.depthwise(kernel)}}, image)
    np.testing.assert_allclose(ours[0, 0, 0], theirs, rtol=1e-5)


def test_the_padding_same_of_keras_is_flaxs() -> None:
    """At stride 2 an image of 6 is padded after its end alone: the first window begins in the corner."""
    image, corner = np.arange(36.0).reshape(1, 6, 6, 1), np.zeros((3, 3, 1, 1))
    corner[0, 0] = 1
    ours = nn.Conv(1, (3, 3), 2, use_bias=False).apply({"params": {"kernel": corner}}, image)
    np.testing.assert_array_equal(ours[0, ..., 0], image[0, ::2, ::2, 0])


def test_without_h5py_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").touch()
    with pytest.raises(UserError, match=r"a\.h5 needs h5py: pip install 'h5py'\.$"):
        weights.read(tmp_path / "a.h5")
