"""Several processes on one run, here two on the loopback address, are as good as one; and a run may change its devices."""

import errno
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from PIL import Image

from hast_jax import from_config, pipeline
from hast_jax.data import datasets
from hast_jax.errors import InputError, UserError
from hast_jax.networks import weights
from hast_jax.runs import processes, run_folder
from hast_jax.stages import synthesize

# Steps so small that few weights come near the edge of a code, where a rounding difference decides which one it is; and
# enough of them for a signal to reach every process.
CALM = ["--config.finetune.lr=1e-8", "--config.synthesis.lr=0.05", "--config.finetune.epochs=20", "--config.eval.every=10"]
WHOLE = [*CALM, "--config.finetune.epochs=8", "--config.eval.every=4"]  # for runs that are compared at their end


def twice(command: list[str], second: Sequence[str] = (), places: Sequence[Path] = (tiny.ROOT,) * 2) -> list[subprocess.Popen]:
    """A command as two processes in these folders, the second with further arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in tiny.environment().items() if name != "JAX_NUM_CPU_DEVICES"}
    return [
        subprocess.Popen(
            [*command, f"--processes=127.0.0.1:{port},2,{index}", *(second if index else ())],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, place in enumerate(places)
    ]


def two_processes(workdir: Path, *arguments: str) -> list[subprocess.Popen]:
    """A run on two devices in each of two processes, which stream their shares of the images."""
    return twice(tiny.command(workdir, *CALM, "--config.finetune.stream=True", *arguments))


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    ends = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ends)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, on four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    done = tiny.call_anew(tiny.command(workdir, *WHOLE, "--config.devices=4"))
    assert done.returncode == 0, done.stderr
    return workdir


def moved(workdir: Path) -> np.ndarray:
    """How far fine-tuning moved each parameter of the student."""
    folder, config = run_folder.open_for_reading(workdir)
    _, variables = from_config.teacher(config)
    student, _ = pipeline.restore_student(folder, variables, config, "latest", from_config.student(config))
    return np.asarray(ravel_pytree(student["params"])[0] - ravel_pytree(variables["params"])[0])


def assert_same(workdir: Path, other: Path) -> None:
    """Images, losses, accuracy and the way that the student went agree to float tolerance.

    A relative change of 1e-7 in the first parameters, on one device, moves the student by up to 6e-4 of its way and a loss by
    up to 2.3 %, where a code flips (eight random changes; a larger learning rate: more). Another seed moves it by 0.095, a lost
    momentum by 0.023, parameters lost at step 10 by 0.028; a step skipped changes a loss by up to 58 %.
    """
    images = [np.load(path / "synthetic" / "images.npy") for path in (workdir, other)]
    np.testing.assert_allclose(*images, atol=1e-2)
    labels = [np.load(path / "synthetic" / "labels.npy") for path in (workdir, other)]
    np.testing.assert_array_equal(*labels)
    lines = [
        {line["step"]: line for line in tiny.metrics_without_time(path) if line["stage"] == "finetune"}
        for path in (workdir, other)
    ]
    assert lines[0].keys() == lines[1].keys()
    for step, line in lines[0].items():
        for name in ("loss", "kl", "fa"):
            np.testing.assert_allclose(line[name], lines[1][step][name], rtol=5e-2, err_msg=f"{name} at step {step}")
    way, other_way = moved(workdir), moved(other)
    assert np.linalg.norm(way - other_way) < 5e-3 * np.linalg.norm(way)
    results = [json.loads((path / "result.json").read_text()) for path in (workdir, other)]
    assert results[0]["teacher"] == results[1]["teacher"]
    for name in ("no_finetuning", "last"):
        assert abs(results[0][name] - results[1][name]) < 1


def test_two_processes_give_the_images_and_the_student_of_one_and_process_0_alone_speaks(alone: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    (status, output, errors), (other_status, silence, _) = end(two_processes(workdir, *WHOLE))
    assert status == other_status == 0, errors
    assert "last epoch" in output and "last epoch" not in silence
    assert_same(workdir, alone)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((alone / "metrics.jsonl").read_text().splitlines())
    done = tiny.call_anew(tiny.evaluate(workdir, "--devices=1"))
    assert done.returncode == 0, done.stderr
    found = float(re.search(r"student[^│]*│ *([\d.]+)", done.stdout)[1])
    assert found == pytest.approx(json.loads((workdir / "result.json").read_text())["last"], abs=0.2)


def logged_after(workdir: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the run has logged this step or a later one of the stage."""

    def moment() -> bool:
        lines = tiny.metrics_without_time(workdir) if (workdir / "metrics.jsonl").exists() else []
        return any(line["stage"] == stage and line["step"] >= step for line in lines)

    return moment


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes(alone: Path, tmp_path: Path) -> None:
    """Four devices, stopped among the images; then two processes, killed while fine-tuning; then one device."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        tiny.command(workdir, *WHOLE, "--config.devices=4"), cwd=tiny.ROOT, env=tiny.environment(), stderr=subprocess.DEVNULL
    )
    tiny.wait_until(process, tiny.logged(workdir, "synthesis", 15))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and not (workdir / "ranges.json").exists()
    saved = [int(path.name) for path in (workdir / "checkpoints" / "synthesis").iterdir() if path.name.isdigit()]
    assert max(saved) > 0
    processes = two_processes(workdir, *WHOLE)
    tiny.wait_until(processes[0], logged_after(workdir, "finetune", 15))
    for each in processes:
        each.kill()
    end(processes)
    assert not (workdir / "result.json").exists()
    done = tiny.call_anew(tiny.command(workdir, *WHOLE, "--config.devices=1"))
    assert done.returncode == 0, done.stderr
    assert_same(workdir, alone)


@pytest.mark.slow
def test_one_of_two_processes_writes_the_report(tmp_path: Path) -> None:
    ends = end(two_processes(tmp_path / "run", "--config.report=True", "--config.finetune.epochs=10"))
    assert [status for status, *_ in ends] == [0, 0], ends
    assert (tmp_path / "run" / "report.html").exists() and "report:" in ends[0][1] and "report:" not in ends[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("to", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    ("stage", "folder", "length"),
    [
        ("synthesis", "synthesis", "--config.synthesis.iterations=5000"),
        ("finetune", "latest", "--config.finetune.epochs=500"),
    ],
)
def test_sigterm_to_one_process_or_both_saves_and_ends_both_with_status_75(
    tmp_path: Path, stage: str, folder: str, length: str, to: tuple[int, ...]
) -> None:
    """The runs are long, so that the signal comes in the middle."""
    workdir = tmp_path / "run"
    processes = two_processes(workdir, length)
    tiny.wait_until(processes[0], logged_after(workdir, stage, 5))
    for index in to:
        processes[index].send_signal(signal.SIGTERM)
    ends = end(processes)
    assert [status for status, _, _ in ends] == [75, 75], ends
    assert all("run the same command again to resume" in errors for _, _, errors in ends), ends
    assert not (workdir / "result.json").exists()
    assert any(path.name.isdigit() and int(path.name) > 0 for path in (workdir / "checkpoints" / folder).iterdir())


@pytest.mark.parametrize(
    ("dies", "stage"),
    [
        pytest.param(1, "finetune", marks=pytest.mark.slow),
        pytest.param(0, "finetune", marks=pytest.mark.slow),
        pytest.param(1, "synthesis", marks=pytest.mark.slow),
    ],
)
def test_where_one_process_dies_the_other_ends_with_a_sentence(tmp_path: Path, dies: int, stage: str) -> None:
    """Process 0 is also the one by which all know of each other."""
    workdir = tmp_path / "run"
    processes = two_processes(workdir, f"--config.synthesis.iterations={1000 if stage == 'synthesis' else 20}")
    tiny.wait_until(processes[0], logged_after(workdir, stage, 5))
    processes[dies].kill()
    other = processes[1 - dies]
    _, errors = other.communicate(timeout=120)
    processes[dies].communicate()
    # A collective that does not notice is ended by JAX, in its words.
    words = "another process of this run has ended|another task died|leader task was preempted/died"
    assert other.returncode != 0 and re.search(words, errors), errors
    assert "Extension modules" not in errors


@pytest.mark.parametrize(
    ("words", "second"),
    [
        ("the processes of this run do not have the same config:", ["--config.log_every=3"]),
        ("holds no synthetic set", ["--config.eval.held_out=/nowhere"]),  # only the second one looks there
        pytest.param("the processes of this run have [2, 1] devices:", ["--config.devices=1"], marks=pytest.mark.slow),
    ],
)
def test_processes_that_were_not_given_the_same_command_are_refused(tmp_path: Path, words: str, second: list[str]) -> None:
    ends = end(twice(tiny.command(tmp_path / "run", *CALM), second))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all(words in errors and "Traceback" not in errors for _, _, errors in ends), ends


@pytest.mark.slow
def test_processes_with_other_held_out_images_are_refused(finished: Path, tmp_path: Path) -> None:
    """Otherwise only one of them would measure the agreement, and would wait for the other."""
    ends = end(twice(tiny.command(tmp_path / "run", *CALM), [f"--config.eval.held_out={finished}/synthetic"]))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all("do not have the same held-out images:" in errors for _, _, errors in ends), ends


def test_an_error_in_the_main_process_keeps_its_type_and_its_cause() -> None:
    refused, full = InputError("images are missing."), OSError(errno.ENOSPC, "No space left", "result.json")
    for error, kind, cause in ((refused, InputError, None), (full, UserError, full)):

        def fail(error=error):
            raise error

        with pytest.raises(kind) as raised:
            processes.on_main(fail)
        assert raised.value.__cause__ is cause


def test_a_process_that_meets_a_broken_one_says_what_that_one_said(tmp_path: Path) -> None:
    """The part of the other process is played by the same one: it leaves its sentence, and then meets the broken connection."""
    code = f"""
