"""The other commands: benchmark and pretrain."""

import json
import re
from pathlib import Path

import pytest
import tiny

from hast_jax.networks import weights

DIGITS = f"--config={tiny.ROOT}/configs/digits.py:w3a3,small"


@pytest.mark.slow
def test_the_benchmark_prints_a_json_line_for_each_step() -> None:
    done = tiny.call(
        [*tiny.module("benchmark"), DIGITS, "--steps=2", "--config.synthesis.batch=32", "--config.synthesis.images=256"]
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["part"], line["batch"]) for line in lines] == [("synthesize", 32), ("finetune", 64)]
    for line in lines:
        assert line["per_second"] > 0 and line["compile_seconds"] > 0 and line["flops"] > 1e6
        assert 0 < line["matmul_fraction"] < 1.5


def test_what_the_compiler_says_of_a_step_is_printed_without_running_it() -> None:
    arguments = [f"--config={tiny.ROOT}/configs/cifar100.py:small", "--config.synthesis.batch=32"]
    done = tiny.call([*tiny.module("benchmark"), *arguments, "--compile_only", "--part=synthesize", "--config.devices=1"])
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["flops"] > 1e9 and line["intermediate_gib"] > 0 and "per_second" not in line


def test_operations_cannot_be_timed_without_running_them() -> None:
    done = tiny.call([*tiny.module("benchmark"), DIGITS, "--compile_only", "--operations"])
    assert done.returncode == 1 and "leave out --operations" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_table_is_printed_for_a_kind_of_device_over_each_arithmetic() -> None:
    done = tiny.call([*tiny.module("benchmark"), DIGITS, "--device=cpu", "--part=synthesize", "--steps=1"])
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[1] for line in done.stdout.splitlines()[4:]] == ["float32", "tensorfloat32", "bfloat16"]


