"""What cannot be quantized without data is refused in one sentence that says why, before any work."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import hast_jax
from hast_jax import networks
from hast_jax.deliver import report
from hast_jax.errors import UserError
from hast_jax.networks import rules
from hast_jax.student import Student

IMAGE = (8, 8, 3)


class Base(nn.Module):
    """A network that can be quantized; each one below spoils one thing."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = self.middle(nn.relu(self.norm(train)(x)))
        return self.logits(nn.Dense(10, name="head")(x.reshape((len(x), -1))))

    def norm(self, train):
        return nn.BatchNorm(use_running_average=not train, name="norm")

    def middle(self, x):
        return x

    def logits(self, x):
        return x


class NoNorm(Base):
    def norm(self, train):
        return lambda x: x


class LayerNorm(Base):
    def norm(self, train):
        return nn.LayerNorm()


class NoLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x).mean((1, 2))


class Attention(Base):
    def middle(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x.reshape((len(x), -1, 4)))


class OwnAttention(Base):
    def middle(self, x):
        q, k, v = (nn.Dense(4)(x.reshape((len(x), -1, 4))) for _ in range(3))
        return jnp.einsum("nqk,nkc->nqc", nn.softmax(jnp.einsum("nqc,nkc->nqk", q, k)), v)


class OwnKernel(Base):
    def middle(self, x):
        return x @ self.param("mixing", nn.initializers.lecun_normal(), (4, 4))


class InLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)).mean((1, 2))
        return nnx.bridge.to_linen(nnx.Linear, 4, 10, name="head")(x)


class OwnSwitch(Base):
    @nn.compact
    def __call__(self, x, *, is_train=True):
        return super().__call__(x, is_train)


class Transposed(Base):
    def middle(self, x):
        return nn.ConvTranspose(4, (2, 2), (2, 2), name="up")(x)


class TwoAxes(Base):
    def middle(self, x):
        return nn.DenseGeneral((2, 3), name="heads")(x)


class TwoLetters(Base):
    def middle(self, x):
        return nn.Einsum((4, 2, 3), "nhwc,cde->nhwde", name="heads")(x)


class OneAxisForEachRow(Base):
    def middle(self, x):
        return nn.Einsum((8, 4, 3), "nhwc,hcd->nhwd", name="rows")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), None


class Scanned(Base):
    def middle(self, x):
        scan = nn.scan(Step, variable_axes={"params": 0, "hast_jax": 0}, split_rngs={"params": True}, length=3)
        return scan(name="loop")(x, None)[0]


class ScannedOnce(Base):
    """With one kernel for all steps."""

    def middle(self, x):
        scan = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return scan(name="loop")(x, None)[0]


class Mapped(Base):
    def middle(self, x):
        return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4, name="each")(x)


class WeightNorm(Base):
    def middle(self, x):
        return nn.WeightNorm(nn.Dense(4), name="normed")(x)


class StandardisedConv(nn.Conv):
    def param(self, name, *arguments, **named):
        value = super().param(name, *arguments, **named)
        return value - value.mean((0, 1, 2), keepdims=True) if name == "kernel" else value


class Standardised(Base):
    def middle(self, x):
        return StandardisedConv(4, (3, 3), name="standard")(x)


class Transformed(Base):
    def middle(self, x):
        def half(tree):
            return jax.tree.map(lambda leaf: leaf / 2, tree)

        return nn.map_variables(nn.Dense, "params", half, init=self.is_initializing())(4, name="halved")(x)


class OwnProduct(Base):
    def middle(self, x):
        return nn.Dense(
            4, dot_general=lambda a, b, *rest, **named: jax.lax.dot_general(a, jnp.tanh(b), *rest, **named), name="own"
        )(x)


class Tied(Base):
    def middle(self, x):
        dense = nn.Dense(4, name="tied")
        return dense(x) @ dense.variables["params"]["kernel"].T


class Ranges(Base):
    def middle(self, x):
        return x + self.variable("ranges", "offset", jnp.zeros, ()).value


