"""docs/your_network.md does what it says, with docs/densenet.py; and files that hold no network are refused."""

import json
import py_compile
import re
import shlex
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import save_file

from hast_jax import from_config, library, networks
from hast_jax.errors import UserError
from hast_jax.networks import rules, user_files, weights

PAGE = (tiny.ROOT / "docs" / "your_network.md").read_text()
BLOCK = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
COMMANDS = [
    shlex.split(text.replace("\\\n", "").replace("python -m hast_jax.", ""))
    for text in re.findall(r"^    (python -m hast_jax\.(?:.*\\\n)*.*)$", PAGE, re.M)
]
NETWORK, NAMES = f"{tiny.ROOT}/docs/densenet.py:DenseNet", f"{tiny.ROOT}/docs/densenet.py:torch_names"
TRIAL = {
    "synthesis.images": 64,
    "synthesis.batch": 64,
    "synthesis.iterations": 2,
    "finetune.epochs": 1,
    "finetune.steps_per_epoch": 2,
    "finetune.batch": 16,
    "calibration.batches": 2,
}


@pytest.mark.slow
def test_the_pages_commands_train_quantize_and_evaluate_its_network(tmp_path: Path) -> None:
    assert [command[0] for command in COMMANDS] == ["pretrain", "main", "evaluate"]
    for folder in ("configs", "docs"):
        (tmp_path / folder).symlink_to(tiny.ROOT / folder)
    for name, *arguments in COMMANDS:
        small = [argument.replace(":w4a4", ":w4a4,small") for argument in arguments]
        done = tiny.call([*tiny.module(name), *small], tmp_path)
        assert done.returncode == 0, done.stderr
    assert "full precision (teacher)" in done.stdout
    result = json.loads((tmp_path / "runs" / "densenet" / "result.json").read_text())
    assert result["bits"] == {"weights": 4, "activations": 4, "rules": "^Conv_0|output=w8a8"}
    assert result["teacher"] > 95 and result["last"] > result["teacher"] - 3
    ranges = json.loads((tmp_path / "runs" / "densenet" / "ranges.json").read_text())
    assert "Conv_0/input/low" in ranges and "output/input/low" in ranges


@pytest.mark.slow
def test_the_pages_lines_of_python_quantize_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = user_files.load(NETWORK)(10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    monkeypatch.setitem(library.BUDGETS, "small", TRIAL)
    page = {"model": model, "variables": variables, "images": np.zeros((2, 32, 32, 3), np.uint8)}
    exec(BLOCK, page)
    assert page["logits"].shape == (2, 10)
    assert {code["bits"] for code in page["student"].codes().values()} == {4}


def test_bits_by_layer_are_the_same_in_python_and_on_the_command_line() -> None:
    in_python = eval(re.search(r"`bits=({.*?})`", PAGE)[1])
    on_the_command_line = rules.parse_rules(re.search(r"`--config.bits.rules=\"(init.*?)\"`", PAGE)[1])
    assert rules.normalise(in_python) == rules.normalise({"default": (3, 3)} | on_the_command_line)


@pytest.mark.parametrize(("name", "words"), [("trap.py", "if you trust its code"), ("trap.pyc", "it must be one of resnet8")])
def test_code_that_a_run_folder_names_is_not_run(copy: Path, name: str, words: str) -> None:
    trap, config = copy / "trap.py", json.loads((copy / "config.json").read_text())
    trap.write_text(f"open({str(copy / 'caught')!r}, 'w')")
    py_compile.compile(str(trap), str(copy / "trap.pyc"))
    config["teacher"]["network"] = f"{copy}/{name}:Net"
    (copy / "config.json").write_text(json.dumps(config))
    done = tiny.call(tiny.evaluate(copy))
    assert done.returncode == 1 and words in done.stderr and not (copy / "caught").exists()


@pytest.fixture(scope="module")
def densenet() -> nn.Module:
    return user_files.load(NETWORK)(10)


@pytest.fixture(scope="module")
def variables(densenet: nn.Module) -> dict:
    return densenet.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def read(path: Path, **fields: str) -> weights.Variables:
    """The variables of the page's network that the config's weights give."""
    return from_config.teacher(tiny.config(teacher__network=NETWORK, teacher__weights=str(path), **fields))[1]


def test_flax_weights_are_read_as_the_page_writes_them(variables: dict, tmp_path: Path) -> None:
    written = re.search(r"`save_file\((.*?), \"densenet.safetensors\"\)` \|", PAGE)[1]
    save_file(eval(written), tmp_path / "densenet.safetensors")
    again = read(tmp_path / "densenet.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, dict(variables)))


def test_foreign_names_are_translated_by_a_function_in_a_file(variables: dict, tmp_path: Path) -> None:
    name_of = user_files.load(NAMES)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}
    state = {name_of(path): np.ascontiguousarray(weights.to_torch_layout(leaf)) for path, leaf in flat.items()}
    assert state["layers.conv3.weight"].shape == (8, 25, 3, 3)
    np.savez(tmp_path / "torch.npz", **state)
    again = read(tmp_path / "torch.npz", teacher__names=NAMES)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, unflatten_dict(flat)))


