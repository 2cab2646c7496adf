"""docs/your_network.md does what it says, and what cannot work is refused with the reason."""

import json
import py_compile
import re
import shlex
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file

from hast_jax import networks
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.networks import from_config, user_files, weights
from hast_jax.networks.layers import FULL_PRECISION, Activation, Conv, ConvNorm, Dense, Precision, Taps

PAGE = (tiny.ROOT / "docs" / "your_network.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [
    shlex.split(text.replace("\\\n", "").replace("python -m hast_jax.", ""))
    for text in re.findall(r"^    (python -m hast_jax\.(?:.*\\\n)*.*)$", PAGE, re.M)
    if "digits" in text or "evaluate" in text
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's network and, at the place that its commands name, our configs."""
    place = tmp_path_factory.mktemp("own")
    (place / "densenet.py").write_text(BLOCKS[0])
    (place / "configs").symlink_to(tiny.ROOT / "configs")
    return place


@pytest.mark.slow
def test_the_pages_commands_train_quantize_evaluate_and_read_its_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [command[0] for command in COMMANDS] == ["pretrain", "main", "evaluate"]
    for name, *arguments in COMMANDS:
        small = [argument.replace(":w4a4", ":w4a4,small") for argument in arguments]
        done = tiny.call([*tiny.module(name), *small], place)
        assert done.returncode == 0, done.stderr
    assert "full precision (teacher)" in done.stdout
    result = json.loads((place / "runs" / "densenet" / "result.json").read_text())
    assert result["bits"] == {"weights": 4, "activations": 4} and result["teacher"] > 95
    assert result["last"] > result["no_finetuning"] + 1
    monkeypatch.chdir(place)
    page = {"Path": Path}
    exec(next(block for block in BLOCKS if "restore_student" in block), page)
    held_out, teacher = datasets.load(page["config"], "test"), page["config"].teacher
    right = (
        jnp.argmax(page["logits"](datasets.normalise(jnp.asarray(held_out.images), teacher.mean, teacher.std)), -1)
        == held_out.labels
    )
    assert 100 * right.mean() == pytest.approx(result["last"], abs=0.2)
    codes = np.asarray(page["codes"])
    assert np.array_equal(codes, np.round(codes)) and codes.min() == -8 and codes.max() == 7


@pytest.mark.parametrize(("name", "words"), [("trap.py", "if you trust its code"), ("trap.pyc", "it must be one of resnet8")])
def test_code_that_a_run_folder_names_is_not_run(copy: Path, name: str, words: str) -> None:
    trap, config = copy / "trap.py", json.loads((copy / "config.json").read_text())
    trap.write_text(f"open({str(copy / 'caught')!r}, 'w')")
    py_compile.compile(str(trap), str(copy / "trap.pyc"))
    config["teacher"]["network"] = f"{copy}/{name}:Net"
    (copy / "config.json").write_text(json.dumps(config))
    done = tiny.call(tiny.evaluate(copy))
    assert done.returncode == 1 and words in done.stderr and not (copy / "caught").exists()


@pytest.fixture
def densenet(place: Path) -> type[nn.Module]:
    return user_files.load(f"{place}/densenet.py:DenseNet")


def test_flax_weights_are_read_as_the_page_writes_them(densenet: type[nn.Module], tmp_path: Path) -> None:
    variables = densenet(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    save_file(flatten_dict(variables, sep="/"), tmp_path / "a.safetensors")
    state, _ = weights.read(tmp_path / "a.safetensors")
    again = weights.from_state_dict(densenet(10), state, (8, 8, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, dict(variables)))


def test_foreign_names_are_mapped_as_the_page_shows(densenet: type[nn.Module]) -> None:
    method = {}
    exec(textwrap.dedent(next(block for block in BLOCKS if "state_dict_names" in block)), method)
    named = type("Named", (densenet,), {"state_dict_names": method["state_dict_names"]})
    state = weights.to_state_dict(named(10), named(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), (8, 8, 1))
    assert state["block1.layer2.conv.weight"].shape == (6, 18, 3, 3)
    weights.from_state_dict(named(10), state, (8, 8, 1))


class Base(nn.Module):
    """What every network below has in common; each spoils one thing."""

    classes: int
    precision: Precision = FULL_PRECISION

    def activation(self, x):
        return Activation(self.precision)(x)

    @nn.compact
    def __call__(self, x, train=False):
        x, tap = ConvNorm(4, 3, bits=self.precision.weights, name="conv")(x, train)
        logits = Dense(self.classes, self.precision.weights)(self.activation(x).mean((1, 2)))
        return self.output(logits, tap, x)

    def output(self, logits, tap, branch):
        return logits, Taps((tap,), (branch,))


class NoTap(Base):
    def output(self, logits, tap, branch):
        return logits, Taps((), (branch,))


class LostTap(Base):
    def activation(self, x):
        return Activation(self.precision)(nn.BatchNorm(use_running_average=True)(x))


class NoBranch(Base):
    def output(self, logits, tap, branch):
        return logits, Taps((tap,), ())


class FlatBranch(Base):
    def output(self, logits, tap, branch):
        return logits, Taps((tap,), (branch.mean((1, 2)),))


class PlainLayer(Base):
    def activation(self, x):
        return Activation(self.precision)(nn.Conv(4, (3, 3), name="plain")(x))


class ForgottenBits(Base):
    def activation(self, x):
        return Activation(self.precision)(Conv(4, 3, name="second")(x))


class OwnKernel(Base):
    def activation(self, x):
        return Activation(self.precision)(x @ self.param("mixing", nn.initializers.lecun_normal(), (4, 4)))


class NoActivation(Base):
    def activation(self, x):
        return nn.relu(x)


class UnknownActivation(Base):
    def activation(self, x):
        return Activation(self.precision, "tanhh")(x)


class WrongLogits(Base):
    def output(self, logits, tap, branch):
        return logits[:, :3], Taps((tap,), (branch,))


class NoTaps(Base):
    def output(self, logits, tap, branch):
        return logits


class Broken(Base):
    def activation(self, x):
        return x @ jnp.zeros((7, 7))


def check(network: type[nn.Module], alignment: bool = True) -> None:
    user_files.check(network(10), network(10, Precision(4, 4)), (8, 8, 1), alignment)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (NoTap, "no batch norm in its Taps"),
        (LostTap, "has 2 batch norms but returns 1 taps"),
        (NoBranch, "no branches in its Taps"),
        (FlatBranch, r"has branches \(2, 4\): they must be feature maps"),
        (PlainLayer, r"layers that nothing quantizes \(plain\)"),
        (ForgottenBits, r"weights that nothing quantizes \(second/kernel\)"),
        (OwnKernel, r"weights that nothing quantizes \(mixing\)"),
        (NoActivation, "no activation to quantize"),
        (UnknownActivation, "the activation 'tanhh' is unknown: choose from relu, relu6"),
        (WrongLogits, r"gives logits \(2, 3\) for two images, not \(2, 10\)"),
        (NoTaps, r"must return \(logits, Taps\)"),
        (Broken, r"Broken fails on images \(2, 8, 8, 1\)"),
    ],
)
def test_a_network_that_cannot_work_is_refused_with_the_reason(network: type[nn.Module], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(network)


def test_a_network_that_can_work_passes() -> None:
    check(Base)
    check(NoBranch, alignment=False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.py:Net", None, "there is no file"),
        ("a.py:Net", "Net = 3", "has no class 'Net'"),
        ("b.py:Net", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("c.py:Net", "import flax.linen as nn\nclass Net(nn.Module):\n    classes: int", "has no field 'precision'"),
    ],
)
def test_a_file_that_holds_no_network_is_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name.split(":")[0]).write_text(content)
    with pytest.raises(UserError, match=words):
        networks.create(f"{tmp_path}/{name}", 10)


def test_a_network_of_ones_own_is_checked_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from test_your_network import NoTap as Parent\n\nclass Net(Parent):\n    pass\n")
    config = tiny.config(teacher__network=f"{tmp_path}/net.py:Net", teacher__weights="nowhere.safetensors")
    with pytest.raises(UserError, match="no batch norm in its Taps"):
        from_config.teacher(config)


@pytest.mark.parametrize("function", networks.ACTIVATIONS)
def test_every_activation_is_quantized_on_a_grid_of_its_range(function: str) -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8)) * 2
    layer = Activation(Precision(3, 3, straight_through="clipped"), function)
    _, ranges = layer.apply({}, x, mutable=["ranges"])
    assert len(np.unique(layer.apply(ranges, x))) <= 8
    expected = Activation(Precision(3, 3), function).apply(ranges, x)
    np.testing.assert_array_equal(layer.apply(ranges, x), expected)