class Normalised(nn.Module):
    """Over two axes at once."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return nn.Dense(10)(nn.BatchNorm(use_running_average=True, axis=(2, 3), name="norm")(x).mean((1, 2)))


class ChannelsFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, axis=1, name="norm")(nn.Conv(4, (3, 3))(x).transpose(0, 3, 1, 2))
        return nn.Dense(10)(x.mean((2, 3)))


class Halved(nn.BatchNorm):
    def __call__(self, x):
        return super().__call__(x, use_running_average=True) / 2


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(Halved(name="norm")(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


CompiledDense = nn.jit(nn.Dense)


class CompiledTwice(Base):
    """Of two equal modules under nn.jit, the second runs what was traced of the first."""

    def middle(self, x):
        return CompiledDense(4, name="b")(nn.relu(CompiledDense(4, name="a")(x)))


class Masked(Base):
    def middle(self, x):
        return nn.Conv(4, (1, 1), mask=jnp.ones((1, 1, 4, 4)), name="sparse")(x)


class OwnDense(nn.Dense):
    def __call__(self, x):
        return super().__call__(2 * x)


class OwnCall(Base):
    def middle(self, x):
        return OwnDense(4, name="double")(x)


class TrainFirst(Base):
    @nn.compact
    def __call__(self, train, x):
        return super().__call__(x, train)


class Embedded(Base):
    def middle(self, x):
        return x + nn.Embed(3, 4, name="table")(jnp.zeros(len(x), jnp.int32))[:, None, None]


class Fails(Base):
    def middle(self, x):
        return x @ jnp.zeros((7, 7))


class Trains(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        return nn.Dense(10)(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


class Maps(Base):
    def logits(self, x):
        return x[:, None]


class OfTheBatch(Base):
    def logits(self, x):
        return x.mean(0)


class Needs(nn.Module):
    @nn.compact
    def __call__(self, x, temperature):
        return nn.Dense(10)(nn.BatchNorm(use_running_average=True)(x).mean((1, 2))) / temperature


class AlwaysTraining(Base):
    def norm(self, train):
        return nn.BatchNorm(use_running_average=False, name="norm")


class MadeToTrain(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


def refused(module: Any, words: str, bits: Any = "w4a4", **arguments: Any) -> str:
    with pytest.raises(UserError, match=words) as error:
        networks.create(module, IMAGE, rules=rules.normalise(bits), **arguments)
    message = str(error.value)
    assert re.fullmatch(r"(?!.*\. [A-Z]).*\.", message), message  # one sentence on one line
    return message


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NoNorm(), "NoNorm has no nn.BatchNorm"),
        (LayerNorm(), "LayerNorm has no nn.BatchNorm: .* cannot be quantized without data"),
        (NoLayer(), "NoLayer has no nn.Conv or nn.Dense"),
        (Attention(), "has attention, a MultiHeadDotProductAttention: attention multiplies activations"),
        (OwnAttention(), "multiplies activations with each other"),
        (OwnKernel(), r"weights that nothing quantizes \(mixing\)"),
        (InLinen(), "holds head, a flax.nnx module, whose layers cannot be found there: write the whole network in"),
        (
            OwnSwitch(),
            "normalises in norm with the moments of the batch, .* set is_train=False in its call, by the argument call or",
        ),
        (Transposed(), "has up, a ConvTranspose: a transposed convolution is not quantized"),
        (TwoAxes(), "heads is a DenseGeneral that is no linear layer"),
        (TwoLetters(), "heads is an Einsum 'nhwc,cde->nhwde' that is no linear layer"),
        (OneAxisForEachRow(), "rows is an Einsum 'nhwc,hcd->nhwd' that is no linear layer"),
        (Scanned(), "loop.* in a loop"),
        (ScannedOnce(), "loop.* in a loop"),
        (Mapped(), "each in a loop"),
        (WeightNorm(), "has normed, a WeightNorm: its weights are computed from others"),
        (Standardised(), "computes the weights of standard from its kernel"),
        (Transformed(), "computes the weights of halved from its kernel"),
        (OwnProduct(), "computes the weights of own from its kernel"),
        (Tied(), "uses the kernel of tied outside of this layer too"),
        (Ranges(), "has a collection named ranges"),
        (MadeToTrain(), r"normalises in norm with the moments of the batch, as in training: make it with train=False"),
        (Normalised(), r"norm has its channels on the axis \(2, 3\): they must be on the last"),
        (ChannelsFirst(), "norm has its channels on the axis 1: they must be on the last"),
        (OwnNorm(), "norm is a Halved with a call of its own: use nn.BatchNorm itself"),
        (CompiledTwice(), r"weights that nothing quantizes \(b/kernel\), .* or because nn.jit hides the layer"),
        (Masked(), "sparse has a mask over its kernel"),
        (OwnCall(), "double is a OwnDense with a call of its own"),
        (Embedded(), "has table, a Embed: an embedding is not quantized"),
        (Fails(), r"Fails fails on images \(2, 8, 8, 3\): TypeError: "),
        (nn.jit(Trains)(), r"JitTrains fails on .*: Tracer.*; give the network itself, without nn.jit or nn.remat around it"),
        (Maps(), r"Maps gives \(2, 1, 10\) for two images, not logits \(2, n\)"),
        (OfTheBatch(), r"OfTheBatch gives \(10,\) for two images"),
        (Needs(), r"the call of Needs needs 'temperature': give it, as call={'temperature': ...}"),
        (TrainFirst(), "the call of TrainFirst takes 'train' first: let it take the images first"),
        (AlwaysTraining(), "as in training: let it call its nn.BatchNorm with use_running_average=True"),
        (Base, r"the network is the class Base: give an instance, such as Base\(...\)"),
        (lambda x: x, "the network is a function: give an instance of a flax.linen.Module"),
    ],
    ids=lambda value: (getattr(value, "__name__", None) or type(value).__name__) if not isinstance(value, str) else "",
)
def test_a_network_that_cannot_work_is_refused_with_the_reason(module: Any, words: str) -> None:
    refused(module, words)


def test_the_network_that_the_refused_ones_spoil_is_accepted() -> None:
    assert networks.create(Base(), IMAGE, rules=rules.normalise("w4a4")).classes == 10


def test_a_call_that_trains_and_an_unknown_argument_are_refused() -> None:
    refused(
        Base(),
        r"normalises in norm with the moments of the batch, as in training: set train=False in its call",
        call={"train": True},
    )
    refused(Base(), "Base fails on images .*: TypeError: .*unexpected keyword argument 'tain'", call={"tain": True})


def test_rules_must_name_layers() -> None:
    message = refused(
        Base(), "the rule 'block1' names no layer of Base; there are: stem, head", {"default": (4, 4), "block1": (8, 8)}
    )
    assert message.endswith("stem, head.")


def test_weights_of_no_layer_may_stay_in_full_precision() -> None:
    refused(OwnKernel(), "with the rule 'mixing': None", {"default": (4, 4), "head": (8, 8)})
    refused(OwnKernel(), "with the rule 'mixing': None", {"default": (4, 4), "mixing": (8, None)})
    student = networks.create(OwnKernel(), IMAGE, rules=rules.normalise({"default": (4, 4), "mixing": None}))
    assert {layer.path for layer in student.kernels} == {("stem",), ("head",)}


def test_images_are_made_from_a_network_with_weights_of_no_layer() -> None:
    """Nothing is quantized while images are made, so no rule is needed."""
    variables = OwnKernel().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    images, labels = hast_jax.synthesize(OwnKernel(), variables, image=IMAGE, count=4, iterations=1)
    assert images.shape == (4, *IMAGE) and np.isfinite(images).all() and labels.shape == (4,)


def test_suggested_bits_keep_weights_of_no_layer_in_full_precision() -> None:
    bits = rules.normalise({"default": (4, 4), "mixing": None})
    student = Student(networks.create(OwnKernel(), IMAGE, rules=bits), {}, bits, IMAGE, (0.5,) * 3, (0.25,) * 3, {})
    record = {"network": "own.py:Net", "bits": {"weights": 4, "activations": 4, "rules": "mixing=full"}}
    line = report._suggestion(student, {"stem": 6, "head": 2}, record)
    found = rules.parse_rules(line.split('"')[1])
    again = networks.create(OwnKernel(), IMAGE, rules=rules.normalise({"default": (4, 4), **found}))
    assert {layer.path: each for layer, each in again.kernels.items()} == {("stem",): 6, ("head",): 2}


@pytest.mark.parametrize(
    ("module", "words"),
    [(LayerNorm(), "no nn.BatchNorm"), (OwnKernel(), "nothing quantizes"), (Base, "give an instance")],
    ids=["LayerNorm", "OwnKernel", "Base"],
)
def test_the_library_refuses_an_impossible_network_before_any_work(module: Any, words: str, tmp_path: Any) -> None:
    variables: Mapping[str, Any] = {"params": {}, "batch_stats": {}}
    if isinstance(module, OwnKernel):
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *IMAGE)))
        variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    test = np.zeros((4, *IMAGE), np.uint8), np.zeros(4, np.int32)
    updates: list[Any] = []
    with pytest.raises(UserError, match=words):
        hast_jax.quantize(
            module,
            variables,
            image=IMAGE,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            test=test,
            workdir=tmp_path / "run",
            progress=updates.append,
        )
    assert not updates and not (tmp_path / "run").exists()


class Sums(Base):
    def middle(self, x):
        return x @ (jnp.ones((4, 4)) / 4)


class Ramp(Base):
    def middle(self, x):
        return x @ jnp.linspace(0, 1, 16).reshape((4, 4))


@pytest.mark.parametrize("right", [False, True])
def test_products_that_this_jaxlib_gets_wrong_are_refused(right: bool, monkeypatch) -> None:
    networks.structure.forget()
    monkeypatch.setattr(networks.refusals, "_sums_are_right", lambda: right)
    if not right:
        with pytest.raises(hast_jax.InputError, match=r"Sums multiplies .* equal numbers, .* XLA_FLAGS=--xla_\S+"):
            networks.create(Sums(), IMAGE)
        networks.create(Ramp(), IMAGE)
    else:
        networks.create(Sums(), IMAGE)
    networks.structure.forget()


def test_the_flag_that_the_refusal_names_makes_such_sums_right() -> None:
    code = "from hast_jax.networks import refusals; raise SystemExit(not refusals._sums_are_right())"
    environment = {**os.environ, "XLA_FLAGS": networks.refusals.OWN_REDUCTIONS, "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tiny.ROOT).returncode == 0
