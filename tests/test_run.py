"""A whole run: what it leaves behind, that it goes on where it was killed, and what it refuses."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from hast_jax import synthetic_set
from hast_jax.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, made by the command."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = tiny.call(tiny.command(workdir))
    assert done.returncode == 0, done.stderr
    assert "full precision (teacher)" in done.stdout and "quantized, no fine-tuning" in done.stdout
    return workdir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_folder_holds_what_the_readme_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "synthetic", "synthetic.png", "ranges.json", "checkpoints", "metrics.jsonl"}
    assert names >= {"tensorboard", "evaluations.json", "result.json"}
    assert {path.name for path in (finished / "checkpoints").iterdir()} >= {"latest", "best"}
    images = np.load(finished / "synthetic" / "images.npy")
    assert images.shape == (96, 8, 8, 1) and images.dtype == np.float32 and np.isfinite(images).all()
    with Image.open(finished / "synthetic.png") as picture:
        assert min(picture.size) > 100


def test_the_result_reports_teacher_last_and_best(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["teacher"] > 99 and result["last"] > 50 and result["best"] >= result["last"]
    assert (result["images"], result["iterations"], result["steps"], result["batch"], result["seed"]) == (96, 20, 30, 16, 0)
    assert set(result["seconds"]) == {"synthesis", "calibrate", "finetune"} and "cpu" in result["hardware"]


def test_the_same_seed_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    assert tiny.call(tiny.command(tmp_path / "again")).returncode == 0
    assert tiny.outcome(tmp_path / "again") == tiny.outcome(finished)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("synthesis", 20), ("synthesis", 50), ("finetune", 5), ("finetune", 15)],
)
def test_a_run_killed_at_any_moment_goes_on_and_ends_like_an_unbroken_one(
    finished: Path, tmp_path: Path, stage: str, step: int
) -> None:
    workdir = tmp_path / "killed"
    tiny.kill_when(tiny.command(workdir), tiny.logged(workdir, stage, step))
    done = tiny.call(tiny.command(workdir))
    assert done.returncode == 0, done.stderr
    assert tiny.outcome(workdir) == tiny.outcome(finished)


def test_a_finished_run_started_again_only_prints_its_table(copy: Path) -> None:
    before = tiny.outcome(copy)
    done = tiny.call(tiny.command(copy))
    assert done.returncode == 0 and "last epoch" in done.stdout
    assert tiny.outcome(copy) == before


def test_another_config_in_the_same_folder_is_refused_and_the_difference_shown(copy: Path) -> None:
    with pytest.raises(UserError, match=r"finetune.eps: 0.02 -> 0.5; use another --workdir"):
        tiny.run(copy, finetune__eps=0.5)


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_restores_the_student_on_another_number_of_devices(finished: Path, devices: int) -> None:
    done = tiny.call(tiny.command(finished, f"--devices={devices}", module="evaluate"))
    assert done.returncode == 0, done.stderr
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['teacher']:.2f}" in done.stdout and f"{result['last']:.2f}" in done.stdout


def test_evaluation_of_the_best_student(finished: Path) -> None:
    done = tiny.call(tiny.command(finished, "--checkpoint=best", module="evaluate"))
    result = json.loads((finished / "result.json").read_text())
    assert done.returncode == 0 and f"{result['best']:.2f}" in done.stdout


def test_a_run_without_evaluation_data_needs_none(tmp_path: Path) -> None:
    result = tiny.run(tmp_path / "run", eval__dataset="none", finetune__epochs=1)
    assert result["teacher"] is None and result["last"] is None


def test_a_synthetic_set_is_reused_from_another_run(finished: Path, tmp_path: Path) -> None:
    result = tiny.run(tmp_path / "run", synthesis__source=str(finished / "synthetic"), finetune__epochs=1, bits__weights=4)
    assert result["images"] == 96 and not (tmp_path / "run" / "synthetic").exists()


# Bad input: each ends in one sentence.


def test_a_corrupt_synthetic_set_is_noticed(copy: Path) -> None:
    with open(copy / "synthetic" / "images.npy", "r+b") as file:
        file.seek(5000)
        file.write(b"spoilt")
    with pytest.raises(UserError, match="is damaged: batch"):
        tiny.run(copy)


def test_a_truncated_synthetic_set_is_noticed(copy: Path) -> None:
    os.truncate(copy / "synthetic" / "images.npy", 5000)
    with pytest.raises(UserError, match="images.npy is damaged"):
        tiny.run(copy)


def test_a_foreign_synthetic_set_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((100, 3, 32, 32), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(100, np.int32))
    with pytest.raises(UserError, match=r"the network needs float32 images \[n, 8, 8, 1\]"):
        synthetic_set.load(tmp_path, (8, 8, 1))


def truncate_checkpoint(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)


def newest(folder: Path) -> Path:
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before_it(copy: Path, finished: Path) -> None:
    truncate_checkpoint(newest(copy / "checkpoints" / "latest"))
    (copy / "result.json").unlink()
    tiny.run(copy)
    assert tiny.outcome(copy)["accuracies"] == tiny.outcome(finished)["accuracies"]


def test_when_every_checkpoint_is_damaged_the_run_says_what_to_delete(copy: Path) -> None:
    for path in (copy / "checkpoints" / "latest").iterdir():
        truncate_checkpoint(path)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged: delete"):
        tiny.run(copy)


def test_a_diverging_run_stops_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune diverged: .* lower config.finetune.lr"):
        tiny.run(tmp_path / "run", finetune__lr=1e9, synthesis__iterations=5)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the run folder .* cannot be written"):
        tiny.run(tmp_path / "file" / "run")


def test_missing_evaluation_data_are_refused_before_synthesis_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tfds build cifar10 --file_format=array_record --data_dir=.*nowhere"):
        tiny.run(tmp_path / "run", eval__dataset="cifar10", eval__data_dir=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_cannot_be_evaluated(tmp_path: Path) -> None:
    done = tiny.call(tiny.command(tmp_path, module="evaluate"))
    assert done.returncode == 1 and "is no run folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.finetune.epss=1", "epss"),
        ("--config.bits.weights=0", "between 2 and 8"),
        ("--config.finetune.lr=fast", "lr"),
        ("--config=configs/nothing.py", "nothing.py"),
        ("--config=configs/digits.py:w3", "no variant 'w3'"),
        ("--config.devices=3", "not divisible by the 3 devices"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_sentence(tmp_path: Path, argument: str, words: str) -> None:
    done = tiny.call([*tiny.command(tmp_path / "run"), argument])
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(finished: Path, tmp_path: Path) -> None:
    """On a file system of 2 MiB: the run stops, and goes on once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        done = tiny.call(tiny.command(disk / "run"))
        assert done.returncode == 1 and "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        done = tiny.call(tiny.command(disk / "run"))
        assert done.returncode == 0, done.stderr
        assert tiny.outcome(disk / "run") == tiny.outcome(finished)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
