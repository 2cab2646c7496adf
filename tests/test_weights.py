"""Weight files: what is imported, what is refused and in which words."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import from_config, networks
from hast_jax.errors import Notice, UserError
from hast_jax.networks import weights

pytestmark = pytest.mark.usefixtures("little_optimization")


def state_dict(seed: int = 0, name: str = "resnet20", classes: int = 10) -> tuple[networks.ResNet, weights.StateDict]:
    model = networks.module(name, classes)
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    return model, weights.to_state_dict(model, variables)


@pytest.mark.parametrize(("name", "tensors"), [("resnet20", 107), ("resnet18", 102), ("resnet8", 47), ("mobilenetv1", 137)])
def test_export_and_import_are_inverse(name: str, tensors: int) -> None:
    model, state = state_dict(name=name)
    assert len(state) == tensors
    again = weights.to_state_dict(model, weights.from_state_dict(model, state))
    assert all(np.array_equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "parameters", "batch_norms", "branches"),
    [
        ("resnet18", 11_689_512, 20, 8),
        ("mobilenetv1", 4_231_976, 27, 13),
        ("mobilenetv2", 3_504_960, 53, 17),
        ("mobilenetv2_torchvision", 3_504_872, 52, 17),
    ],
)
def test_imagenet_networks_have_the_published_size_and_the_methods_taps(
    name: str, parameters: int, batch_norms: int, branches: int
) -> None:
    """Sizes: pytorchcv's and torchvision's own counts."""
    model = networks.module(name, 1000)
    shapes = weights.abstract_variables(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters
    network = networks.create(model, (224, 224, 3))
    logits, taps = jax.eval_shape(partial(networks.apply, network), shapes, jnp.zeros((2, 224, 224, 3)))
    assert logits.shape == (2, 1000) and (len(taps.batch_norms), len(taps.branches)) == (batch_norms, branches)


@pytest.mark.parametrize(
    ("name", "library", "examples"),
    [
        ("resnet18", "torchvision", ["conv1.weight", "bn1.bias", "layer2.0.downsample.1.running_var", "fc.bias"]),
        ("mobilenetv1", "pytorchcv", ["features.stage4.unit6.dw_conv.bn.weight", "output.bias"]),
        ("mobilenetv2", "pytorchcv", ["features.stage1.unit1.conv1.conv.weight", "features.final_block.bn.weight"]),
        ("mobilenetv2_torchvision", "torchvision", ["features.1.conv.1.weight", "features.18.0.weight", "classifier.1.bias"]),
    ],
)
def test_names_are_those_of_the_library_and_each_is_one_variables(name: str, library: str, examples: list[str]) -> None:
    model = networks.module(name, 10)
    names = weights.name_map(model, library)
    assert names.keys() >= set(examples)
    assert len(names) == len(jax.tree.leaves(weights.abstract_variables(model)))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_are_read_back(tmp_path, suffix: str) -> None:
    _, state = state_dict()
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        path.write_bytes(weights.encoded(state, {"mean": "[0.5]", "crop": "0.9", "dataset": "mine", "test_top1": "12.5"}))
    read, metadata = weights.read(path)
    assert all(np.array_equal(read[key], state[key]) for key in state)
    if suffix == ".safetensors":
        assert metadata == weights.Metadata("mine", (0.5,), None, 0.9, 12.5)


def test_a_pth_file_is_read_as_weights_only(tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch: pip install -e '.[torch]'")
    _, state = state_dict()
    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    torch.save(tensors, tmp_path / "teacher.pth")
    torch.save({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "half.pth")
    read, _ = weights.read(tmp_path / "teacher.pth")
    assert all(np.array_equal(read[key], state[key]) for key in state)
    read, _ = weights.read(tmp_path / "half.pth")
    assert all(np.allclose(read[key], state[key], rtol=2**-8) for key in state)


def test_missing_unknown_and_misshapen_tensors_are_named() -> None:
    model, state = state_dict()
    del state["features.stage1.unit2.body.conv1.bn.running_var"]
    state["features.stage9.conv.weight"] = np.zeros(3, np.float32)
    state["output.weight"] = np.zeros((7, 64), np.float32)
    with pytest.raises(UserError) as error:
        weights.from_state_dict(model, state)
    message = str(error.value)
    assert "features.stage1.unit2.body.conv1.bn.running_var is missing" in message
    assert "features.stage9.conv.weight is unknown" in message
    assert "output.weight has the shape (7, 64) instead of (10, 64)" in message


def test_arrays_of_pytorch_that_are_no_kernels_keep_their_layout_but_vectors_may_lie_along_another_axis() -> None:
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            shapes = {"gate": (4, 4), "place": (1, 8, 8, 4), "gain": (1, 1, 1, 4)}
            gate, place, gain = (self.param(name, nn.initializers.ones, shape) for name, shape in shapes.items())
            return nn.Dense(3, name="head")((nn.Conv(4, (3, 3), name="conv")(x) * gain + place).mean((1, 2)) + gate[:1])

    shapes = {"gate": (4, 4), "place": (1, 8, 8, 4), "gain": (1, 4, 1, 1), "conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}
    shapes |= {"head.weight": (3, 4), "head.bias": (3,)}
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    found = weights.from_state_dict(Own(), state, (8, 8, 3))
    params = found["params"]
    for name in ("gate", "place"):
        np.testing.assert_array_equal(params[name], state[name])
    np.testing.assert_array_equal(params["gain"].ravel(), state["gain"].ravel())
    np.testing.assert_array_equal(params["conv"]["kernel"], state["conv.weight"].transpose(2, 3, 1, 0))
    with pytest.raises(UserError, match=r"place has the shape \(1, 4, 8, 8\) instead of \(1, 8, 8, 4\)"):
        weights.from_state_dict(Own(), state | {"place": state["place"].transpose(0, 3, 1, 2)}, (8, 8, 3))


def test_two_variables_of_one_name_are_refused() -> None:
    class Twice(nn.Module):
        def setup(self) -> None:
            self.first, self.second = nn.Dense(3), nn.Dense(3)

        def state_dict_names(self) -> dict:
            return {"mine": lambda path: f"layer.{path[-1]}"}

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    with pytest.raises(UserError, match=r"params/first/bias and params/second/bias the same name 'layer.bias'"):
        weights.name_map(Twice())


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (7, 2, 3), (4, 5, 2, 3)])
def test_layouts_of_any_number_of_axes_are_inverse(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    torch_layout = weights.to_torch_layout(array)
    assert torch_layout.shape == ((*reversed(shape[-2:]), *shape[:-2]) if len(shape) > 1 else shape)
    np.testing.assert_array_equal(weights.to_our_layout(torch_layout), array)


def test_batch_counters_of_pytorch_are_ignored() -> None:
    model, state = state_dict()
    weights.from_state_dict(model, state | {"features.init_block.bn.num_batches_tracked": np.asarray(3)})


@pytest.mark.parametrize(("name", "content"), [("a.safetensors", b"not weights"), ("a.npz", b"PK"), ("a.txt", b"")])
def test_a_file_that_is_no_weight_file_is_refused_in_one_sentence(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        weights.read(tmp_path / name)


def test_pickled_arrays_are_not_loaded(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", weight=np.asarray([{"code": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="holds Python objects, which are never loaded"):
        weights.read(tmp_path / "a.npz")


def test_a_path_without_a_file_names_the_built_in_teachers() -> None:
    with pytest.raises(UserError, match="digits, cifar10, cifar100"):
        weights.locate("no/such/file.safetensors")


def config_for(weights_name: str) -> ConfigDict:
    config = config_lib.default()
    config.teacher.weights = weights_name
    return config


def test_a_teacher_of_another_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"output.weight has the shape \(10, 64\) instead of \(100, 64\)"):
        from_config.teacher(config_for("cifar10"))


def test_a_teacher_trained_with_another_normalisation_is_refused() -> None:
    config = config_for("cifar100")
    config.teacher.mean = (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"was trained for the mean .* not config.teacher.mean"):
        from_config.teacher(config)


def test_a_teacher_trained_for_another_crop_is_refused(tmp_path) -> None:
    _, state = state_dict()
    (tmp_path / "a.safetensors").write_bytes(weights.encoded(state, {"crop": "0.9655"}))
    config = config_for(str(tmp_path / "a.safetensors"))
    config.teacher.classes = 10
    with pytest.raises(UserError, match=r"was trained for the crop 0.9655, not config.eval.crop 0.875"):
        from_config.teacher(config)
    config.eval.crop = 224 / 232
    from_config.teacher(config)


@pytest.mark.parametrize("written", ["[0.4, 0.4, 0.4]", "(0.4, 0.4, 0.4)", " 0.4 "])
def test_numbers_in_metadata_may_be_written_as_in_json_or_python(tmp_path, written: str) -> None:
    _, state = state_dict()
    (tmp_path / "a.safetensors").write_bytes(weights.encoded(state, {"mean": written}))
    config = config_for(str(tmp_path / "a.safetensors"))
    config.teacher.classes, config.teacher.mean = 10, (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"was trained for the mean .* not config.teacher.mean"):
        from_config.teacher(config)
    config.teacher.mean = (0.4, 0.4, 0.4)
    from_config.teacher(config)


@pytest.mark.parametrize(
    "said",
    ["as usual", "1+2j", "1is", "[True]", "-" * 900 + "1", "1" + "0" * 400, "[" + "0," * 10**5 + "0]"],
    ids=lambda t: t[:9],
)
def test_metadata_of_another_meaning_are_ignored_with_a_short_notice(tmp_path, said: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(weights.encoded({"a": np.zeros(2, np.float32)}, {"mean": said}))
    with pytest.warns(Notice, match=r"its mean, '.*, is no list of numbers and is ignored") as told:
        assert weights.read(tmp_path / "a.safetensors")[1].mean is None
    assert len(told) == 1 and len(str(told[0].message)) < 400


def test_an_archive_of_python_objects_is_refused_with_how_to_save_arrays(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", variables={"params": {"kernel": np.zeros(3)}})
    with pytest.raises(
        UserError, match=r"holds Python objects, which are never loaded: save one array for each name, as numpy.sa"
    ):
        weights.read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", weights.BUILT_IN)
def test_every_built_in_teacher_carries_its_metadata(name: str) -> None:
    _, metadata = weights.read(weights.locate(name))
    assert metadata.dataset == name and metadata.mean and metadata.std and metadata.top1 > 60
