"""A network of flax.nnx is quantized as it is: given in Python or in a file, with the weights that it holds or with a state."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny
from flax import nnx
from flax.traverse_util import flatten_dict
from nnx_networks import IMAGE, WORKING, Base, ManyKinds, Switched, trained
from test_any_network import FIELDS

import hast_jax
from hast_jax import from_config, networks
from hast_jax.errors import Notice, UserError
from hast_jax.given import Setting
from hast_jax.networks import from_nnx, inference, rules, user_files, weights
from hast_jax.networks.structure import logits_of

pytestmark = pytest.mark.usefixtures("little_optimization")

BITS = rules.normalise("w4a4")


def images(count: int = 4) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (count, *IMAGE))


def own_logits(model: nnx.Module) -> jax.Array:
    """What the network itself gives in inference."""
    inferring = nnx.clone(model)
    inferring.eval()
    return logits_of(inferring(images(), **({"train": False} if isinstance(model, Switched) else {})))


def logits(module: nn.Module, variables: Any) -> jax.Array:
    return networks.logits(networks.create(module, IMAGE), variables, images())


@pytest.mark.parametrize("make", WORKING)
def test_logits_are_those_of_the_network_itself(make: Callable[..., nnx.Module]) -> None:
    model = trained(make)
    expected = own_logits(model)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(logits(*from_nnx.linen(model)), expected, atol=1e-5)


@pytest.mark.parametrize("make", WORKING)
def test_every_layer_is_quantized(make: Callable[..., nnx.Module]) -> None:
    model = trained(make)
    kinds = nnx.Conv | nnx.Linear | nnx.LinearGeneral | nnx.Einsum
    layers = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, kinds)]
    student = networks.create(model, IMAGE, rules=BITS, learned_ranges=True)
    assert len(student.kernels) == len(layers) and not student.structure.constants
    assert len(student.sites) == len(student.structure.inputs) - 1  # all inputs of layers but the image


class WithAuxiliary(Base):
    """Holds what inference does not read: a head, a random key under a name of its own, and a second name of a weight."""

    def add(self, rngs):
        self.weight = self.stem.kernel
        self.auxiliary, self.random, self.mean = nnx.Linear(4, 10, rngs=rngs), rngs, jnp.ones(4)

    def middle(self, x):
        return (x - self.mean[None, None, None]) * jnp.mean(self.weight[...])


class UsesKernelAlone(Base):
    def add(self, rngs):
        self.cosine = nnx.Linear(4, 4, rngs=rngs)

    def middle(self, x):
        return x @ self.cosine.kernel[...]


def test_what_inference_does_not_read_is_left_out_however_the_weights_are_given(tmp_path: Path) -> None:
    model = trained(WithAuxiliary)
    expected = own_logits(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model, (nnx.Param, nnx.BatchStat)))
    states = [None, nnx.state(model), nnx.to_pure_dict(nnx.state(model)), hast_jax.read_weights(tmp_path / "state")]
    with ocp.StandardCheckpointer() as checkpointer:
        states.append(checkpointer.restore(tmp_path / "state"))
    for state in states:
        setting = Setting(model, state, IMAGE, None, None, "w4a4", 0, None, {}, None)
        assert not any("auxiliary" in name or "weight" in name for name in setting.variables["params"])
        np.testing.assert_allclose(logits(setting.model, setting.variables), expected, atol=1e-5)


def test_a_state_with_another_array_than_the_network_is_refused() -> None:
    model = trained(WithAuxiliary)
    state = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(UserError, match="the array mean of the state is not that of this WithAuxiliary"):
        from_nnx.linen(model, {**state, "mean": jnp.zeros(4)})


def test_a_layer_that_is_read_but_never_called_is_refused() -> None:
    with pytest.raises(UserError, match="UsesKernelAlone uses cosine/kernel but never calls its layer: call the layer instead"):
        Setting(trained(UsesKernelAlone), None, IMAGE, None, None, "w4a4", 0, None, {}, None)


def test_a_network_that_is_made_to_train_is_refused_with_the_attribute_to_change() -> None:
    class MadeToTrain(Base):
        training = True

        def __call__(self, x):
            return self.head(self.norm(self.stem(x), use_running_average=not self.training).mean((1, 2)))

    with pytest.raises(UserError, match="make it with training=False"):
        networks.create(trained(MadeToTrain), IMAGE)


def test_two_layers_that_share_a_weight_get_a_copy_each() -> None:
    class Tied(Base):
        def add(self, rngs):
            self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
            self.second.kernel = self.first.kernel

        def middle(self, x):
            return self.second(self.first(x))

    model = trained(Tied)
    for state in (None, nnx.state(model)):
        with pytest.warns(Notice, match="second shares a weight with another layer: each gets a copy of its own"):
            module, variables = from_nnx.linen(model, state)
        np.testing.assert_allclose(logits(module, variables), own_logits(model), atol=1e-5)


def test_names_are_those_of_the_same_network_in_linen() -> None:
    class InLinen(nn.Module):
        def setup(self) -> None:
            self.stem, self.norm = nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)
            self.blocks = [nn.Dense(4), [nn.Dense(4)]]
            self.gain = self.param("gain", nn.initializers.ones, (1, 1, 1, 4))
            self.head = nn.Dense(10)

        def __call__(self, x):
            x = nn.relu(self.norm(self.stem(x)))
            return self.head((self.blocks[1][0](self.blocks[0](x)) * self.gain).mean((1, 2)))

    class InNnx(Base):
        def add(self, rngs):
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.List([nnx.Linear(4, 4, rngs=rngs)])])
            self.gain = nnx.Param(jnp.ones((1, 1, 1, 4)))

        def middle(self, x):
            return self.blocks[1][0](self.blocks[0](x)) * self.gain[...]

    model = trained(InNnx)
    _, variables = from_nnx.linen(model)
    expected = own_logits(model)
    np.testing.assert_allclose(InLinen().apply(variables, images()), expected, atol=1e-5)
    # As a user would write the variables for the network in Linen.
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    written = weights.from_variables(InLinen(), {name: nnx.to_pure_dict(each) for name, each in states.items()}, IMAGE)
    np.testing.assert_allclose(InLinen().apply(written, images()), expected, atol=1e-5)


def flat(model: nnx.Module, separator: str, *kinds: Any) -> dict[str, np.ndarray]:
    state = flatten_dict(nnx.to_pure_dict(nnx.state(model, *kinds)))
    return {separator.join(map(str, path)): np.asarray(value) for path, value in state.items()}


def student_of(model: nnx.Module, variables: Any = None, **changes: Any) -> hast_jax.Student:
    given = np.asarray(images(32)), np.arange(32) % 10
    return hast_jax.quantize(model, variables, image=IMAGE, budget="trial", images=given, fields=FIELDS, **changes)


def test_a_network_becomes_a_student_that_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = trained(ManyKinds)
    before = flat(model, "/", nnx.Not(nnx.RngState))
    student = student_of(model, bits={"default": "w4a4", "listed_2_0": "w8a8"}, workdir=tmp_path / "run")
    assert student.codes()["named_grouped/kernel"]["bits"] == 4 and student.codes()["listed_2_0/kernel"]["bits"] == 8
    assert "<Student of ManyKinds," in repr(student) and student.record["network"] == "ManyKinds (given in Python)"
    assert not model.drop.deterministic and not model.norm.use_running_average  # it still trains
    jax.tree.map(np.testing.assert_array_equal, before, flat(model, "/", nnx.Not(nnx.RngState)))
    other = ManyKinds(rngs=nnx.Rngs(7))  # of which only the code counts
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        np.testing.assert_array_equal(hast_jax.load(tmp_path / "run", other)(images()), student(images()))
    exported = hast_jax.export(student, tmp_path / "student.onnx", images=images())
    assert exported.bytes == (tmp_path / "student.onnx").stat().st_size  # it was compared with the student before
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        again = student_of(model, bits={"default": "w4a4", "listed_2_0": "w8a8"}, workdir=tmp_path / "run")
    np.testing.assert_array_equal(again(images()), student(images()))


def test_the_pages_line_quantizes_a_network() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "docs" / "your_network.md").read_text(), re.DOTALL)
    line = next(block for block in blocks if "quantize(model, image=" in block)
    few = {"budget": "trial", "fields": FIELDS | {"synthesis.iterations": 1, "finetune.steps_per_epoch": 1}}
    page = {"hast_jax": SimpleNamespace(quantize=partial(hast_jax.quantize, **few)), "model": Base(rngs=nnx.Rngs(0))}
    exec(line, page)
    assert page["student"](np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 10)


def test_single_stages_take_the_network_alone() -> None:
    model = trained(Base)
    made, labels = hast_jax.synthesize(model, image=IMAGE, count=16, iterations=2)
    ranges = hast_jax.calibrate(model, None, made, bits="w3a3", fields={"calibration.batches": 1})
    few = {"finetune.steps_per_epoch": 2, "devices": 1}
    variables = hast_jax.finetune(model, None, ranges, made, labels, bits="w3a3", epochs=1, fields=few)
    pixels = np.zeros((16, *IMAGE), np.uint8)
    for found in (
        hast_jax.evaluate(model, None, pixels, labels, mean=0.5, std=0.25),
        hast_jax.evaluate(model, variables, pixels, labels, mean=0.5, std=0.25, bits="w3a3"),
    ):
        assert 0 <= found.top1 <= 100


STATES = {
    "State": nnx.state,
    "tree": lambda model: nnx.to_pure_dict(nnx.state(model)),
    "with slashes": lambda model: flat(model, "/", nnx.Not(nnx.RngState)),
    "with dots": lambda model: flat(model, ".", nnx.Any(nnx.Param, nnx.BatchStat)),
}


class Random(Base):
    def add(self, rngs):
        self.blocks, self.drop = nnx.List([nnx.Linear(4, 4, rngs=rngs)]), nnx.Dropout(0.5, rngs=rngs)

    def middle(self, x):
        return self.drop(self.blocks[0](x))


@pytest.mark.parametrize("form", STATES)
@pytest.mark.parametrize("abstract", [False, True])
def test_another_state_of_the_network_may_be_given(form: str, abstract: bool) -> None:
    model = trained(Random)
    empty = nnx.eval_shape(lambda: Random(rngs=nnx.Rngs(5))) if abstract else Random(rngs=nnx.Rngs(5))
    module, variables = from_nnx.linen(empty, STATES[form](model))
    variables = weights.from_variables(module, variables, IMAGE)
    np.testing.assert_allclose(logits(module, variables), own_logits(model), atol=1e-5)


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_a_file_of_a_state_is_read_for_a_network_in_a_file(form: str, tmp_path: Path) -> None:
    model = trained(Random)
    if form == "orbax":
        path = tmp_path / "checkpoint"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state(model))
    else:
        path = tmp_path / "net.safetensors"
        safetensors.numpy.save_file(flat(model, "/", nnx.Not(nnx.RngState)), path)
    config = tiny.config(teacher__network=f"{__file__}:Random", teacher__weights=str(path), teacher__image=IMAGE)
    config.teacher.mean, config.teacher.std = (0.0,) * 3, (1.0,) * 3
    teacher, variables = from_config.teacher(config)
    np.testing.assert_allclose(networks.logits(teacher, variables, images()), own_logits(model), atol=1e-5)


def test_weights_of_pytorch_fit_a_network_with_the_same_attributes() -> None:
    class Ported(Base):
        def add(self, rngs):
            self.blocks = nnx.List([nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))])

        def middle(self, x):
            return self.blocks[0](x)

    model = trained(Ported)
    ours = flat(model, ".")
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for name, array in ours.items():
        *modules, leaf = name.replace("layers.", "").split(".")
        state[".".join([*modules, names[leaf]])] = weights.to_torch_layout(array)
    assert "blocks.0.2.running_var" in state
    module, _ = from_nnx.linen(Ported(rngs=nnx.Rngs(5)))
    np.testing.assert_allclose(logits(module, weights.from_state_dict(module, state, IMAGE)), own_logits(model), atol=1e-5)


def test_the_constructor_gets_the_classes_and_random_numbers() -> None:
    module = user_files.make(f"{__file__}:Base", 7, {})
    assert networks.create(module, IMAGE).classes == 7 and inference.arguments(module) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("head"), "not the state of this Base: it lacks head/bias"),
        (lambda state: state.update(more={"bias": 1}), "not the state of this Base: it has more/bias besides"),
    ],
)
def test_the_state_of_another_network_is_refused(change: Callable[[dict], None], words: str) -> None:
    state = dict(nnx.to_pure_dict(nnx.state(trained(Base))))
    change(state)
    with pytest.raises(UserError, match=words):
        student_of(trained(Base), state)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="Base holds shapes instead of weights: give its state as the variables"):
        student_of(nnx.eval_shape(lambda: Base(rngs=nnx.Rngs(0))))


def without(member: Callable[[nnx.Rngs], Any], use: Callable[[Any, jax.Array], jax.Array] = lambda member, x: member(x)):
    """A network with this member between its batch norm and its last layer."""

    class Refused(Base):
        def add(self, rngs):
            self.inner = member(rngs)

        def middle(self, x):
            return use(self.inner, x)

    return Refused


class OwnCall(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class NoNorm(Base):
    def add(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)


class Compiled(Base):
    @nnx.jit
    def middle(self, x):
        return self.norm(x)


class Twins(Base):
    def add(self, rngs):
        self.blocks, self.blocks_0 = nnx.List([nnx.Linear(4, 4, rngs=rngs)]), nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without(lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)), "inner is a MultiHeadAttention: atten"),
        (without(lambda rngs: nnx.ConvTranspose(4, 4, (2, 2), rngs=rngs)), "inner is a ConvTranspose: a transposed convol"),
        (without(lambda rngs: nnx.Embed(4, 4, rngs=rngs)), "inner is a Embed: an embedding is not quantized"),
        (without(lambda rngs: nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)), "LoRALinear with a call of its own"),
        (without(lambda rngs: OwnCall(4, 4, rngs=rngs)), "is a OwnCall with a call of its own: use flax.nnx.Linear itself"),
        (without(lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs)), "is a DenseGeneral that is no linear layer"),
        (
            without(lambda rngs: nnx.Linear(4, 4, preferred_element_type=jnp.float32, rngs=rngs)),
            "inner has a preferred_element_type of its own: leave it out",
        ),
        (
            without(lambda rngs: nnx.Linear(4, 4, rngs=rngs), lambda layer, x: layer(x) @ layer.kernel[...].T),
            "uses the kernel of inner outside of this layer too",
        ),
        (without(lambda rngs: nnx.Param(jnp.ones((4, 4))), lambda w, x: x @ w[...]), r"weights that nothing quantizes \(inner"),
        (NoNorm, "NoNorm has no nn.BatchNorm"),
        (Compiled, "leave out nnx.jit, nnx.remat, nnx.scan and nnx.vmap around its layers"),
        (Twins, "Twins has two members that Linen would call blocks_0: rename one"),
    ],
)
def test_a_network_that_cannot_be_quantized_is_refused_with_the_reason(make: Callable[..., nnx.Module], words: str) -> None:
    with pytest.raises(UserError, match=words):
        networks.create(make(rngs=nnx.Rngs(0)), IMAGE, rules=BITS)


class Holder:
    """No nnx module, so nnx does not see the layer in it."""


class HiddenInNnx(Base):
    def add(self, rngs):
        self.holder = Holder()
        self.holder.layer = nnx.Linear(4, 4, rngs=rngs)

    def middle(self, x):
        return self.holder.layer(x)


def test_a_layer_that_nnx_does_not_see_stays_in_full_precision_with_a_notice() -> None:
    with pytest.warns(Notice, match="HiddenInNnx multiplies activations with arrays that are not among its variables"):
        networks.create(HiddenInNnx(rngs=nnx.Rngs(0)), IMAGE, rules=BITS)


def test_pretrain_asks_for_a_network_in_linen(tmp_path: Path) -> None:
    arguments = [
        f"--config.teacher.network={__file__}:Base",
        "--config.teacher.image=8,8,3",
        f"--output={tmp_path}/t.safetensors",
    ]
    config = [f"--config={tiny.ROOT}/configs/digits.py", "--config.teacher.mean=0,0,0", "--config.teacher.std=1,1,1"]
    done = tiny.call([*tiny.module("pretrain"), *config, *arguments])
    assert done.returncode == 1 and "pretrain trains networks of flax.linen: train Base in your own code" in done.stderr
