"""Any network written in Flax is quantized as it is: the arrays that its layers get in the compiled program say so."""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_networks
import pytest
from flax.linen import linear
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from sklearn.datasets import load_digits

import hast_jax
from hast_jax import networks
from hast_jax.networks import conv, inference, rules, weights

pytestmark = pytest.mark.usefixtures("little_optimization")

NETWORKS = plain_networks.NETWORKS
BITS = 3
# Of a run of seconds.
FIELDS = {
    "devices": 1,
    "report": False,
    "steps_per_call": 1,
    "synthesis.images": 32,
    "synthesis.batch": 16,
    "synthesis.iterations": 3,
    "calibration.batches": 2,
    "calibration.batch": 16,
    "finetune.epochs": 1,
    "finetune.steps_per_epoch": 3,
    "finetune.batch": 8,
}
NETWORK = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def given(name: str) -> SimpleNamespace:
    """A network with random weights and statistics, images, and the function that its own `apply` is."""
    module, image = NETWORKS[name]
    call = inference.arguments(module)
    variables = random_variables(module, image, call)
    images = jax.random.normal(jax.random.key(1), (4, *image))

    def apply(variables, images):
        return module.apply(variables, images, **call)

    return SimpleNamespace(module=module, image=image, call=call, variables=variables, images=images, apply=apply, students={})


def random_variables(module: nn.Module, image: tuple[int, ...], call: dict) -> dict:
    """Weights, and statistics of batch norms far from those of a fresh network."""
    shapes = jax.eval_shape(functools.partial(module.init, **call), jax.random.key(0), jnp.zeros((1, *image)))
    rng = np.random.default_rng(0)
    make = {
        "kernel": lambda shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])),
        "bias": lambda shape: rng.normal(size=shape) / 5,
        "mean": lambda shape: rng.normal(size=shape) / 2,
        "scale": lambda shape: rng.uniform(0.5, 1.5, shape),
        "var": lambda shape: rng.uniform(0.3, 2, shape),
    }
    flat = flatten_dict(shapes)
    return unflatten_dict({path: jnp.asarray(make[path[-1]](leaf.shape), jnp.float32) for path, leaf in flat.items()})


@NETWORK
def test_full_precision_is_the_networks_own_apply(name: str) -> None:
    its = given(name)
    teacher = networks.create(its.module, its.image, fast_convolution=False)
    assert teacher.classes == 10

    def logits(variables, images):
        return networks.logits(teacher, variables, images)

    expected = its.apply(its.variables, its.images)
    assert logits(its.variables, its.images).dtype == jnp.float32 and np.ptp(expected) > 0.1
    np.testing.assert_array_equal(logits(its.variables, its.images), expected)
    # A compiled program that casts bfloat16 to float32 leaves out the rounding before it.
    own = jax.jit(lambda variables, images: jnp.asarray(its.apply(variables, images), jnp.float32))
    np.testing.assert_array_equal(jax.jit(logits)(its.variables, its.images), own(its.variables, its.images))


@NETWORK
def test_the_fast_convolution_changes_rounding_alone(name: str) -> None:
    its = given(name)
    teacher = networks.create(its.module, its.image)

    def loss(logits):
        return (jnp.sum(jnp.sin(jnp.asarray(logits, jnp.float32))), logits)

    slow, fast = (
        jax.jit(jax.grad(lambda images: loss(logits(its.variables, images)), has_aux=True))(its.images)
        for logits in (its.apply, lambda variables, images: networks.logits(teacher, variables, images))
    )
    rounding = 1e-5 if name not in ("bfloat16", "sequential") else 2**-6
    for ours, its_own in zip(fast, slow):
        close(ours, its_own, rounding)


def close(ours: Any, expected: Any, relative: float) -> None:
    """As arrays: the distance relative to the largest value."""
    ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
    assert np.abs(ours - expected).max() <= relative * np.abs(expected).max()


class Product(NamedTuple):
    """What a layer really gets. axis: of the kernel's output channels."""

    path: str
    x: np.ndarray
    kernel: np.ndarray
    axis: int

    def weight_levels(self) -> int:
        """The most in one output channel."""
        channels = np.moveaxis(self.kernel, self.axis, 0)
        return max(levels(channel) for channel in channels)