def test_flattening_as_pytorch_does_needs_no_other_weights() -> None:
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # [n, height, width, channels]
    ours = eval(re.search(r"`(x\.transpose.*?)`\. \|", PAGE)[1], {"x": x})
    assert np.array_equal(ours, np.moveaxis(x, -1, 1).reshape(2, -1))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.py:Net", None, "there is no file"),
        (
            "a.py:Net",
            "Net = 3",
            "is a int: name a flax.linen.Module or flax.nnx.Module, its class, or a function that makes one",
        ),
        ("e.py:Net", "def Net(): return 3", "makes a int: name a flax.linen.Module"),
        ("b.py:Net", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("c.py:Net", "", "has no 'Net'"),
        ("f.py:Net", "import sys\nsys.exit(0)", "ends the program when it is imported: put its commands under if __name__"),
        ("g.py:Net", "from .layers import Net", "write a small file that imports the network from its package"),
        (
            "h.py:Net",
            "def Net():\n    import nowhere_to_be_found",
            r"ModuleNotFoundError: No module named 'nowhere_to_be_found'\.$",
        ),
        (
            "i.py:Net",
            "import jax\nNet = jax.nn.relu",
            "cannot be constructed: .*; name a flax.linen.Module or flax.nnx.Module, its class, or a",
        ),
        ("d.py:Net", "import flax.linen as nn\nclass Net(nn.Module):\n    width: int", "cannot be constructed: TypeError"),
    ],
)
def test_a_file_that_holds_no_network_is_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name.split(":")[0]).write_text(content)
    with pytest.raises(UserError, match=words):
        networks.module(f"{tmp_path}/{name}", 10)


def test_a_network_may_be_a_class_a_partial_a_function_or_itself_in_a_file_that_imports_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "hast_jax_test_neighbour.py").write_text(OWN)
    text = (
        "import sys\nfrom functools import partial\nsys.path.insert(0, '/nowhere')\nfrom hast_jax_test_neighbour import Net\n"
    )
    text += "Half = partial(Net, classes=7)\nready = Net(classes=6)\ndef make(num_classes): return Net(classes=num_classes)\n"
    (tmp_path / "nets.py").write_text(text)
    found = {name: networks.module(f"{tmp_path}/nets.py:{name}", 5).classes for name in ("Net", "Half", "make", "ready")}
    assert found == {"Net": 5, "Half": 5, "make": 5, "ready": 6}
    assert sys.path[-1] == str(tmp_path) and "/nowhere" in sys.path  # the file's own change of the path stays
    with pytest.raises(UserError, match=r"is a finished network, which takes no config\.teacher\.arguments"):
        networks.module(f"{tmp_path}/nets.py:ready", 5, {"width": 3})
    for name in ("resnet8", f"{tmp_path}/nets.py:Net"):  # arguments may be any, such as the number of classes and a name
        made = networks.module(name, 5, {"classes": 3, "name": "mine"})
        assert made.classes == 3 and made.name == "mine"


