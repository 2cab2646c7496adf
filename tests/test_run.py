"""A whole run: what it leaves behind, that it goes on where it was killed, and what it refuses."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import hast_jax
from hast_jax import from_config, networks, pipeline, record
from hast_jax.errors import UserError
from hast_jax.runs.files import crc32


def test_the_folder_holds_what_the_page_on_commands_says(learned_run: Path, finished: Path) -> None:
    page = (tiny.ROOT / "docs" / "commands.md").read_text().partition("## The run folder")[2]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    deleted = {"checkpoints/synthesis"}  # once all images are made
    inside = {"labels.npy": "synthetic/labels.npy", "best": "checkpoints/best"}
    assert len(named) > 15 and {name for name in named if not (learned_run / inside.get(name, name)).exists()} == deleted
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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    assert tiny.call_anew(tiny.command(tmp_path / "again")).returncode == 0
    assert tiny.outcome(tmp_path / "again") == tiny.outcome(finished)


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("synthesis", 20),
        pytest.param("synthesis", 50, marks=pytest.mark.slow),
        pytest.param("finetune", 5, marks=pytest.mark.slow),
        ("finetune", 15),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_and_ends_like_an_unbroken_one(
    finished: Path, tmp_path: Path, stage: str, step: int
) -> None:
    workdir = tmp_path / "killed"
    tiny.kill_when(tiny.command(workdir), tiny.logged(workdir, stage, step))
    done = tiny.call_anew(tiny.command(workdir))
    assert done.returncode == 0, done.stderr
    assert tiny.outcome(workdir) == tiny.outcome(finished)
    result = json.loads((workdir / "result.json").read_text())
    first, second = result["segments"]
    assert min(first["seconds"].values()) >= 0 and max(first["seconds"].values()) > 0 and "2 x cpu" in second["hardware"]
    for name, seconds in result["seconds"].items():  # what was done after the last checkpoint is done again
        assert seconds <= second["spent_before"][name] + second["seconds"][name] + 0.11


@pytest.mark.parametrize("lost", [("synthetic", "checkpoints"), ("student",)])
def test_of_a_finished_run_nothing_is_done_again_and_a_lost_student_comes_back(copy: Path, lost: tuple[str, ...]) -> None:
    files = [copy / name for name in ("result.json", "student/student.safetensors", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    for name in lost:
        shutil.rmtree(copy / name)
    again = tiny.call(tiny.command(copy, "--config.devices=1"))
    assert again.returncode == 0 and "last epoch" in again.stdout and "full precision (teacher)" in again.stdout, again.stderr
    kept = 3 if "student" not in lost else 2  # a run that goes on logs that its stages have ended
    assert [file.read_bytes() for file in files][:kept] == before[:kept]
    assert not (copy / "synthetic").exists() or "synthetic" not in lost
    evaluated = tiny.call(tiny.evaluate(copy))
    assert evaluated.returncode == 0 and f"{json.loads(before[0])['last']:.2f}" in evaluated.stdout, evaluated.stderr


def test_held_out_images_may_be_named_after_the_run(copy: Path, tmp_path: Path) -> None:
    made = np.load(copy / "synthetic" / "images.npy")
    held_out = Path(shutil.copytree(copy / "synthetic", tmp_path / "held_out"))
    labels = np.load(held_out / "labels.npy")
    np.save(held_out / "images.npy", made + 1)
    index = json.loads((held_out / "index.json").read_text())
    batch = index["batch"]
    crcs = {b: crc32((made[int(b) * batch :][:batch] + 1, labels[int(b) * batch :][:batch])) for b in index["done"]}
    (held_out / "index.json").write_text(json.dumps({**index, "done": crcs}))
    (copy / "report.html").write_text("the report of the run without held-out images")
    done = tiny.call([*tiny.command(copy, "--config.report=True"), f"--config.eval.held_out={held_out}"])
    assert done.returncode == 0, done.stderr
    found = json.loads((copy / "result.json").read_text())["held_out"]
    assert found["images"] == len(made) and 0 <= found["agreement"] <= 100
    assert f"of {len(made)} synthetic images that it was not trained on" in (copy / "README.md").read_text()

    np.save(held_out / "images.npy", made + 2)
    (held_out / "index.json").unlink()
    other = tiny.run(copy, eval__held_out=str(held_out), report=True)
    assert other["held_out"]["crc32"] != found["crc32"] and other["config"]["eval"]["held_out"] == str(held_out)
    assert tiny.run(copy, report=True)["held_out"] == other["held_out"]


@pytest.mark.parametrize(
    ("started", "recorded"),
    [
        ("/env/bin/python -m hast_jax.main --workdir=a", "python -m hast_jax.main --workdir=a"),
        ("python -W ignore -m hast_jax.reproduce table1", "python -m hast_jax.reproduce table1"),
        ("/env/bin/python /env/bin/hast-jax quantize --workdir=a", "hast-jax quantize --workdir=a"),
        ("python /home/me/hast_jax_trials/mine.py", None),
        ("python -m ipykernel_launcher -f kernel.json", None),
        ("python", None),
    ],
)
def test_a_run_records_the_command_that_started_it(started: str, recorded: str | None, monkeypatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", started.split())
    assert record._command() == recorded


def test_the_teachers_accuracy_is_told_before_any_image_is_made_and_measured_once(finished: Path, copy: Path) -> None:
    lines = finished.with_suffix(".stdout").read_text().splitlines()
    assert lines[0] == "teacher: top-1 99.58 % of 719 images" and lines[1].startswith("synthesis: 60 steps")
    told = json.loads((copy / "teacher.json").read_text())
    told["accuracy"]["top1"] = 99.0
    (copy / "teacher.json").write_text(json.dumps(told))
    assert "teacher: top-1 99.00 %" in tiny.call(tiny.command(copy)).stdout


@pytest.mark.slow
def test_single_layers_have_other_bits(finished: Path, tmp_path: Path) -> None:
    """The league in which the first and the last layer have 8 bits, and with them the image."""
    source = f"--config.synthesis.source={finished / 'synthetic'}"
    done = tiny.call(tiny.command(tmp_path / "run", source, "--config.bits.rules=init_block|output=w8a8"))
    assert done.returncode == 0, done.stderr
    ranges = json.loads((tmp_path / "run" / "ranges.json").read_text())
    more = {name for name in ranges if name not in json.loads((finished / "ranges.json").read_text())}
    assert more == {f"{layer}/input/{end}" for layer in ("init_block/conv", "output") for end in ("low", "high")}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bits"] == {"weights": 3, "activations": 3, "rules": "init_block|output=w8a8"}
    codes = hast_jax.load(tmp_path / "run" / "student").codes()
    assert [codes[f"{name}/kernel"]["bits"] for name in ("init_block/conv", "stage1_unit1/conv1/conv", "output")] == [8, 3, 8]
    done = tiny.call(tiny.command(tmp_path / "other", source, "--config.bits.rules=nowhere=w8a8"))
    assert done.returncode == 1 and "the rule 'nowhere' names no layer of ResNet" in done.stderr


@pytest.mark.parametrize("weights", [4, 32])
def test_a_student_whose_activations_are_not_quantized_is_loaded_exported_and_resumed(
    weights: int, finished: Path, tmp_path: Path
) -> None:
    """Such a student has no ranges at all."""
    changes = {
        "synthesis__source": str(finished / "synthetic"),
        "bits__weights": weights,
        "bits__activations": 32,
        "finetune__epochs": 1,
    }
    result = tiny.run(tmp_path / "run", **changes)
    assert tiny.run(tmp_path / "run", **changes) == result
    student = hast_jax.load(tmp_path / "run")
    assert student.variables["ranges"] == {}
    for name, form in (("student.onnx", "onnx"), ("student.safetensors", "safetensors"), ("student.stablehlo", "stablehlo")):
        exported = hast_jax.export(student, tmp_path / name, form)
        assert all(each.different <= 1 for each in exported.comparisons)


def test_another_config_in_the_same_folder_is_refused_and_the_difference_shown(copy: Path) -> None:
    with pytest.raises(UserError, match=r"finetune.eps: 0.02 -> 0.5; use another workdir"):
        tiny.run(copy, finetune__eps=0.5)


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_restores_the_student_on_another_number_of_devices(finished: Path, devices: int) -> None:
    done = tiny.call(tiny.evaluate(finished, f"--devices={devices}"))
    assert done.returncode == 0, done.stderr
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['teacher']:.2f}" in done.stdout and f"{result['last']:.2f}" in done.stdout


def test_the_best_student_can_be_evaluated(copy: Path) -> None:
    for name in ("checkpoints/latest", "student"):  # the best student may be the last one: only its own checkpoint is left
        shutil.rmtree(copy / name)
    done = tiny.call(tiny.evaluate(copy, "--checkpoint=best"))
    result = json.loads((copy / "result.json").read_text())
    assert done.returncode == 0 and f"{result['best']:.2f}" in done.stdout


def test_a_run_without_evaluation_data_needs_none(tmp_path: Path) -> None:
    result = tiny.run(tmp_path / "run", eval__dataset="none", finetune__epochs=1)
    assert result["teacher"] is None and result["last"] is None
    done = tiny.call(tiny.evaluate(tmp_path / "run"))
    assert done.returncode == 1 and "run was run without any: name a data set with --dataset" in done.stderr
    done = tiny.call(tiny.evaluate(tmp_path / "run", "--dataset=digits", "--split=train"))
    assert done.returncode == 0 and "1078 images, digits train" in done.stdout
    done = tiny.call(tiny.evaluate(tmp_path / "run", "--dataset=digits", "--checkpoint=best"))
    assert done.returncode == 1 and "run has no best student, because its run had no real images" in done.stderr


def test_a_student_can_be_judged_on_the_real_images_that_it_learned_from(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["synthesis"]["real_split"] = "train"
    (copy / "config.json").write_text(json.dumps(config))
    done = tiny.call(tiny.evaluate(copy, "--split=train"))
    assert done.returncode == 0 and "1078 images, digits train" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_synthetic_set_is_reused_from_another_run(finished: Path, tmp_path: Path) -> None:
    result = tiny.run(tmp_path / "run", synthesis__source=str(finished / "synthetic"), finetune__epochs=1, bits__weights=4)
    assert result["images"] == 96 and result["iterations"] is None and not (tmp_path / "run" / "synthetic").exists()


def test_a_run_that_began_with_other_images_refuses_these(copy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.load(copy / "synthetic" / "images.npy") + 1)
    np.save(tmp_path / "labels.npy", np.load(copy / "synthetic" / "labels.npy"))
    with pytest.raises(UserError, match="began with other images"):
        tiny.run(copy, synthesis__source=str(tmp_path))


@pytest.mark.slow
def test_a_student_is_judged_by_synthetic_images_that_it_has_not_seen(finished: Path, tmp_path: Path) -> None:
    source = f"--config.synthesis.source={finished / 'synthetic'}"
    others = tmp_path / "others"
    pipeline.run_synthesis(tiny.config(seed=9), others)
    again = tmp_path / "again"
    done = tiny.call(tiny.command(again, source, f"--config.eval.held_out={others / 'synthetic'}"))
    assert done.returncode == 0, done.stderr
    result = json.loads((again / "result.json").read_text())
    assert result["held_out"]["images"] == 96 and result["last"] == json.loads((finished / "result.json").read_text())["last"]

    images = np.load(others / "synthetic" / "images.npy")
    student = hast_jax.load(again / "student")
    config = tiny.config()
    teacher, variables = from_config.teacher(config)
    target = np.asarray(networks.logits(teacher, variables, images), np.float64)
    logits = np.asarray(student(images), np.float64)

    def log(z):
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    kl = np.mean(np.sum(np.exp(log(target)) * (log(target) - log(logits)), 1))
    assert result["held_out"]["agreement"] == pytest.approx(100 * np.mean(target.argmax(1) == logits.argmax(1)))
    assert result["held_out"]["kl"] == pytest.approx(kl, rel=1e-3)

    fewer = "--config.synthesis.images=64"
    same = tiny.call(tiny.command(tmp_path / "same", source, fewer, f"--config.eval.held_out={finished / 'synthetic'}"))
    assert same.returncode == 1 and "holds images that the student is trained on" in same.stderr
