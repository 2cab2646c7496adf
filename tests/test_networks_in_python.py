"""What users do with a network in Python: they redefine it, feed it pixels, give its arguments, save it, load it."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_any_network import FIELDS, random_variables

import hast_jax
from hast_jax import config as config_lib
from hast_jax import networks
from hast_jax.deliver import measure
from hast_jax.errors import Notice, UserError
from hast_jax.given import Setting
from hast_jax.method import pyramid
from hast_jax.networks import rules, structure
from hast_jax.stages.batches import fixed_inputs

pytestmark = pytest.mark.usefixtures("little_optimization")

IMAGE = (8, 8, 1)


class Net(nn.Module):
    """inner: the activation. scale: what the pixels are divided by. temperature: no argument has a default."""

    inner: Any = nn.relu
    name_of_layer: str = "conv"

    @nn.compact
    def __call__(self, x: jax.Array, temperature: float, train: bool) -> jax.Array:
        x = self.inner(nn.BatchNorm(not train)(nn.Conv(6, (3, 3), name=self.name_of_layer)(x)))
        return nn.Dense(5)(nn.Conv(6, (3, 3))(x).mean((1, 2))) / temperature


CALL = {"temperature": 2.0}


def quantize(module: nn.Module, **changes: Any) -> hast_jax.Student:
    """The student of a network with random weights, from random images."""
    images = np.asarray(jax.random.normal(jax.random.key(2), (32, *IMAGE))), np.arange(32) % 5
    variables = changes.pop("variables", None) or random_variables(module, IMAGE, {**CALL, "train": False})
    settings = {"image": IMAGE, "bits": "w4a4", "budget": "trial", "call": CALL, "images": images, "fields": FIELDS} | changes
    return hast_jax.quantize(module, variables, **settings)


def test_an_argument_of_the_call_leaves_those_of_inference_as_they_are() -> None:
    student = quantize(Net())
    assert dict(student.network.call) == {"temperature": 2.0, "train": False}


def test_an_argument_of_the_call_that_json_would_change_is_refused() -> None:
    class Pooled(Net):
        @nn.compact
        def __call__(self, x: jax.Array, window: tuple[int, int]) -> jax.Array:
            assert isinstance(window, tuple)
            return nn.Dense(5)(nn.avg_pool(nn.BatchNorm(True)(nn.Conv(6, (3, 3))(x)), window).mean((1, 2)))

    call = {"window": (2, 2)}
    with pytest.raises(UserError, match=r"its values must be numbers, texts, True, False, None, or lists"):
        quantize(Pooled(), call=call, variables=random_variables(Pooled(), IMAGE, call))


def test_a_precision_that_is_set_for_all_of_jax_does_not_change_the_student() -> None:
    student, images = quantize(Net()), np.asarray(jax.random.normal(jax.random.key(3), (8, *IMAGE)))
    variables = {name: student.variables[name] for name in ("params", "batch_stats")}
    teacher = networks.create(Net(), IMAGE, call=dict(student.network.call))
    wanted = student(images), networks.logits(teacher, variables, images)
    with jax.default_matmul_precision("bfloat16"):
        student.__dict__.pop("_logits")  # compiled without this setting
        np.testing.assert_array_equal(student(images), wanted[0])
        np.testing.assert_array_equal(networks.logits(teacher, variables, images), wanted[1])


def test_a_module_that_shares_the_scope_of_its_layer_is_not_taken_for_the_layer() -> None:
    class Wrapped(nn.Module):
        def setup(self):
            self.dense = nn.Dense(5)
            nn.share_scope(self, self.dense)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dense(nn.relu(x))

    class Shared(nn.Module):
        wrapped: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.BatchNorm(True)(nn.Conv(6, (3, 3))(x)).mean((1, 2))
            return Wrapped(name="head")(x) if self.wrapped else nn.Dense(5, name="head")(nn.relu(x))

    variables = random_variables(Shared(False), IMAGE, {})
    images, found = jax.random.normal(jax.random.key(3), (8, *IMAGE)), []
    for module in (Shared(False), Shared(True)):
        network = networks.create(module, IMAGE, rules=rules.normalise("w4a4"), learned_ranges=True)
        ranges = networks.observe(network, variables, {}, images)
        found.append((ranges["head"], networks.logits(network, {**variables, "ranges": ranges}, images)))
        assert [each.activations for each in measure.costs(network, variables, IMAGE)] == [32, 4]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_images_of_any_size_leave_room_for_a_batch_to_evaluate() -> None:
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(5)(nn.BatchNorm(True)(nn.Conv(2, (3, 3))(x)).mean((1, 2)))

    variables = random_variables(Small(), (640, 640, 3), {})
    setting = Setting(Small(), variables, (640, 640, 3), None, None, "w4a4", 0, None, {}, None)
    assert setting.config.eval.batch == 2**29 // (640 * 640 * 3)


def test_a_convolution_that_promotes_types_its_own_way_is_left_alone() -> None:
    def promote(*arrays, **_):
        return nn.dtypes.promote_dtype(*arrays, dtype=jnp.bfloat16)

    class Promoted(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(6, (3, 3), promote_dtype=promote)(x)
            return nn.Dense(5)(nn.BatchNorm(True)(x.astype(jnp.float32)).mean((1, 2)))

    variables, images = random_variables(Promoted(), IMAGE, {}), jax.random.normal(jax.random.key(3), (8, *IMAGE))
    teacher = networks.create(Promoted(), IMAGE)
    np.testing.assert_array_equal(networks.logits(teacher, variables, images), Promoted().apply(variables, images))


def test_a_part_that_was_defined_again_is_looked_at_again(tmp_path: Path) -> None:
    """As in a notebook whose cell is run once more. `Whole` itself stays the same class with the same fields."""

    class First(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)))

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.tanh(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)))

    class Larger(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Conv(4, (3, 3), name="extra")(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)))

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(5)(defined["Block"](name="block")(nn.Conv(4, (3, 3))(x)).mean((1, 2)))

    def student(**changes):
        return quantize(Whole(), variables=random_variables(Whole(), IMAGE, {}), call=None, **changes)

    defined: dict[str, type[nn.Module]] = {"Block": First}
    before = student(workdir=tmp_path / "run")
    before.save(tmp_path / "student")
    assert set(before.codes()) == {"Conv_0/kernel", "block/Conv_0/kernel", "Dense_0/kernel"}
    defined["Block"] = Other
    with pytest.raises(UserError, match="began with a network that computes something else"):
        student(workdir=tmp_path / "run")
    with pytest.warns(Notice, match="holds a student of a network that computed something else than this Whole"):
        hast_jax.load(tmp_path / "student", Whole())
    defined["Block"] = Larger
    assert "block/extra/kernel" in student().codes()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 1 / 255), (0.5, 0.02)])
def test_a_network_that_normalises_by_itself_gets_the_images_of_one_that_does_not(mean: float, std: float) -> None:
    """In its own units. Without noise from rounding they are the same: here after few steps."""

    class Inside(nn.Module):
        mean: float
        std: float

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = (x * self.std + self.mean - 0.5) / 0.25
            return nn.Dense(5)(nn.relu(nn.BatchNorm(True)(nn.Conv(6, (3, 3))(x))).mean((1, 2)))

    variables = random_variables(Inside(0.5, 0.25), IMAGE, {})

    def images(mean, std):
        made, _ = hast_jax.synthesize(
            Inside(mean, std), variables, image=IMAGE, mean=(mean,), std=(std,), count=8, iterations=5, fields={"devices": 1}
        )
        return made * std + mean

    np.testing.assert_allclose(images(mean, std), images(0.5, 0.25), atol=2e-3)


def test_the_size_of_a_promotion_follows_the_units_of_the_network() -> None:
    assert pyramid.unit_of((0.5, 0.4), (0.25, 0.2)) is None
    unit = pyramid.unit_of((0.0,), (1 / 255,))
    assert unit is not None
    np.testing.assert_allclose([unit.offset.item(), unit.scale.item()], [0.5 * 255, 0.25 * 255], rtol=1e-6)
    config = config_lib.default()
    config.teacher.mean, config.teacher.std = (0.0,) * 3, (1 / 255,) * 3
    strengths = fixed_inputs({}, {}, np.zeros((1, *IMAGE)), np.zeros(1), config).strengths
    np.testing.assert_allclose(strengths.eps, config.finetune.eps * 0.25 * 255, rtol=1e-6)


def test_names_of_modules_may_hold_a_slash(tmp_path: Path) -> None:
    module = Net(name_of_layer="block1/conv")
    student = quantize(module, workdir=tmp_path / "run", fields=FIELDS | {"report": True})
    assert "block1/conv" in (tmp_path / "run" / "report.html").read_text()
    student.save(tmp_path / "student")
    images = np.random.default_rng(0).integers(0, 256, (3, *IMAGE), np.uint8)
    np.testing.assert_array_equal(hast_jax.load(tmp_path / "student", module)(images), student(images))
    for suffix, format, package in (
        (".onnx", "onnx", "onnxruntime"),
        (".tflite", "litert", "litert_converter"),
        (".safetensors", "safetensors", "safetensors"),
    ):
        assert not find_spec(package) or hast_jax.export(student, tmp_path / f"a{suffix}", format).bytes > 0


def test_counters_and_variables_in_bfloat16_stay_as_they_are(tmp_path: Path) -> None:
    class Extra(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            half = self.variable("constants", "half", lambda: jnp.asarray([0.5], jnp.bfloat16))
            self.variable("batch_stats", "steps", lambda: jnp.asarray(7, jnp.int32))
            return nn.Dense(5)(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)).mean((1, 2))) * half.value[None]

    variables = Extra().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    student = quantize(Extra(), variables=variables, call=None, workdir=tmp_path / "run")
    student.save(tmp_path / "student")
    again = hast_jax.load(tmp_path / "student", Extra())
    assert again.variables["constants"]["half"].dtype == jnp.bfloat16 and again.variables["batch_stats"]["steps"] == 7
    images = np.random.default_rng(0).integers(0, 256, (3, *IMAGE), np.uint8)
    np.testing.assert_array_equal(again(images), student(images))


def test_a_network_may_hold_a_random_key() -> None:
    key = jax.random.key(3)

    class Projects(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(10)(x.mean((1, 2)) * jax.random.normal(key, (1, 4)))

    other = jax.random.key(4)
    first = networks.create(Projects(), (8, 8, 3)).structure.program
    structure.forget()
    key = other
    assert networks.create(Projects(), (8, 8, 3)).structure.program != first


def test_the_logits_may_be_an_entry_of_a_dict() -> None:
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            x = nn.BatchNorm(True)(nn.Conv(7, (3, 3))(x)).mean((1, 2))
            return {"features": x, "logits": nn.Dense(5)(x)}

    variables, images = random_variables(Named(), IMAGE, {}), jnp.ones((2, *IMAGE))
    found = networks.logits(networks.create(Named(), IMAGE), variables, images)
    np.testing.assert_allclose(found, Named().apply(variables, images)["logits"], rtol=1e-5)


def test_of_several_arrays_it_is_said_which_are_the_logits() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
            x = nn.BatchNorm(True)(nn.Conv(7, (3, 3))(x)).mean((1, 2))
            return x, nn.Dense(5)(x), 0.5, "a text"

    with pytest.warns(Notice, match="Two gives 2 arrays with one row for each image; .* to be the first, of 7 numbers"):
        networks.create(Two(), IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        networks.create(Net(), IMAGE, call=CALL)


def test_a_network_in_double_precision_is_quantized_in_double_precision() -> None:
    with jax.enable_x64(True):
        module, call = Net(), {**CALL, "train": False}
        variables = random_variables(module, IMAGE, call)
        images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *IMAGE)))
        teacher = networks.create(module, IMAGE, call=call)
        logits, _ = networks.apply(teacher, variables, images)
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, module.apply(variables, images, **call), rtol=1e-9)


def test_a_text_of_the_users_own_that_is_called_branches_is_no_pattern() -> None:
    class Both(nn.Module):
        branches: str = "both"

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(5)(nn.relu(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x))).mean((1, 2)))

    assert networks.create(Both(), IMAGE).branches == networks.create(Both("norm"), IMAGE).structure.branches