class Record:
    """The products of a compiled program, in any order."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.products: list[Product] = []
        watched_lax, watched_jnp = Watched(lax), Watched(jnp)
        watched_lax.conv_general_dilated = self._look(lax.conv_general_dilated, lambda kernel, *_: kernel.ndim - 1)
        watched_lax.dot_general = self._look(lax.dot_general, _free_axis)
        watched_jnp.einsum = lambda text, *arrays, **named: self._look(
            functools.partial(jnp.einsum, text), lambda *_: _einsum_axis(text)
        )(*arrays, **named)
        patch.setattr(linear, "lax", watched_lax)
        patch.setattr(linear, "jnp", watched_jnp)
        patch.setattr(conv, "conv", self._look(conv.conv, lambda *_: 3))

    def _look(self, function: Callable, axis_of: Callable) -> Callable:
        def product(x: Any, kernel: Any, *arguments: Any, **named: Any) -> Any:
            path, axis = "/".join(nn.module._context.module_stack[-1].path), axis_of(kernel, *arguments[:1])

            def plain(array):
                return np.asarray(array).astype(np.float32)

            jax.debug.callback(lambda *arrays: self.products.append(Product(path, *map(plain, arrays), axis)), x, kernel)
            return function(x, kernel, *arguments, **named)

        return product


class Watched:
    """A module of which a few functions are replaced."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _free_axis(kernel: Any, numbers: Any) -> int:
    [axis] = set(range(kernel.ndim)) - set(numbers[0][1]) - set(numbers[1][1])
    return axis


def _einsum_axis(text: str) -> int:
    inputs, kernel = text.partition("->")[0].split(",")
    [letter] = set(kernel) - set(inputs)
    return kernel.index(letter)


def levels(array: np.ndarray) -> int:
    return len(np.unique(array))


def quantized(name: str, bits: Any, patch: pytest.MonkeyPatch, fast: bool) -> tuple[networks.Network, list[Product]]:
    """A calibrated student, and what its layers get when it is called."""
    its = given(name)
    student = networks.create(its.module, its.image, rules=rules.normalise(bits), fast_convolution=fast)
    ranges = jax.jit(lambda x: networks.observe(student, its.variables, {}, x))(its.images)
    record = Record(patch)
    logits = jax.jit(lambda x: networks.logits(student, {**its.variables, "ranges": ranges}, x))(its.images)
    jax.effects_barrier()
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ranges))
    assert len(record.products) == len(student.structure.inputs)
    return student, record.products


