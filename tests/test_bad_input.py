"""Bad input of every kind ends in one sentence that says what to do, and nothing finished is lost."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from filelock import FileLock

import hast_jax.evaluate
from hast_jax import paths, report
from hast_jax.errors import CheckpointWarning, Notice, UserError, refused_by_disk
from hast_jax.runs import checkpoint, run_folder, synthetic_set
from hast_jax.runs.checkpoint import Checkpoints
from hast_jax.runs.progress import read_metrics


def test_a_corrupt_synthetic_set_is_noticed(unfinished: Path) -> None:
    with open(unfinished / "synthetic" / "images.npy", "r+b") as file:
        file.seek(5000)
        file.write(b"spoilt")
    with pytest.raises(UserError, match=r"is damaged: batch"):
        tiny.run(unfinished)


def test_a_truncated_synthetic_set_is_noticed(unfinished: Path) -> None:
    os.truncate(unfinished / "synthetic" / "images.npy", 5000)
    with pytest.raises(UserError, match=r"is damaged"):
        tiny.run(unfinished)


def test_a_teacher_of_other_weights_under_the_same_name_is_refused(copy: Path) -> None:
    (copy / "teacher.json").write_text('{"crc32": 1}')
    with pytest.raises(UserError, match="began with a teacher of other weights"):
        tiny.run(copy)
    done = tiny.call(tiny.evaluate(copy))
    assert done.returncode == 1 and "began with a teacher of other weights" in done.stderr


def test_a_damaged_small_file_is_named_and_the_same_run_goes_on_without_it(finished: Path, copy: Path) -> None:
    for name in ("result.json", "config.json", "teacher.json", "segments.json", "images.json"):
        for content in ('{"half": ', "3"):
            (copy / name).write_text(content)
            with pytest.raises(UserError, match=rf"{name} is damaged .*: delete it, and repeat the command that made the run"):
                tiny.run(copy)
        (copy / name).unlink()
    assert tiny.run(copy)["last"] == json.loads((finished / "result.json").read_text())["last"]


def test_without_the_accuracies_of_earlier_epochs_a_run_ends_with_those_that_can_be_measured(
    finished: Path, unfinished: Path
) -> None:
    (unfinished / "evaluations.json").write_text('{"half": ')
    with pytest.warns(Notice, match=r"evaluations.json is missing or damaged \(.*\): the best epoch is chosen among those"):
        again = tiny.run(unfinished)
    whole = json.loads((finished / "result.json").read_text())
    assert [again[name] for name in ("no_finetuning", "last")] == [whole[name] for name in ("no_finetuning", "last")]


@pytest.mark.parametrize("ended", [True, False])
def test_a_command_that_is_refused_changes_nothing(copy: Path, tmp_path: Path, ended: bool) -> None:
    if not ended:
        (copy / "result.json").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    other = Path(shutil.copytree(copy / "synthetic", tmp_path / "other"))
    np.save(other / "images.npy", 1 + np.load(other / "images.npy"))
    (other / "index.json").unlink()
    with pytest.raises(UserError, match="began with other images"):
        tiny.run(copy, synthesis__source=str(other))
    same = Path(shutil.copytree(copy / "synthetic", tmp_path / "same"))
    with pytest.raises(UserError, match="holds images that the student is trained on"):
        tiny.run(copy, synthesis__source=str(same), eval__held_out=str(same))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_run_that_began_with_given_images_makes_none_of_its_own(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["synthesis"]["source"] = "elsewhere"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"began with the images of elsewhere: name them again, or use another workdir"):
        tiny.run(copy)


def test_a_finished_run_without_its_config_knows_the_config_from_its_result(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"made with another config: finetune.eps: 0.02 -> 0.5"):
        tiny.run(copy, finetune__eps=0.5)
    assert not (copy / "config.json").exists() and run_folder.open_for_reading(copy)[1].finetune.eps == 0.02
    tiny.run(copy)
    assert (copy / "config.json").exists()


def test_values_of_small_files_that_are_of_another_kind_are_left_out(copy: Path) -> None:
    folder = run_folder.RunFolder(copy)
    for content in ([1], [{"started": "x"}]):
        folder.write_segments(content)
        assert folder.read_segments() == []
    folder.teacher.write_text('{"crc32": 0, "program": 2, "accuracy": {}}')
    assert folder.teacher_accuracy() is None
    folder.check_teacher({}, 3)  # without the version of JAX, programs are not compared
    folder.metrics.write_text('{"stage": "finetune", "step": null, "seconds": 1}\n')
    assert read_metrics(folder.metrics) == []


def test_a_refused_folder_leaves_no_lock_that_could_be_taken_for_anothers(tmp_path: Path) -> None:
    """A file system may give the lock of a new folder the inode of a deleted one."""
    holder = f"import sys, filelock; lock = filelock.FileLock('{tmp_path}/.lock'); lock.acquire(); print('held', flush=True)"
    command = [sys.executable, "-c", f"{holder}; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        known = dict(run_folder._held)
        with pytest.raises(UserError, match="another run is using"):
            run_folder._hold(tmp_path / ".lock")
        assert run_folder._held == known
        other.stdin.close()


def test_the_report_of_other_images_than_the_run_learned_from_is_refused(copy: Path) -> None:
    images = np.load(copy / "synthetic" / "images.npy")
    np.save(copy / "synthetic" / "images.npy", 1 + images)
    (copy / "synthetic" / "index.json").unlink()
    with pytest.raises(UserError, match=r"synthetic does not hold the images that .* learned from: repeat the command"):
        report.run(copy)


def test_a_damaged_line_of_the_log_is_left_out_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"stage": "finetune", "step": step, "seconds": step}) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "X" + lines[1], "[]", *lines[2:], lines[3][:20]]))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2, 3]


def test_a_checkpoint_larger_than_a_process_may_write_is_refused_with_the_limit(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, 1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            with pytest.raises(OSError) as error:
                checkpoints.save(1, {"a": np.zeros(2**18, np.float32)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a file is larger than this process may write: raise the limit" in str(refused_by_disk(error.value))


@pytest.mark.parametrize("content", ['{"half": ', "[1]", "{}", '{"activ/low": NaN}'])
def test_damaged_ranges_are_named(unfinished: Path, content: str) -> None:
    (unfinished / "ranges.json").write_text(content)
    with pytest.raises(UserError, match=r"ranges.json is damaged \(.*\): delete it to calibrate again"):
        tiny.run(unfinished)


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "report.html", "config.json", "result.json", "teacher.json", "metrics.jsonl", "images.json"),
        *("checkpoints/best/100/weights", "checkpoints/mine", "student/student.safetensors", "synthetic/labels.npy"),
    ],
)
@pytest.mark.parametrize("content", ['{"lr": 0.1}', "mine"])
def test_a_folder_with_files_of_another_program_is_no_run_folder(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"is no run folder, and its {name.split('/')[0]} would be lost: use another workdir"):
        tiny.run(tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.rglob("*"))) == len(Path(name).parts)


def test_a_foreign_config_is_no_run_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    done = tiny.call(tiny.evaluate(tmp_path))
    assert done.returncode == 1 and "is no run folder, or its config.json is lost: give the --workdir" in done.stderr


def test_given_images_that_are_too_few_are_refused_before_the_folder_is_made(finished: Path, tmp_path: Path) -> None:
    source = str(finished / "synthetic")
    with pytest.raises(UserError, match=r"holds 96 images, fewer than a batch: lower config.finetune.batch"):
        tiny.run(tmp_path / "run", synthesis__source=source, synthesis__images=1024, finetune__batch=128)
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="mount its file system with flock"):
        tiny.run(tmp_path / "run")


def test_a_foreign_synthetic_set_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((100, 3, 32, 32), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(100, np.int32))
    with pytest.raises(UserError, match=r"the network needs float32 images \[n, 8, 8, 1\]"):
        synthetic_set.load(tmp_path, (8, 8, 1), 10)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda images, labels: images.__setitem__((7, 0, 0, 0), np.nan), "image 7 of .* not finite"),
        (lambda images, labels: labels.__setitem__(3, 10), "label 3 of .* is 10: labels must be from 0 to 9"),
        (lambda images, labels: labels.__setitem__(3, -1), "label 3 of .* is -1: labels must be from 0 to 9"),
    ],
)
def test_values_of_a_foreign_set_that_nothing_can_be_learned_from_are_named(tmp_path: Path, spoil, words: str) -> None:
    images, labels = np.zeros((300, 8, 8, 1), np.float32), np.zeros(300, np.int32)
    spoil(images, labels)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=words):
        synthetic_set.load(tmp_path, (8, 8, 1), 10)
    np.save(tmp_path / "labels.npy", labels.astype(np.float32))
    with pytest.raises(UserError, match=r"labels of .* are float32: they must be whole numbers"):
        synthetic_set.load(tmp_path, (8, 8, 1), 10)


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_passed_over(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Checkpoints, "_restore", fail)
    (copy / "result.json").unlink()
    with pytest.raises(UserError, match=r"cannot be read now \(.*[Ss]tale.*\): run the same command again later"):
        tiny.run(copy)


@pytest.mark.parametrize("address", ["gs://b/run", "s3://b/run", "hdfs:/b", "https://b/run"])
def test_the_address_of_a_bucket_is_no_path_and_the_home_folder_is(address: str) -> None:
    with pytest.raises(UserError, match="is no path of this machine"):
        paths.local(address)
    with pytest.raises(UserError, match="begins with a home folder that does not exist"):
        paths.local("~nobody-of-this-name/run")
    assert paths.local("~/run") == Path.home() / "run" and paths.local("a:/b") == Path("a:/b")


def test_the_address_of_a_bucket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    address = "gs://bucket/run"
    for flag in (f"--workdir={address}", "--config.synthesis.source=" + address, "--config.teacher.weights=" + address):
        done = tiny.call([*tiny.command(tmp_path / "run"), flag], tmp_path)
        assert (
            done.returncode == 1 and f"{address} is no path of this machine" in done.stderr and "Traceback" not in done.stderr
        )
        assert not list(tmp_path.iterdir())


def truncate_checkpoint(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)


def largest_of(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.parent.name == "d"), key=lambda path: path.stat().st_size)


def shorten_the_arrays(folder: Path) -> None:
    os.truncate(largest_of(folder), 1000)


def flip_a_bit(folder: Path) -> None:
    largest = largest_of(folder)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def newest(folder: Path) -> Path:
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # a user would see each as a traceback
@pytest.mark.parametrize("damage", [truncate_checkpoint, shorten_the_arrays, flip_a_bit])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    unfinished: Path, finished: Path, damage: Callable[[Path], None]
) -> None:
    damage(newest(unfinished / "checkpoints" / "latest"))
    with pytest.warns(CheckpointWarning, match="is passed over"):
        tiny.run(unfinished)
    assert tiny.outcome(unfinished) == tiny.outcome(finished)


def test_when_every_checkpoint_is_damaged_the_run_says_what_to_delete(unfinished: Path) -> None:
    for path in (unfinished / "checkpoints" / "latest").iterdir():
        truncate_checkpoint(path)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(.*\): delete this folder"):
        tiny.run(unfinished)


def test_a_damaged_best_student_cannot_be_made_again(copy: Path) -> None:
    for path in (copy / "checkpoints" / "best").iterdir():
        truncate_checkpoint(path)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(UserError, match=r"the best student .* is damaged, .* --checkpoint=latest"),
    ):
        hast_jax.evaluate.run(copy, "best")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a file")


def test_files_that_may_not_be_read_are_not_called_damaged(unfinished: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be read now \(.*Permission denied.*\): run"):
        patch.setattr(checkpoint, "_open_each", refuse)
        tiny.run(unfinished)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a file: no permission: change the permissions"):
        patch.setattr(np.lib.format, "open_memmap", refuse)
        tiny.run(unfinished)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a file: no permission: change the permissions"):
        patch.setattr(FileLock, "acquire", refuse)
        tiny.run(unfinished)


def test_of_a_finished_run_the_saved_student_is_evaluated_when_no_checkpoint_may_be_read(copy: Path, monkeypatch) -> None:
    expected = hast_jax.evaluate.run(copy).student
    monkeypatch.setattr(checkpoint, "_open_each", refuse)
    assert hast_jax.evaluate.run(copy).student == expected
    with pytest.raises(UserError, match="cannot be read now"):
        hast_jax.evaluate.run(copy, "best")


def test_every_file_of_a_checkpoint_is_opened_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "array").write_bytes(b"")
    checkpoint._open_each(tmp_path)
    (tmp_path / "state" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="gone"):
        checkpoint._open_each(tmp_path)


def test_a_quota_that_a_checkpoint_exceeds_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: Disk quota exceeded [os_error_code='122']")

    words = "the disk is full, or a quota is used up: there is no room for a checkpoint in"
    with pytest.raises(UserError, match=words), Checkpoints(tmp_path, 1) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "save", fail)
        monkeypatch.setattr(checkpoints._checkpointer, "close", fail)
        checkpoints.save(1, {"a": np.zeros(3)})


def test_of_a_finished_run_the_saved_student_is_evaluated_when_every_checkpoint_is_damaged(finished: Path, copy: Path) -> None:
    for path in (copy / "checkpoints" / "latest").iterdir():
        truncate_checkpoint(path)
    with pytest.warns(CheckpointWarning):
        found, expected = (hast_jax.evaluate.run(folder) for folder in (copy, finished))
    assert found.student == expected.student


@pytest.mark.parametrize(
    ("name", "command"), [("config.json", hast_jax.evaluate.run), ("result.json", report.run)], ids=["config", "result"]
)
def test_a_file_that_is_nested_too_deeply_is_damaged(copy: Path, name: str, command: Callable) -> None:
    (copy / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{name} is damaged \(it is nested too deeply\)"):
        command(copy)


def test_a_diverging_run_stops_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune diverged: .* lower config.finetune.lr"):
        tiny.run(tmp_path / "run", finetune__lr=1e9, synthesis__iterations=5)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the run folder .* cannot be written"):
        tiny.run(tmp_path / "file" / "run")


CIFAR10 = {
    "teacher__network": "resnet20",
    "teacher__weights": "cifar10",
    "teacher__image": (32, 32, 3),
    "teacher__mean": (0.4914, 0.4822, 0.4465),
    "teacher__std": (0.2023, 0.1994, 0.2010),
    "eval__dataset": "cifar10",
}


def test_missing_evaluation_data_are_refused_before_synthesis_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tfds build cifar10 --file_format=array_record --data_dir=.*nowhere"):
        tiny.run(tmp_path / "run", **CIFAR10, eval__data_dir=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_data_that_could_never_fit_the_network_are_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar10 has images \(32, 32, 3\) of 10 classes, but the network takes images"):
        tiny.run(tmp_path / "run", eval__dataset="cifar10", eval__data_dir=str(tmp_path / "nowhere"))


def test_a_folder_that_is_no_run_cannot_be_evaluated(tmp_path: Path) -> None:
    done = tiny.call(tiny.evaluate(tmp_path))
    assert done.returncode == 1 and "is no run folder" in done.stderr and "Traceback" not in done.stderr


def test_a_run_that_is_not_calibrated_yet_holds_no_student(copy: Path) -> None:
    for name in ("ranges.json", "result.json"):
        (copy / name).unlink()
    done = tiny.call(tiny.evaluate(copy))
    assert done.returncode == 1 and "holds no latest student yet: let its run reach the end of an epoch" in done.stderr


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
        done = tiny.call_anew(tiny.command(disk / "run"))
        assert done.returncode == 1 and "the disk is full" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        done = tiny.call_anew(tiny.command(disk / "run"))
        assert done.returncode == 0, done.stderr
        assert tiny.outcome(disk / "run") == tiny.outcome(finished)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
