"""Where people have their weights: folders of Orbax, files of Flax and of Keras, and names behind a prefix."""

import io
import itertools
import json
import math
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import freeze
from flax.training import train_state
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1

from hast_jax.errors import UserError
from hast_jax.networks import keras_files, weights
from hast_jax.networks import names as names_lib

IMAGE = (6, 6, 2)
CALL = {"train": False}


class Block(nn.Module):
    """Depthwise, as Keras' `DepthwiseConv2D(3, depth_multiplier=2)`, and a batch norm with some of its parts."""

    scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        x = nn.Conv(2 * channels, (3, 3), feature_group_count=channels, use_bias=False, name="dw")(x)
        return nn.BatchNorm(not train, use_scale=self.scale, epsilon=1e-3, name="bn")(x)


class Net(nn.Module):
    """A network of a stranger: `train` has no default, and it returns logits alone."""

    scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), 2, name="stem")(x)
        x = nn.relu(Block(self.scale, name="block")(x, train))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Plain(nn.Module):
    """Without batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(3, name="head")(nn.Conv(4, (3, 3), name="stem")(x).mean((1, 2)))


class Renamed(nn.Module):
    """`Plain` with other names."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(3, name="last")(nn.Conv(4, (3, 3), name="first")(x).mean((1, 2)))


NET = Net()


def values(model: nn.Module = NET, seed: int = 0) -> dict[str, Any]:
    """Random variables of a network, as NumPy's arrays; each one is another."""
    random = np.random.default_rng(seed)
    shapes = weights.abstract_variables(model, IMAGE, CALL)
    return jax.tree.map(lambda leaf: random.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)


def by_name(variables: Any) -> dict[str, np.ndarray]:
    return flatten_dict(variables, sep="/")


def take(state: Any, model: nn.Module = NET, **arguments: Any) -> Any:
    return weights.from_state_dict(model, state, IMAGE, call=CALL, **arguments)


def load(path: Path, model: nn.Module = NET, **arguments: Any) -> Any:
    return take(weights.read(weights.locate(str(path)))[0], model, **arguments)


def same(ours: Any, theirs: Any) -> bool:
    ours, theirs = by_name(ours), by_name(theirs)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


class State(train_state.TrainState):
    batch_stats: Any = None


def trained(variables: Any) -> State:
    params, stats = (jax.tree.map(jnp.asarray, variables[name]) for name in ("params", "batch_stats"))
    return State.create(apply_fn=None, params=params, tx=optax.adam(1e-3), batch_stats=stats)


# Orbax


def standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def pytree(path: Path, tree: Any) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def manager(path: Path, tree: Any) -> None:
    with ocp.CheckpointManager(path) as steps:
        for step in (2, 10):
            steps.save(step, args=ocp.args.StandardSave(jax.tree.map(lambda leaf: leaf * (step == 10), tree)))
        steps.wait_until_finished()


def manager_of_items(path: Path, tree: Any) -> None:
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(step_prefix="epoch")) as steps:
        arguments = {"state": ocp.args.StandardSave(tree), "config": ocp.args.JsonSave({"epochs": 3})}
        steps.save(7, args=ocp.args.Composite(**arguments))
        steps.wait_until_finished()


WRITERS = {"v1": v1.save, "standard": standard, "pytree": pytree, "manager": manager, "items of a step": manager_of_items}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_of_orbax_is_read_and_of_its_steps_the_newest(tmp_path: Path, writer: str) -> None:
    variables = values()
    WRITERS[writer](tmp_path / "saved", jax.tree.map(jnp.asarray, variables))
    assert same(load(tmp_path / "saved"), variables)


AROUND: dict[str, Callable[[Any], Any]] = {
    "a train state": trained,
    "a train state by name": lambda tree: {"state": trained(tree), "epoch": np.zeros(())},
    "variables as params": lambda tree: {"params": tree, "step": np.ones(())},
}
READ: dict[str, Callable[[Path, Any], Any]] = {
    "orbax": lambda path, tree: [standard(path, tree), load(path)][1],
    "msgpack": lambda path, tree: [path.write_bytes(flax.serialization.to_bytes(tree)), load(path)][1],
    "python": lambda _, tree: weights.from_variables(Net(), freeze(flax.serialization.to_state_dict(tree)), IMAGE, CALL),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", READ)
def test_of_what_a_training_leaves_only_the_variables_are_taken(tmp_path: Path, kind: str, around: str) -> None:
    variables = values()
    assert same(READ[kind](tmp_path / "saved.msgpack", AROUND[around](variables)), variables)


@pytest.mark.parametrize("writer", ["v1", "standard", "msgpack"])
def test_params_alone_are_the_variables_of_a_network_without_batch_norm(tmp_path: Path, writer: str) -> None:
    variables, path = {"params": values(Plain())["params"]}, tmp_path / "saved.msgpack"
    if writer == "msgpack":
        path.write_bytes(flax.serialization.to_bytes(variables["params"]))
    else:
        WRITERS[writer](path, jax.tree.map(jnp.asarray, variables["params"]))
    assert same(load(path, Plain()), variables)


def test_weights_of_two_networks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes({"student": values(), "teacher": values()}))
    with pytest.raises(UserError, match="more than one network, student/params and teacher/params: save the variables of one"):
        weights.read(tmp_path / "a.msgpack")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(UserError, match="is a folder without an Orbax checkpoint: give a file of weights, or the folder Orbax"):
        weights.read(weights.locate(str(tmp_path)))


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    variables = values()
    standard(tmp_path / "3", variables)
    standard(tmp_path / "4.orbax-checkpoint-tmp-1", values(seed=1))
    assert same(load(tmp_path), variables)