@pytest.mark.parametrize("fast", [False, True])
@NETWORK
def test_each_layer_gets_at_most_2_to_the_k_values(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, which gets the image as it is."""
    student, products = quantized(name, f"w{BITS}a{BITS}", monkeypatch, fast)
    its = given(name)
    kernels = {"/".join(path[1:-1]): leaf for path, leaf in flatten_dict(its.variables).items() if path[-1] == "kernel"}
    assert {product.path for product in products} == set(kernels)
    images = [np.asarray(its.images.astype(dtype), np.float32) for dtype in (jnp.float32, jnp.bfloat16)]
    readers = [product for product in products if any(np.array_equal(product.x, same) for same in images)]
    assert [product.path for product in readers] == ["/".join(student.structure.layers[0].path)]
    for product in products:
        assert product.weight_levels() <= 2**BITS, product.path
        assert product is readers[0] or 2 < levels(product.x) <= 2**BITS, product.path
        # Each weight is next to the one that was trained: the range is that of its channel.
        trained = np.asarray(kernels[product.path])
        step = np.ptp(trained, tuple(set(range(trained.ndim)) - {product.axis}), keepdims=True) / (2**BITS - 1)
        assert np.all(np.abs(product.kernel - trained) <= 1.01 * step), product.path


@NETWORK
def test_rules_give_layers_their_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and last in 8 bits, the image too, as the rule names its layer."""
    paths = ["/".join(layer.path) for layer in networks.create(*NETWORKS[name]).structure.layers]
    ends = paths[0], paths[-1]
    _, products = quantized(name, {"default": (BITS, BITS), f"^{ends[0]}|^{ends[1]}": (8, 8)}, monkeypatch, fast=True)
    for product in products:
        most = 2**8 if product.path in ends else 2**BITS
        assert product.weight_levels() <= most and levels(product.x) <= most, product.path
        assert product.path not in ends or levels(product.x) > 2**BITS


@pytest.mark.parametrize("bits", [(BITS, None), (None, BITS), {"default": (BITS, BITS), "Conv_2": None}], ids=str)
def test_a_part_may_stay_in_full_precision(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, weights, or one layer."""
    _, products = quantized("vgg", bits, monkeypatch, fast=True)
    own = given("vgg").variables["params"]
    for product in products:
        for_weights, for_inputs = bits if isinstance(bits, tuple) else (None, None) if product.path == "Conv_2" else (3, 3)
        if for_weights is None:
            np.testing.assert_array_equal(product.kernel, own[product.path]["kernel"])
        assert product.weight_levels() <= 2**BITS or for_weights is None
        if product.path != "Conv_0":
            assert (levels(product.x) > 2**BITS) == (for_inputs is None)


QUICK = ("shared", "bfloat16")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_every_stage_works_and_leaves_nothing_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = given(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    environment = dict(os.environ)
    student = quantize(its, FIELDS)
    assert not list((tmp_path / "here").iterdir()) and dict(os.environ) == environment
    logits = student(its.images)
    assert logits.shape == (4, 10) and np.isfinite(logits).all()
    student.save(tmp_path / "student")
    np.testing.assert_array_equal(hast_jax.load(tmp_path / "student", its.module)(its.images), logits)
    # Kernels move onto their grids even without training; other parameters move only by training.
    before, after = flatten_dict(its.variables["params"]), flatten_dict(student.variables["params"])
    assert any(not np.array_equal(before[path], after[path]) for path in before if path[-1] != "kernel")


def quantize(its: SimpleNamespace, fields: dict, **arguments: Any) -> hast_jax.Student:
    """`hast_jax.quantize` of a network, of images that are normalised already."""
    zeros, ones = (0.0,) * its.image[-1], (1.0,) * its.image[-1]
    bits = f"w{BITS}a{BITS}"
    return hast_jax.quantize(
        its.module, its.variables, image=its.image, mean=zeros, std=ones, bits=bits, budget="trial", fields=fields, **arguments
    )


def test_residual_branches_end_at_their_last_batch_norm() -> None:
    def paths(name):
        return ["/".join(call.path) for call in networks.create(*NETWORKS[name]).branches]

    def norms(name):
        return ["/".join(call.path) for call in networks.create(*NETWORKS[name]).structure.norms]

    assert paths("resnet") == [f"ResNetBlock_{i}/BatchNorm_1" for i in range(9)]
    assert paths("mobilenetv2") == ["expanded_conv_project_BN", *(f"block_{i}_project_BN" for i in range(1, 5))]
    assert paths("mobilenetv3") == ["first_project", "second_project"]
    for name in ("vgg", "densenet", "shared", "frozen", "sequential"):
        assert paths(name) == norms(name) and len(norms(name)) >= 2


def keras_layers(variables: dict) -> dict[str, dict[str, np.ndarray]]:
    """The variables as Keras' layers have them."""
    leaves = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    layers: dict[str, dict[str, np.ndarray]] = {}
    for (_, layer, leaf), value in flatten_dict(variables).items():
        array = np.asarray(value)
        if layer.endswith("depthwise"):
            leaf, array = "depthwise_kernel", np.swapaxes(array, 2, 3)  # [h, w, channels, 1]
        elif layer.endswith(("BN", "bn", "bn_Conv1")):
            leaf = leaves[leaf]
        layers.setdefault(layer, {})[leaf] = array
    return layers


@pytest.mark.parametrize("whole", [False, True])
def test_kerass_weights_are_those_of_the_same_network_in_flax(tmp_path: Path, whole: bool) -> None:
    """As `model.save_weights("x.h5")` and `model.save("x.h5")` of Keras 2 write them."""
    h5py = pytest.importorskip("h5py", reason="Keras' files need h5py: pip install 'hast_jax[keras]'")
    its = given("mobilenetv2")
    with h5py.File(tmp_path / "keras.h5", "w") as file:
        root = file.create_group("model_weights") if whole else file
        layers = keras_layers(its.variables)
        root.attrs["layer_names"] = [name.encode() for name in ("input_1", *layers, "out_relu")]
        root.create_group("input_1").attrs["weight_names"] = []
        for layer, arrays in layers.items():
            root.create_group(layer).attrs["weight_names"] = [f"{layer}/{leaf}:0".encode() for leaf in arrays]
            for leaf, array in arrays.items():
                root[layer][f"{layer}/{leaf}:0"] = array
    state, _ = weights.read(tmp_path / "keras.h5")
    read = weights.from_state_dict(its.module, state, its.image, call={"train": False})
    jax.tree.map(np.testing.assert_array_equal, read, its.variables)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))


