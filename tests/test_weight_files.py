"""Weights in folders of Orbax, files of Flax and of PyTorch, and files that lie."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
from flax.core import freeze
from flax.training import train_state
from orbax.checkpoint import v1
from strangers import CALL, H5PY, IMAGE, Net, Plain, load, same, values

from hast_jax.errors import UserError
from hast_jax.networks import weights

TrainState = train_state.TrainState


class State(TrainState):
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
def test_a_folder_of_orbax_is_read_and_of_its_steps_the_newest(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = values()
    WRITERS[writer](tmp_path / "saved", jax.tree.map(jnp.asarray, variables))
    assert same(load(tmp_path / "saved"), variables)
    monkeypatch.chdir(tmp_path)
    assert same(load(Path("saved")), variables)


AROUND: dict[str, Callable[[Any], Any]] = {
    "a train state": trained,
    "a train state by name": lambda tree: {"state": trained(tree), "epoch": np.zeros(())},
    "variables as params": lambda tree: {"params": tree, "step": np.ones(())},
    "a train state of all variables": lambda tree: TrainState.create(
        apply_fn=None, params=jax.tree.map(jnp.asarray, tree), tx=optax.adam(1e-3)
    ),
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
    words = r"cannot be read as .*; if the file is damaged, copy or download it again.$"
    with tiny.Memory() as memory, pytest.raises(UserError, match=words) as error:
        weights.read(path)
    assert "\n" not in str(error.value) and memory.most < 2**27


def test_an_ending_that_no_reader_has_is_named_with_those_that_have_one(tmp_path: Path) -> None:
    for name, words in (("a.onnx", "ends in '.onnx'"), ("a", "has no ending")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{words}.*folder of Orbax, or a file that ends in \.safe.*\.keras, .*\.bin;"):
            weights.read(tmp_path / name)


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