def test_a_kind_of_device_that_is_not_there_is_refused() -> None:
    done = tiny.call([*tiny.module("benchmark"), DIGITS, "--device=tpu"])
    assert done.returncode == 1 and "there is no tpu here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [["benchmark", "--compile_only"], ["pretrain", "--output=a.safetensors"], ["reproduce", "table1", "--workdir=a"]]
)
def test_what_works_in_one_process_refuses_several(command: list[str]) -> None:
    done = tiny.call([*tiny.module(command[0]), DIGITS, *command[1:], "--processes=auto"])
    assert done.returncode == 1 and "leave out --processes" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["main", DIGITS, "--workdir=a", "config.seed=7"], "does not take the word 'config.seed=7': write --config.seed=7."),
        (["evaluate", "--workdir=a", "best"], "does not take the word 'best': write its flag before it"),
        (["main", DIGITS, "--workdir="], "--workdir is empty: name a folder"),
        (["reproduce", "table1"], "--config is missing, or its get_config returns nothing: --help says what it takes."),
        (["evaluate", "runs/a"], "--workdir is missing: write --workdir=runs/a; --help shows the flags."),
        (["report", "--workdir=a", "--average_bits=nan"], "--average_bits=nan: give a number from 2 to 8"),
        (["export", "--workdi=a"], "there is no flag --workdi (did you mean workdir?): --help shows the flags."),
        (["export", "--workdir=a", "--format=onx"], "--format is 'onx': it must be one of onnx, litert,"),
        (["evaluate", "--workdir=a", "--devices=two"], "--devices is 'two': it must be a non-negative integer."),
    ],
)
def test_words_without_a_flag_and_unusable_flags_are_refused(command: list[str], words: str, tmp_path) -> None:
    done = tiny.call([*tiny.module(command[0]), *command[1:]], tmp_path)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_of_a_field_that_is_given_twice_the_last_value_counts(tmp_path) -> None:
    twice = ["--config.teacher.mean=(.5,)", "--config.teacher.mean", "(7.,)", "--config.finetune.epochs", "0"]
    done = tiny.call([*tiny.module("main"), DIGITS, f"--workdir={tmp_path}/run", *twice, "--config.finetune.epochs=1"])
    assert "config.teacher.mean is (7.0,)" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_pretrained_teacher_is_a_weight_file_with_its_metadata(tmp_path) -> None:
    path = tmp_path / "teacher.safetensors"
    done = tiny.call([*tiny.module("pretrain"), DIGITS, f"--output={path}", "--config.pretrain.epochs=3"])
    assert done.returncode == 0, done.stderr
    state, metadata = weights.read(path)
    assert metadata.dataset == "digits" and metadata.top1 > 80 and len(state) == 47
    assert f"top-1 {metadata.top1:.2f} %" in done.stdout
    again = tiny.call([*tiny.module("pretrain"), DIGITS, f"--output={path}"])
    assert again.returncode == 1 and "exists already: choose another name" in again.stderr


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--output=teacher.pth", "must end in .safetensors"),
        ("--output=/proc/none/teacher.safetensors", "cannot be written"),
        ("--config.pretrain.batch=5000", "more than the 1078 images"),
    ],
)
def test_pretraining_that_could_not_end_well_is_refused_before_it_begins(tmp_path, argument: str, words: str) -> None:
    done = tiny.call([*tiny.module("pretrain"), DIGITS, f"--output={tmp_path}/a.safetensors", argument])
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "Net keep no statistics in training"),
        ("x = x * self.variable('constants', 'c', lambda: 1.0).value", "Net has variables besides params and batch_stats"),
        ("x = nn.BatchNorm(not train, axis_name='batch')(x)", "give its nn.BatchNorm no axis_name"),
    ],
)
def test_a_network_that_cannot_be_pretrained_is_refused(tmp_path, line: str, words: str) -> None:
    """Its batch norms keep no statistics or need other devices, or a weight file could not hold its variables."""
    lines = (
        "import flax.linen as nn",
        "class Net(nn.Module):",
        "    classes: int",
        "    @nn.compact",
        "    def __call__(self, x, is_train=False, train=False):",
        f"        {line}",
        "        return nn.Dense(self.classes)(nn.BatchNorm(not is_train)(nn.Conv(4, (3, 3))(x)).mean((1, 2)))",
    )
    (tmp_path / "own.py").write_text("\n".join(lines))
    own = f"--config.teacher.network={tmp_path}/own.py:Net"
    done = tiny.call([*tiny.module("pretrain"), DIGITS, own, f"--output={tmp_path}/a.safetensors"])
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.eval.dataset=none"], "needs real images in memory"),
        (["--config.eval.split=test+train[:50%]"], "config.eval.split holds images of the train split"),
        (["--config.pretrain.lr=1e30", "--config.pretrain.batch=256"], "the training diverged, and nothing is written"),
    ],
)
def test_pretraining_that_gives_no_teacher_is_refused_or_ends_early(tmp_path: Path, flags: list[str], words: str) -> None:
    done = tiny.call([*tiny.module("pretrain"), DIGITS, f"--output={tmp_path}/a.safetensors", *flags])
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1 and "epoch" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_would_not_fit_on_the_disk_is_not_trained(tmp_path: Path) -> None:
    command = " ".join([*tiny.module("pretrain"), DIGITS, f"--output={tmp_path}/a.safetensors"])
    done = tiny.call_anew(["bash", "-c", f"ulimit -f 100; {command}"])
    assert done.returncode == 1 and "cannot be written (File too large): choose another place" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [["--config", "configs/digits.py:w3a33"], ["-config=digits:w3a33"], ["--config=digits:w3a33"]])
def test_a_shipped_config_is_found_from_any_folder(form: list[str], tmp_path) -> None:
    done = tiny.call([*tiny.module("main"), *form, "--workdir=run"], tmp_path)
    assert done.returncode == 1 and "bits.activations is 33" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["main", "evaluate", "pretrain", "benchmark"])
def test_a_command_without_its_flags_says_which(name: str) -> None:
    done = tiny.call(tiny.module(name))
    assert done.returncode == 1 and re.fullmatch("hast_jax: --(config|workdir) is missing.*\n", done.stderr)


def test_compiled_programs_are_kept_in_the_users_cache_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HAST_JAX_CACHE")
    done = tiny.call_anew(tiny.evaluate(finished))
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / ".cache" / "hast_jax").iterdir())
