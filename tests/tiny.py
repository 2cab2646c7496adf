"""A run of seconds on the built-in digits: every stage, a few steps each."""

import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hast_jax import pipeline

ROOT = Path(__file__).parent.parent
# XLA compiles in half the time. Programs of tiny networks are as fast as with XLA's defaults.
QUICK_COMPILATION = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
FIELDS = {
    "report": False,
    "log_every": 5,
    "devices": 2,
    "synthesis.images": 96,
    "synthesis.batch": 32,
    "synthesis.iterations": 20,
    "synthesis.save_every": 10,
    "calibration.batches": 5,
    "finetune.batch": 16,
    "finetune.epochs": 3,
    "finetune.steps_per_epoch": 10,
    "finetune.lr": 1e-4,
    "eval.every": 1,
}

# A process that has imported what commands import; `call` forks it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["hast_jax.cli", "hast_jax.pipeline", "hast_jax.deliver.console", "hast_jax.paper.tables", "sklearn.datasets"]
)

LEARNED = {"finetune.ranges": "learned", "finetune.optimizer": "adam", "finetune.lr": 1e-3, "finetune.ranges_lr": 1e-2}


def config(**changes) -> ConfigDict:
    """The tiny config; `changes` are fields with "__" for a dot."""
    from test_config import get_config

    values = get_config(ROOT / "configs" / "digits.py")
    values.update_from_flattened_dict(FIELDS | {name.replace("__", "."): value for name, value in changes.items()})
    return values


def run(workdir: Path, **changes) -> dict:
    """`pipeline.run` in this process, quietly."""
    return pipeline.run(config(**changes), workdir)


def module(name: str) -> list[str]:
    """The command line of one of the package's commands."""
    return [sys.executable, "-m", f"hast_jax.{name}"]


def command(workdir: Path, *arguments: str) -> list[str]:
    """The command line of the tiny run."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return [*module("main"), f"--config={ROOT}/configs/digits.py", f"--workdir={workdir}", *fields, *arguments]


def learned_command(workdir: Path) -> list[str]:
    """The command line of the tiny run with learned ranges, which ends with a report."""
    return command(workdir, "--config.report=True", *(f"--config.{name}={value}" for name, value in LEARNED.items()))


def evaluate(workdir: Path, *arguments: str) -> list[str]:
    """The command line that evaluates a run folder."""
    return [*module("evaluate"), f"--workdir={workdir}", *arguments]


def environment() -> dict[str, str]:
    """The environment of commands: without the flag that commands set.

    Commands have as many threads as the tests, because on some CPUs the last bits of a result depend on this number.
    """
    return os.environ | {"XLA_FLAGS": QUICK_COMPILATION}


def call(arguments: list[str], place: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the package's commands to its end, in a folder, as a fork of FORKS. This saves the time of its imports.

    The variables JAX_..., which JAX reads when it is imported, are those of the time when FORKS began.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        for path in outputs:
            path.touch()
        process = FORKS.Process(target=_become, args=(arguments[2:], place, outputs, environment()))
        process.start()
        process.join(timeout=600)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _become(arguments: list[str], place: Path, outputs: list[Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def call_anew(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run any command to its end, as a process that begins with nothing, such as a user's."""
    return subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


class Memory:
    """After this context, `most` is the number of bytes by which the memory of this process grew at most within it."""

    def __enter__(self) -> "Memory":
        Path("/proc/self/clear_refs").write_text("5")  # the largest size begins anew
        self._before = self._largest()
        return self

    def __exit__(self, *_: object) -> None:
        self.most = self._largest() - self._before

    def _largest(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def kill_when(arguments: list[str], moment: Callable[[], bool]) -> None:
    """Start a command and SIGKILL it as soon as `moment()`."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(process, moment)
    process.kill()
    process.wait()


def wait_until(process: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Wait for `moment()` of a running command."""
    while process.poll() is None and not moment():
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before that moment"


def logged(workdir: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the run has logged a step of a stage."""

    def moment() -> bool:
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return any(f'"stage": "{stage}", "step": {step},' in line for line in lines)

    return moment


def outcome(workdir: Path) -> dict:
    """What two equal runs must have in common: images, ranges, accuracies."""
    result = json.loads((workdir / "result.json").read_text())
    return {
        "images": np.load(workdir / "synthetic" / "images.npy").tobytes(),
        "labels": np.load(workdir / "synthetic" / "labels.npy").tobytes(),
        "ranges": (workdir / "ranges.json").read_text(),
        "evaluations": (workdir / "evaluations.json").read_text(),
        "accuracies": {name: result[name] for name in ("teacher", "no_finetuning", "last", "best", "best_epoch")},
        "metrics": metrics_without_time(workdir),
    }


def metrics_without_time(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold values, without their seconds, in the order of stage and step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return [line for line in lines if len(line) > 2]