def test_a_file_may_import_its_neighbours_when_its_function_is_called_and_packages_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as the path of a script
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "hast_jax_test_lazy.py").write_text(OWN)
    (tmp_path / "far" / "nets.py").write_text(
        "def make(classes):\n    from hast_jax_test_lazy import Net\n    return Net(classes)"
    )
    assert networks.module(f"{tmp_path}/far/nets.py:make", 5).classes == 5
    (tmp_path / "hast_jax_test_package").mkdir()
    (tmp_path / "hast_jax_test_package" / "layers.py").write_text(OWN)
    (tmp_path / "hast_jax_test_package" / "net.py").write_text("from hast_jax_test_package.layers import Net")
    monkeypatch.chdir(tmp_path)
    assert networks.module("hast_jax_test_package/net.py:Net", 5).classes == 5


def test_a_network_of_ones_own_is_checked_before_its_weights_are_read(tmp_path: Path) -> None:
    text = (tiny.ROOT / "docs" / "densenet.py").read_text()
    text = text.replace("nn.BatchNorm(use_running_average=not train, momentum=0.9)", "nn.GroupNorm(2)")
    (tmp_path / "net.py").write_text(text)
    config = tiny.config(teacher__network=f"{tmp_path}/net.py:DenseNet", teacher__weights="nowhere.safetensors")
    with pytest.raises(UserError, match=r"has no nn\.BatchNorm"):
        from_config.teacher(config)


# --- What may move, and what may not change ---


OWN = """
import flax.linen as nn

class Net(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(self.classes)(ACTIVATION(x).mean((1, 2)))
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A network in a file, and its weights."""
    (tmp_path / "net.py").write_text(OWN.replace("ACTIVATION", "nn.relu"))
    module = user_files.make(f"{tmp_path}/net.py:Net", 10, {})
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    save_file(flatten_dict(variables, sep="/"), tmp_path / "net.safetensors")
    return tmp_path


