"""The launch scripts are sound, and what they start is what the command takes."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import tiny
import yaml

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DOCUMENTS = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
JOB = next(document for document in DOCUMENTS if document["kind"] == "Job")["spec"]
POD = JOB["template"]["spec"]["containers"][0]
ECHO = '#!/bin/sh\nprintf \'%s\\n\' "$0" "$@"\n'


def shellcheck(script: Path) -> None:
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck(script)
    assert os.access(script, os.X_OK)


def test_shellcheck_finds_nothing_in_what_the_manifest_runs(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(f"#!/bin/sh\n{POD['args'][0]}")
    shellcheck(tmp_path / "run.sh")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_the_manifest_fits_the_schema_of_kubernetes(document: dict) -> None:
    kubernetes_validate.validate(document, "1.30", strict=True)


def start(script: str, *arguments: str, tools: Path, **variables: str) -> list[str]:
    """What a script calls, where its cluster's command only prints its arguments."""
    for name in ("srun", "gcloud", "python"):
        (tools / name).write_text(ECHO)
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), **variables}
    done = subprocess.run([LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_scripts_hand_their_arguments_on(tmp_path: Path) -> None:
    run = ["configs/digits.py:w3a3", "/runs/a b", "--config.seed=1"]
    wanted = ["--config=configs/digits.py:w3a3", "--workdir=/runs/a b", "--config.seed=1"]
    assert start("local.sh", *run, tools=tmp_path)[-3:] == wanted
    assert start("slurm.sh", *run, tools=tmp_path, SLURM_SUBMIT_DIR=str(tiny.ROOT))[-4:] == ["--processes=auto", *wanted]
    command = start("tpu_pod.sh", "pod", "zone", *run, tools=tmp_path)[-1]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.split('hast_jax.main')[1]}"], capture_output=True, text=True
    )
    assert words.stdout.splitlines() == ["--processes=auto", *wanted]


@pytest.mark.parametrize("status", [0, 75, 1])
def test_a_pod_hands_sigterm_on_and_ends_as_the_command_does(tmp_path: Path, status: int) -> None:
    """The command's part is played by a script that ends on SIGTERM: finished at that very moment, stopped, or refused."""
    assert JOB["completions"] == JOB["parallelism"] == 2 and ",2,$JOB_COMPLETION_INDEX" in POD["args"][0]
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\ntrap 'touch {tmp_path}/saved; exit {status}' TERM\ntouch {tmp_path}/begun\nsleep 60 & wait\n"
    )
    python.chmod(0o755)
    text = POD["args"][0].replace("/data/runs/r18-w4a4", str(tmp_path))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
    pod = subprocess.Popen([*POD["command"], text], env=environment)
    tiny.wait_until(pod, (tmp_path / "begun").exists)
    pod.terminate()
    assert pod.wait(30) == status and (tmp_path / "saved").exists()


@pytest.mark.slow
def test_the_slurm_script_runs_where_srun_starts_two_tasks(tmp_path: Path) -> None:
    """srun's part is played by a loop that sets what Slurm sets for a task."""
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\nshift\nfor task in 0 1; do\n"
        'SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)\n'
        'done\nfor task in "${tasks[@]}"; do wait "$task" || exit; done\n'
    )
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tiny.ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    environment = tiny.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, **slurm}
    fields = [argument for argument in tiny.command(tmp_path / "run") if argument.startswith("--config.")]
    arguments = [LAUNCH / "slurm.sh", "configs/digits.py", tmp_path / "run", *fields]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last epoch") == 1 and "4 x cpu" in (tmp_path / "run" / "result.json").read_text()
