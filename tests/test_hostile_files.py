"""A weight file from a stranger cannot run code, write a file or fill the memory: it ends in one sentence."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from hast_jax import networks
from hast_jax.errors import UserError
from hast_jax.networks import weights
from hast_jax.runs.checkpoint import Checkpoints


def npy(shape: tuple[int, ...], content: bytes = b"\0" * 64) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def npz(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path.with_suffix(".npz"), "w", compression) as archive:
        archive.writestr("weight.npy", content)
    return path.with_suffix(".npz")


def safetensors(path: Path, header: dict, content: bytes = b"\0" * 64, length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return path


def entry(shape: list[int], size: int) -> dict:
    return {"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}


FORGED: dict[str, Callable[[Path], Path]] = {
    "npz with a shape of terabytes": lambda path: npz(path, npy((10**12,))),
    "npz with a shape that overflows": lambda path: npz(path, npy((2**31, 2**31, 4))),
    "npz that is a zip bomb": lambda path: npz(path, npy((2**26,), bytes(2**28)), zipfile.ZIP_DEFLATED),
    "safetensors with a shape of terabytes": lambda path: safetensors(path, entry([10**12], 4 * 10**12)),
    "safetensors whose shape is not that of its data": lambda path: safetensors(path, entry([10**6], 64)),
    "safetensors with a huge header": lambda path: safetensors(path, entry([16], 64), length=2**62),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused_without_filling_the_memory(tmp_path: Path, kind: str) -> None:
    path = FORGED[kind](tmp_path / "forged")
    with tiny.Memory() as memory, pytest.raises(UserError, match="cannot be read"):
        weights.read(path)
    assert memory.most < 2**27


def test_a_pth_file_that_is_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    path = npz(tmp_path / "bomb", bytes(2**28), zipfile.ZIP_DEFLATED).rename(tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="weights hardly compress"):
        weights.read(path)


def test_a_training_checkpoint_is_no_state_dict_and_the_message_says_what_to_save(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    torch.save({"epoch": 3, "state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"some entries are no tensors \('epoch', 'state_dict'\); save the state dict alone"):
        weights.read(tmp_path / "checkpoint.pth")


def test_a_pth_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "caught",)

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="holds more than tensors, which is never loaded"):
        weights.read(tmp_path / "trap.pth")
    assert not (tmp_path / "caught").exists()


def zeros(model: nn.Module) -> weights.StateDict:
    shapes = weights.abstract_variables(model)
    return weights.to_state_dict(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))


def test_a_pth_file_whose_tensors_repeat_one_number_takes_no_memory(tmp_path: Path) -> None:
    """A view of 64 GiB into four bytes, which is all that the file holds."""
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    model = networks.module("resnet20", 10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    state = {name: torch.from_numpy(array) for name, array in weights.to_state_dict(model, variables).items()}
    torch.save(state | {"output.bias": torch.zeros(1).expand(2**34)}, tmp_path / "a.pth")
    read, _ = weights.read(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"output.bias has the shape \(17179869184,\) instead of \(10,\)"):
        weights.from_state_dict(model, read)


def test_a_name_that_is_a_path_is_only_an_unknown_name(tmp_path: Path) -> None:
    model, path = networks.module("resnet20", 10), tmp_path / "a.safetensors"
    path.write_bytes(weights.encoded(zeros(model) | {"../../escape": np.zeros(3, np.float32)}, {}))
    with pytest.raises(UserError, match=r"fit the network on images of .*: \.\./\.\./escape is unknown"):
        weights.from_state_dict(model, weights.read(path)[0])
    assert list(tmp_path.iterdir()) == [path]


def test_whole_numbers_are_no_weights_and_half_precision_is() -> None:
    model = networks.module("resnet20", 10)
    state = zeros(model)
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    assert jax.tree.leaves(weights.from_state_dict(model, halves))[0].dtype == np.float32
    with pytest.raises(UserError, match=r"output\.bias holds int64 instead of floating point numbers"):
        weights.from_state_dict(model, state | {"output.bias": np.zeros(10, np.int64)})


@pytest.mark.parametrize(
    ("shape", "rows", "whole"), [((3, 4), None, True), ((9, 4), None, False), ((9, 4), 9, True), ((9, 4), 8, False)]
)
def test_a_checkpoint_with_other_shapes_is_passed_over_before_it_is_read(
    tmp_path: Path, shape: tuple[int, int], rows: int | None, whole: bool
) -> None:
    like = {"a": np.zeros((3, 4), np.float32)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": np.ones(shape, np.float32)})
        if whole:
            assert checkpoints.restore(like, rows)["a"].shape == shape
        else:
            with pytest.raises(UserError, match="no checkpoint"):
                checkpoints.restore(like, rows)