def quantize_own(place: Path, *arguments: str, workdir: Path | None = None) -> tuple[int, str, str]:
    fields = {"teacher.network": f"{place}/net.py:Net", "teacher.weights": f"{place}/net.safetensors", "finetune.lam": 0.0}
    done = tiny.call(
        tiny.command(workdir or place / "run", *(f"--config.{name}={value}" for name, value in fields.items()), *arguments)
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_weights_and_network_may_move_and_the_network_may_not_compute_something_else(own: Path, tmp_path: Path) -> None:
    status, _, errors = quantize_own(own)
    assert status == 0, errors
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("net.py", "net.safetensors"):
        (own / name).rename(moved / name)
    network = f"--network={moved}/net.py:Net"
    done = tiny.call(tiny.evaluate(own / "run", network))
    assert done.returncode == 1 and "which are not there: name them with --weights" in done.stderr
    done = tiny.call(tiny.evaluate(own / "run", network, f"--weights={moved}/net.safetensors"))
    assert done.returncode == 0, done.stderr
    (own / "run" / "result.json").unlink()
    status, _, errors = quantize_own(moved, workdir=own / "run")
    assert status == 0, errors
    (moved / "net.py").write_text(OWN.replace("ACTIVATION", "nn.gelu"))
    for done in (
        quantize_own(moved, workdir=own / "run")[::2],
        (
            (ended := tiny.call(tiny.evaluate(own / "run", network, f"--weights={moved}/net.safetensors"))).returncode,
            ended.stderr,
        ),
    ):
        assert done[0] == 1 and "computes something else: its code was changed since" in done[1]
    (moved / "net.py").write_text("# a comment\n" + OWN.replace("ACTIVATION", "nn.relu"))
    status, _, errors = quantize_own(moved, workdir=own / "run")
    assert status == 0, errors


def test_logits_of_another_framework_are_compared_before_any_work(own: Path) -> None:
    module, images = user_files.make(f"{own}/net.py:Net", 10, {}), np.random.default_rng(0).normal(size=(4, 8, 8, 1))
    state, _ = weights.read(own / "net.safetensors")
    variables = weights.from_state_dict(module, state, (8, 8, 1))
    logits = np.asarray(module.apply(variables, images.astype(np.float32)))
    config = tiny.config(teacher__network=f"{own}/net.py:Net", teacher__weights=f"{own}/net.safetensors")
    config.teacher.check = f"{own}/check.npz"
    with pytest.raises(UserError, match=r"check.npz cannot be read"):
        from_config.teacher(config)
    np.savez(own / "check.npz", images=images, logits=logits)
    for content in ((own / "check.npz").read_bytes()[:1000], b"\x93NUMPY\x01\x00"):
        (own / "check.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"check.npz cannot be read"):
            from_config.teacher(config)
    with (own / "check.npz").open("wb") as file:
        np.save(file, images)
    with pytest.raises(UserError, match=r"check.npz cannot be read"):
        from_config.teacher(config)
    np.savez(own / "check.npz", images=images, logits=logits)
    from_config.teacher(config)
    np.savez(own / "check.npz", images=images, logits=logits[:, ::-1])
    with pytest.raises(UserError, match=r"does not give the logits of .*: they differ by up to"):
        from_config.teacher(config)
    np.savez(own / "check.npz", images=300 * images, logits=logits)
    with pytest.raises(UserError, match=r"the images, up to .*, are not normalised: save them as uint8 or normalise them"):
        from_config.teacher(config)
    np.savez(own / "check.npz", images=images, logits=logits.astype(str))
    with pytest.raises(UserError, match=r"holds <U\d+ logits: save logits as float32"):
        from_config.teacher(config)
    for wrong in ((images.transpose(0, 3, 1, 2), logits), (images[:0], logits[:0])):
        np.savez(own / "check.npz", images=wrong[0], logits=wrong[1])
        with pytest.raises(UserError, match=r"they must be \[n, 8, 8, 1\] and \[n, 10\]"):
            from_config.teacher(config)


def test_small_logits_are_compared_by_their_own_size(own: Path) -> None:
    module, images = user_files.make(f"{own}/net.py:Net", 10, {}), np.random.default_rng(0).normal(size=(4, 8, 8, 1))
    state, _ = weights.read(own / "net.safetensors")
    head = [name for name in state if "Dense" in name]
    state = {name: array * (1e-3 if name in head else 1) for name, array in state.items()}
    (own / "small.safetensors").write_bytes(weights.encoded(state, {}))
    logits = np.asarray(module.apply(weights.from_state_dict(module, state, (8, 8, 1)), images.astype(np.float32)))
    config = tiny.config(teacher__network=f"{own}/net.py:Net", teacher__weights=f"{own}/small.safetensors")
    config.teacher.check = f"{own}/check.npz"
    np.savez(own / "check.npz", images=images, logits=logits)
    assert np.abs(logits).max() < 0.1
    from_config.teacher(config)
    np.savez(own / "check.npz", images=images, logits=logits[:, ::-1])
    with pytest.raises(UserError, match=r"does not give the logits of"):
        from_config.teacher(config)


def test_a_running_variance_may_be_negative_within_epsilon_and_not_beyond(own: Path) -> None:
    module = user_files.make(f"{own}/net.py:Net", 10, {})
    state, _ = weights.read(own / "net.safetensors")
    name = "batch_stats/BatchNorm_0/var"
    state = {key: np.array(value) for key, value in state.items()}
    state[name][3] = -5e-6
    weights.from_state_dict(module, state, (8, 8, 1))
    state[name][3] = -2e-5
    with pytest.raises(UserError, match=f"{name} holds a variance below zero"):
        weights.from_state_dict(module, state, (8, 8, 1))


def test_the_code_of_the_user_is_named_with_its_flags() -> None:
    config = tiny.config(teacher__network="docs/densenet.py:DenseNet", teacher__names="docs/densenet.py:torch_names")
    assert from_config.own_code(config) == {"network": config.teacher.network, "names": config.teacher.names}
    assert from_config.own_code(tiny.config()) == {}


def test_a_check_of_the_teacher_serves_only_the_start_of_a_run(tmp_path: Path) -> None:
    config = tiny.config(teacher__check=str(tmp_path / "gone.npz"))
    from_config.trust(config, tmp_path)
    from_config.teacher(config)
