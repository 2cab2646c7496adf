"""Names of weights behind a prefix or of one's own, and values that no network has."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from strangers import CALL, IMAGE, Net, by_name, same, take, values

from hast_jax.errors import UserError
from hast_jax.networks import names as names_lib
from hast_jax.networks import weights


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


@pytest.mark.parametrize(("also", "words"), [("n_averaged", None), ("criterion.weight", "criterion.weight is unknown")])
def test_a_tensor_without_the_prefix_of_the_others_is_named_alone(also: str, words: str | None) -> None:
    state = torch_names(values(), "module.") | {also: np.ones(3, np.float32)}
    if words is None:
        assert same(take(state), values())
        return
    with pytest.raises(UserError, match=rf"without the 'module.' before each name, .*\): {words} \(leave out"):
        take(state)


@pytest.mark.parametrize("form", ["params.{}", "net.params.{}", "{}"])
def test_kernels_are_in_flaxs_layout_whatever_separates_their_names(form: str) -> None:
    variables = values()

    def named(path):
        return ".".join(path) if form == "params.{}" else form.format("-".join(path[:-1]) + "." + path[-1])

    state = {named(tuple(name.split("/"))): array for name, array in by_name(variables).items()}
    assert same(take(state, names=named), variables)
    assert form != "params.{}" or same(take(state), variables)


def test_behind_a_prefix_a_fault_has_the_files_name() -> None:
    state = torch_names(values(), "module.")
    state["module.stem.bias"] = np.zeros(7, np.float32)
    with pytest.raises(UserError, match=r"without the 'module.' before each name, .*: module.stem.bias has the shape \(7,\)"):
        take(state)


def test_names_that_are_all_others_are_counted_and_one_of_each_kind_shown() -> None:
    state = {f"layer{i}.w": array for i, array in enumerate(torch_names(values(), "").values())}
    words = "9 of its 9 tensors are missing and 9 others are unknown, because the network's names are like "
    with pytest.raises(UserError, match=f"{words}batch_stats/block/bn/mean and the names in the weights like layer0.w "):
        take(state)
    with pytest.raises(UserError, match=r"9 of its 9 tensors are missing, such as batch_stats/block/bn/mean\.$"):
        take({})


def test_arrays_of_another_byte_order_are_read_and_bfloat16_in_a_file_of_numpy_is_named() -> None:
    variables = values()
    assert same(take({name: array.astype(">f4") for name, array in by_name(variables).items()}), variables)
    narrow = by_name(variables) | {"params/stem/bias": np.zeros(4, "V2")}
    with pytest.raises(UserError, match=r"params/stem/bias holds \|V2, numbers without a type \(bfloat16\?\): save float32"):
        take(narrow)


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
        f"the weights do not fit the network on images of {IMAGE}: "
        "batch_stats/block/bn/mean is missing; batch_stats/block/bn/var is missing; "
        "params/more is unknown; params/head/bias holds int32 instead of floating point numbers; "
        "params/stem/bias has the shape (9,) instead of (4,)."
    )
    assert same(weights.from_variables(Net(), {"params": params, "batch_stats": stats, "ranges": {}}, IMAGE, CALL), variables)


@pytest.mark.parametrize("separator", [None, "/", "."])
def test_variables_may_be_flat_as_in_a_file(separator: str | None) -> None:
    variables = values()
    assert same(weights.from_variables(Net(), flatten_dict(variables, sep=separator), IMAGE, CALL), variables)
    assert same(weights.from_variables(Net(), torch_names(variables, ""), IMAGE, CALL), variables)
    with pytest.raises(UserError, match="3 is unknown"):
        weights.from_variables(Net(), flatten_dict(variables, sep=separator) | {3: np.zeros(3, np.float32)}, IMAGE, CALL)


def test_the_path_of_a_file_is_refused_with_what_reads_it() -> None:
    with pytest.raises(UserError, match=r"path 'net.h5': read the file, and give hast_jax.read_weights\('net.h5'\)"):
        weights.from_variables(Net(), Path("net.h5"), IMAGE, CALL)


def test_weights_for_training_alone_are_named_as_what_to_leave_out() -> None:
    more = by_name(values()) | {"params/auxiliary/bias": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=r"auxiliary/bias is unknown \(leave out the weights of parts that the network uses in"):
        take(more)


def test_a_network_that_fails_on_the_image_is_named_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"^Net fails on an image \(6, 6, 2\): TypeError: .*'train'; give an image and arguments that its"
    ):
        weights.abstract_variables(Net(), IMAGE)