# Files that lie


def forged_orbax(path: Path) -> Path:
    """Its one array claims 14 GiB, in the metadata of the array itself."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, {"params": {"kernel": np.zeros((3, 4), np.float32)}})
    array = path / "params.kernel" / ".zarray"
    array.write_text(json.dumps(json.loads(array.read_text()) | {"shape": [60000, 60000]}))
    return path


def h5(path: Path, shape: tuple[int, ...], **arguments: Any) -> Path:
    h5py = pytest.importorskip("h5py", reason=H5PY)
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("conv/conv/kernel:0", shape, "f4", **arguments)
    return path.with_suffix(".h5")


def archive(path: Path, content: bytes, name: str = "model.weights.h5") -> Path:
    with zipfile.ZipFile(path.with_suffix(".keras"), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", "{}")
        file.writestr(name, content)
    return path.with_suffix(".keras")


def msgpack(path: Path, content: bytes) -> Path:
    path.with_suffix(".msgpack").write_bytes(content)
    return path.with_suffix(".msgpack")


H5PY = "Keras' files need h5py: pip install 'hast_jax[keras]'"
WHOLE = flax.serialization.to_bytes({"params": {"kernel": np.zeros((30, 4), np.float32)}})
FORGED: dict[str, Callable[[Path], Path]] = {
    "orbax with a shape of gigabytes": forged_orbax,
    "h5 with a shape of terabytes": lambda path: h5(path, (10**12,), chunks=(100,)),
    "h5 with a shape that overflows": lambda path: h5(path, (2**31, 2**31, 4), chunks=(1, 1, 4)),
    "h5 with a chunk of gigabytes": lambda path: h5(path, (1,), maxshape=(None,), chunks=(2**29,)),
    "h5 whose numbers are in another file": lambda path: h5(path, (4,), external=[("/etc/hostname", 0, 16)]),
    "h5 that is none": lambda path: [path.with_suffix(".h5").write_bytes(b"no"), path.with_suffix(".h5")][1],
    "keras that is a zip bomb": lambda path: archive(path, bytes(2**28)),
    "keras without weights": lambda path: archive(path, b"", "other"),
    "msgpack that is cut off": lambda path: msgpack(path, WHOLE[:-30]),
    "msgpack of one number": lambda path: msgpack(path, b"\x07"),
    "msgpack with a list of gigabytes": lambda path: msgpack(path, b"\xdd\xff\xff\xff\xff"),
    "msgpack of a thousand levels": lambda path: msgpack(path, b"\x81\xa1a" * 5000 + b"\x01"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused_in_one_sentence_without_filling_the_memory(tmp_path: Path, kind: str) -> None:
    if "h5" in kind or "keras" in kind:
        pytest.importorskip("h5py", reason=H5PY)
    path = FORGED[kind](tmp_path / "forged")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"cannot be read as .*; if the file is damaged, copy or download it again.$") as error:
        weights.read(path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_an_ending_that_no_reader_has_is_named_with_those_that_have_one(tmp_path: Path) -> None:
    for name, words in (("a.onnx", "ends in '.onnx'"), ("a", "has no ending")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{words}.*folders of Orbax and files that end in \.safe.*\.keras, .*\.bin\."):
            weights.read(tmp_path / name)


# Keras


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
    with pytest.raises(UserError, match=r"a\.h5 needs h5py: pip install 'hast_jax\[keras\]'\.$"):
        weights.read(tmp_path / "a.h5")


# Names


def torch_names(variables: Any, prefix: str) -> dict[str, np.ndarray]:
    state = {names_lib.torch(tuple(name.split("/"))): weights.to_torch_layout(a) for name, a in by_name(variables).items()}
    return {prefix + name: array for name, array in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.backbone.net."])
def test_names_of_pytorch_are_the_modules_own_behind_any_prefix(prefix: str) -> None:
    variables = values()
    state = torch_names(variables, prefix)
    assert f"{prefix}block.bn.running_var" in state and state[f"{prefix}block.dw.weight"].shape == (8, 1, 3, 3)
    assert same(take(state | {f"{prefix}block.bn.num_batches_tracked": np.asarray(1)}), variables)


def test_a_prefix_of_flax_and_of_keras_is_one_behind_the_collection() -> None:
    variables = values()
    state = {name.replace("/", "/model_1/", 1): array for name, array in by_name(variables).items()}
    assert "batch_stats/model_1/block/bn/mean" in state and same(take(state), variables)


def test_behind_a_prefix_a_fault_has_the_files_name() -> None:
    state = torch_names(values(), "module.")
    state["module.stem.bias"] = np.zeros(7, np.float32)
    with pytest.raises(UserError, match=r"without the 'module.' before each name, .*: module.stem.bias has the shape \(7,\)"):
        take(state)


def test_names_that_are_all_others_are_counted_and_one_of_each_kind_shown() -> None:
    state = {f"layer{i}.w": array for i, array in enumerate(torch_names(values(), "").values())}
    words = r"9 of its 9 tensors are missing and 9 others are unknown, because its names are like batch_stats/block/bn/mean"
    with pytest.raises(UserError, match=f"{words} and the file's like layer0.w "):
        take(state)
    with pytest.raises(UserError, match=r"9 of its 9 tensors are missing, such as batch_stats/block/bn/mean\.$"):
        take({})


def test_a_map_of_ones_own_replaces_those_of_the_libraries() -> None:
    variables = values()

    def mine(path):
        return f"mine.{'-'.join(path)}"

    assert weights.name_map(Net(), None, IMAGE, mine, CALL)["mine.params-stem-bias"] == ("params", "stem", "bias")
    state = {mine(tuple(name.split("/"))): weights.to_torch_layout(array) for name, array in by_name(variables).items()}
    assert same(take(state, names=mine), variables)
    with pytest.raises(UserError, match="9 of its 9 tensors are missing"):
        take(by_name(variables), names=mine)


# Values and networks


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("params/stem/kernel", math.nan, "holds numbers that are not finite"),
        ("batch_stats/block/bn/mean", math.inf, "holds numbers that are not finite"),
        ("batch_stats/block/bn/var", -1e-3, "holds a variance below zero"),
    ],
)
def test_values_that_no_network_has_are_refused_by_name(name: str, value: float, words: str) -> None:
    state = by_name(values())
    state[name].flat[1] = value
    with pytest.raises(UserError, match=f"^the weights are damaged: {name} {words}.$"):
        take(state)


def test_variables_in_python_are_checked_as_those_of_files() -> None:
    variables = values()
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.from_variables(Net(), half, IMAGE, CALL))} == {jnp.dtype("float32")}
    params, stats = variables["params"], variables["batch_stats"]
    wrong = {"stem": params["stem"] | {"bias": np.zeros(9, np.float32)}, "more": np.zeros(1, np.float32)}
    integer = {"head": params["head"] | {"bias": np.zeros(3, np.int32)}}
    with pytest.raises(UserError) as error:
        weights.from_variables(Net(), {"params": params | wrong | integer, "batch_stats": {}}, IMAGE, CALL)
    assert str(error.value) == (
        "the weights do not fit the network: batch_stats/block/bn/mean is missing; batch_stats/block/bn/var is missing; "
        "params/more is unknown; params/head/bias holds int32 instead of floating point numbers; "
        "params/stem/bias has the shape (9,) instead of (4,)."
    )
    assert same(weights.from_variables(Net(), {"params": params, "batch_stats": stats, "ranges": {}}, IMAGE, CALL), variables)


def test_a_network_that_fails_on_the_image_is_named_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"^Net fails on an image \(6, 6, 2\): TypeError: .*'train'; give an image and arguments that its"
    ):
        weights.abstract_variables(Net(), IMAGE)


# PyTorch


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda torch: [torch.zeros(1)], "holds one list instead of a state dict"),
        (lambda torch: torch.zeros(1), "holds one Tensor instead of a state dict"),
        (lambda torch: {"a": torch.quantize_per_tensor(torch.zeros(1), 0.1, 0, torch.qint8)}, "'a' in .* is quantized"),
        (lambda torch: {"a": torch.zeros(2, 2).to_sparse()}, "'a' in .* is sparse"),
    ],
    ids=["list", "tensor", "quantized", "sparse"],
)
def test_a_file_of_pytorch_that_is_no_state_dict_says_what_it_holds(tmp_path: Path, make: Callable, words: str) -> None:
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    torch.save(make(torch), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"{words}.*: save the state dict"):
        weights.read(tmp_path / "a.pth")


@pytest.mark.parametrize("ending", ["pt", "pth.tar", "ckpt", "bin"])
def test_other_endings_of_pytorchs_files_are_read_as_pth(tmp_path: Path, ending: str) -> None:
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    torch.save({"module.a.weight": torch.ones(2)}, tmp_path / f"a.{ending}")
    state, _ = weights.read(tmp_path / f"a.{ending}")
    assert list(state) == ["module.a.weight"] and state["module.a.weight"].tolist() == [1, 1]
