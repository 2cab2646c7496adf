"""What befalls a run from outside: it ends in a sentence, goes on where it was, and loses nothing that was finished."""

import collections
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny

from hast_jax.errors import UserError
from hast_jax.runs import run_folder


def start(workdir: Path, *arguments: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(tiny.command(workdir, *arguments), cwd=tiny.ROOT, env=tiny.environment(), text=True, **pipes)


@pytest.mark.parametrize(("stage", "step"), [pytest.param("synthesis", 20, marks=pytest.mark.slow), ("finetune", 5)])
def test_sigterm_saves_and_ends_the_run_with_a_status_of_its_own(finished: Path, tmp_path: Path, stage: str, step: int) -> None:
    workdir = tmp_path / "run"
    process = start(workdir)
    tiny.wait_until(process, tiny.logged(workdir, stage, step))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again to resume" in errors and "Traceback" not in errors
    assert not (workdir / "result.json").exists()
    saved = workdir / "checkpoints" / ("latest" if stage == "finetune" else "synthesis")
    assert any(int(path.name) >= step for path in saved.iterdir() if path.name.isdigit())
    assert tiny.call_anew(tiny.command(workdir)).returncode == 0
    assert tiny.outcome(workdir) == tiny.outcome(finished)


def test_a_second_run_in_the_same_folder_refuses_while_the_first_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    endless = "--config.synthesis.iterations=1000000"
    process = start(workdir, endless)
    tiny.wait_until(process, (workdir / "config.json").exists)
    done = tiny.call_anew(tiny.command(workdir, endless))
    assert done.returncode == 1 and "another run is using" in done.stderr and "Traceback" not in done.stderr
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match="made with another config"):  # the lock died with its holder
        run_folder.open_for_run(workdir, tiny.config(seed=5))


def test_a_run_folder_with_a_link_to_elsewhere_is_refused(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("mine")
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(UserError, match=r"metrics.jsonl is a link"):
        tiny.run(copy)
    assert outside.read_text() == "mine"


KILLS = {"synthesis": 7, "calibration": 6, "finetune": 7}


@pytest.mark.slow
def test_no_kill_at_any_moment_changes_the_result(finished: Path, tmp_path: Path) -> None:
    """Runs that are killed again and again, in every stage, end like the unbroken one."""
    rng, hits, runs = random.Random(0), collections.Counter(), 0

    def lacks(workdir):
        return hits[stage(workdir)] < KILLS.get(stage(workdir), 0)

    while hits.total() < sum(KILLS.values()):
        workdir, runs = tmp_path / str(runs), runs + 1
        while not (workdir / "result.json").exists():
            process = start(workdir)
            while process.poll() is None and not lacks(workdir):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 5))
            if process.poll() is None and lacks(workdir):
                hits[stage(workdir)] += 1
                process.kill()
            process.communicate()
        assert tiny.outcome(workdir) == tiny.outcome(finished)
    print(json.dumps({"kills": hits, "runs": runs}))


def stage(workdir: Path) -> str:
    """What a run was doing, by what it has left."""
    if not (workdir / "config.json").exists():
        return "start"
    if not (workdir / "images.json").exists():
        return "synthesis"
    return "finetune" if (workdir / "ranges.json").exists() else "calibration"