Compiled = nn.jit(Block)


class OfCompiled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(Compiled(name="compiled")(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


def test_a_network_with_a_compiled_part_is_not_mistaken_for_its_student() -> None:
    """`nn.jit` keeps what it traced; the teacher, the student and the network itself share nothing of it."""
    module, image = OfCompiled(), (8, 8, 3)
    variables, images = random_variables(module, image, {}), jax.random.normal(jax.random.key(0), (4, *image))
    teacher, student = networks.create(module, image), networks.create(module, image, rules=rules.normalise("w3a3"))
    quantized = {**variables, "ranges": networks.observe(student, variables, {}, images)}
    logits, taps = networks.apply(student, quantized, images)
    assert len(taps.activations) == 2 and all(levels(each) <= 2**BITS for each in taps.activations.values())
    full, _ = networks.apply(teacher, variables, images)
    close(full, module.apply(variables, images), 1e-6)
    assert np.abs(full - logits).max() > 0.01


class Infers(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(10)(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_a_network_that_is_transformed_as_a_whole_is_quantized_like_the_network_itself(transform: Any) -> None:
    image, given = (8, 8, 3), random_variables(Infers(), (8, 8, 3), {})
    images, logits = jax.random.normal(jax.random.key(0), (4, *image)), []
    for module in (Infers(), transform(Infers)()):
        student = networks.create(module, image, rules=rules.normalise("w3a3"))
        ranges = networks.observe(student, given, {}, images)
        logits.append(networks.logits(student, {**given, "ranges": ranges}, images))
    close(logits[0], logits[1], 1e-6)


class Small(nn.Module):
    """What learns the digits in seconds."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        for width, stride in ((16, 1), (16, 1), (32, 2)):
            x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def train(module: nn.Module, images: np.ndarray, labels: np.ndarray, steps: int) -> dict:
    """A plain loop of optax."""
    variables = module.init(jax.random.key(0), images[:1])
    transform = optax.adam(3e-3)

    @jax.jit
    def step(state: Any, key: jax.Array) -> Any:
        variables, moments = state
        rows = jax.random.choice(key, len(images), (64,))

        def loss(params: Any) -> Any:
            logits, new = module.apply({**variables, "params": params}, jnp.asarray(images)[rows], mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[rows]).mean(), new

        gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, moments = transform.update(gradient, moments)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, moments

    state = variables, transform.init(variables["params"])
    for i in range(steps):
        state = step(state, jax.random.key(i))
    return state[0]


@pytest.mark.slow
def test_a_trained_network_is_better_after_fine_tuning_than_before() -> None:
    digits = load_digits()
    pixels, labels = np.uint8(np.round(digits.images[..., None] * 255 / 16)), digits.target.astype(np.int32)
    mean, std = 0.3, 0.38
    module = Small()
    variables = train(module, np.float32((pixels / 255 - mean) / std)[:1200], labels[:1200], steps=200)
    fields = {"devices": 1, "synthesis.images": 128, "synthesis.iterations": 40, "calibration.batches": 10}
    fields |= {"finetune.steps_per_epoch": 50, "finetune.lr": 1e-4, "eval.every": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = hast_jax.quantize(
            module,
            variables,
            image=(8, 8, 1),
            mean=(mean,),
            std=(std,),
            bits="w3a3",
            budget="trial",
            test=(pixels[1200:], labels[1200:]),
            fields=fields,
        )
    record = student.record
    assert record["teacher"] > 90 and record["last"] > record["no_finetuning"] + 1, record
    right = np.argmax(student(pixels[1200:]), -1) == labels[1200:]
    assert 100 * right.mean() == pytest.approx(record["last"], abs=0.2)