import jax
from pathlib import Path
from hast_jax.runs import processes
jax.process_count = lambda: 2
processes.on_main = lambda action: action()
Path({str(tmp_path)!r}, processes.FAILURE).write_text("of an earlier start")
processes.share_failures(Path({str(tmp_path)!r}))
processes.tell_failure("synthesis diverged; lower config.synthesis.lr.")
processes.leave_broken("Connection closed by peer")
"""
    done = tiny.call_anew([sys.executable, "-c", code])
    words = "hast_jax: another process of this run has ended, process 0: synthesis diverged; lower config.synthesis.lr."
    assert done.returncode == 1 and done.stderr.strip() == words


@pytest.mark.parametrize("row", [1, -2], ids=["process 0", "process 1"])  # rows that no process reads besides its batches
def test_when_a_process_fails_alone_the_others_say_why_and_end_with_it(row: int, tmp_path: Path) -> None:
    digits = datasets.load(tiny.config(), "test")
    for i, (image, label) in enumerate(zip(digits.images[:128], digits.labels[:128])):
        place = tmp_path / "images" / "val" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{i:03}.png")
    cut = sorted((tmp_path / "images" / "val").rglob("*.png"))[row]  # the processes take turns with batches
    cut.write_bytes(cut.read_bytes()[:60])
    fields = {"dataset": "folder", "data_dir": tmp_path / "images", "split": "val", "crop": 1, "batch": 64}
    command = tiny.command(tmp_path / "run", *CALM, *(f"--config.eval.{name}={value}" for name, value in fields.items()))
    ends = end(twice(command))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all(f"{cut.name} cannot be decoded" in errors and "Traceback" not in errors for _, _, errors in ends), ends
    assert sum("another process of this run has ended, process" in errors for _, _, errors in ends) == 1


@pytest.mark.slow
def test_an_evaluation_by_processes_with_other_images_is_refused(finished: Path) -> None:
    command = tiny.evaluate(finished, "--devices=1", "--dataset=digits")
    ends = end(twice(command, ["--split=train"]))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all("do not have the same config, real images:" in errors for _, _, errors in ends), ends
    ends = end(twice(command, ["--dataset=folder", "--data_dir=/nowhere"]))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all("there are no images in /nowhere" in errors for _, _, errors in ends), ends


@pytest.mark.slow
def test_processes_on_file_systems_of_their_own_are_refused(tmp_path: Path) -> None:
    """Two folders stand for two file systems: the same names, another place."""
    places = [tmp_path / name for name in ("a", "b")]
    state, _ = weights.read(weights.locate("digits"))
    for factor, place in enumerate(places, start=1):
        place.mkdir()
        np.savez(place / "teacher.npz", **{name: array * np.float32(factor) for name, array in state.items()})
    command = tiny.command(Path("run"), *CALM, "--config.teacher.weights=teacher.npz")
    ends = end(twice(command, places=places))
    assert [status for status, _, _ in ends] == [1, 1], ends
    assert all("do not have the same weights, run folder" in errors for _, _, errors in ends), ends


@pytest.mark.slow
def test_the_benchmark_times_a_step_that_two_processes_take_together() -> None:
    digits = f"--config={tiny.ROOT}/configs/digits.py:w3a3,small"
    ends = end(twice([*tiny.module("benchmark"), digits, "--part=finetune", "--steps=1", "--config.devices=1"]))
    assert [status for status, _, _ in ends] == [0, 0], ends
    line = json.loads(next(line for line in ends[0][1].splitlines() if line.startswith("{")))
    assert line["devices"] == 2 and line["batch"] == 64 and line["per_second"] > 0
    assert "per_second" not in ends[1][1]


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        *((text, "it must be auto, or HOST:PORT") for text in ("two", "127.0.0.1:1,2,x", "localhost,1,0", "localhost:abc,1,0")),
        ("127.0.0.1:1,2,2", "an INDEX from 0 to NUMBER - 1"),
        ("auto", "did not come"),
    ],
)
def test_processes_that_cannot_come_together_are_refused(tmp_path: Path, processes: str, words: str) -> None:
    done = tiny.call_anew(tiny.command(tmp_path / "run", f"--processes={processes}"))
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_batches_that_were_begun_go_on_together_before_others_begin() -> None:
    assert synthesize.plan([0, 1, 2, 3, 4], {}, 2) == [([0, 1], 0), ([2, 3], 0), ([4], 0)]
    assert synthesize.plan([1, 2, 3, 4], {2: 500, 3: 500, 4: 250}, 1) == [([2], 500), ([3], 500), ([4], 250), ([1], 0)]
    assert synthesize.plan([1, 2, 3, 4], {2: 500, 3: 500}, 4) == [([2, 3], 500), ([1, 4], 0)]
    assert synthesize.plan([], {}, 4) == []
