"""Experiments share what is equal, go on where they were killed, and say what failed."""

import functools
import gc
import json
import runpy
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from hast_jax import config as config_lib
from hast_jax import from_config, pipeline, reproduce
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.paper import figure2, figures, landscape, tables
from hast_jax.paper.experiments import EXPERIMENTS, FINDINGS, Cell
from hast_jax.paper.sweep import Sweep, _name
from hast_jax.stages import calibrate, teacher


@pytest.fixture(autouse=True)
def short_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HESSIAN_IMAGES": 16, "PROBES": 2, "DEPTH": 6}.items():
        monkeypatch.setattr(figure2, name, value)


def sweep(workdir: Path, seeds: int = 1, **changes) -> Sweep:
    return Sweep(tiny.config(**changes), workdir, seeds)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("file", ["cifar10", "cifar100", "digits", "imagenet"])
@pytest.mark.parametrize("argument", ["w4a4", "w3a3,small", "w3a3,best,small"])
def test_every_cell_of_every_experiment_is_a_valid_config(name: str, file: str, argument: str) -> None:
    config = runpy.run_path(str(tiny.ROOT / "configs" / f"{file}.py"))["get_config"](argument)
    experiment = EXPERIMENTS[name](config)
    for cell in experiment.cells:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(cell.changes)
        config_lib.validate(changed)
    labels = {cell.label for cell in experiment.cells}
    assert len(labels) == len(experiment.cells)
    if argument == "w4a4" and file.startswith("cifar"):  # the small budget makes fewer images than Table 4 of the paper
        assert all(row.keys() <= labels for row in experiment.paper.values())


@pytest.mark.parametrize(
    ("dataset", "classes", "compared"), [("imagenet2012", 1000, 1), ("folder", 1000, 1), ("folder", 37, 0)]
)
def test_a_folder_of_a_thousand_classes_is_compared_with_the_papers_imagenet(dataset: str, classes: int, compared: int) -> None:
    config = config_lib.default()
    config.update_from_flattened_dict({"teacher.network": "resnet18", "eval.dataset": dataset, "teacher.classes": classes})
    experiment = EXPERIMENTS["table3"](config)
    text = tables.section(experiment, {cell.label: [result(60.0)] for cell in experiment.cells}, config).body
    assert text.count("| 51.15 |") == compared


def result(top1: float) -> dict:
    return {"last": top1, "no_finetuning": top1 - 10, "teacher": 90.0}


def test_the_table_sets_the_papers_numbers_beside_ours() -> None:
    config = config_lib.default()
    config.eval.dataset = "cifar10"
    results = {
        "DFA": [result(80.0), result(82.0)],
        "RFA": [{"failed": "it diverged."}, result(84.0)],
        "DFA, lambda / 1000": [result(83.0)],
    }
    text = tables.section(EXPERIMENTS["table3"](config), results, config).body
    # drop 90 - 81 = 9.00; the paper's 94.03 - 83.92 = 10.11
    assert "| DFA | 81.00 ± 1.41 | 9.00 | 83.92 | 10.11 | -1.11 |" in text
    assert "| RFA | 84.00 (1 of 2 seeds) | 6.00 |" in text and "- RFA: it diverged." in text
    assert "| DFA, lambda / 1000 | 83.00 | 7.00 |" in text


def test_with_other_bits_for_some_layers_the_table_says_so_and_leaves_out_the_papers_numbers() -> None:
    config = config_lib.default()
    config.update_from_flattened_dict({"eval.dataset": "cifar10", "bits.rules": "output=w8a8"})
    experiment = EXPERIMENTS["table3"](config)
    text = tables.section(experiment, {cell.label: [result(60.0)] for cell in experiment.cells}, config).body
    assert "paper" not in text.partition("\n\n")[0]


def test_imagenet_has_no_cell_of_all_real_images_because_they_do_not_fit_into_memory() -> None:
    config = config_lib.default()
    for dataset, count in (("imagenet2012", 0), ("cifar10", 1)):
        config.eval.dataset = dataset
        for name in ("baselines", "recipe"):
            assert sum("all real images" in cell.label for cell in EXPERIMENTS[name](config).cells) == count


def test_a_mean_of_one_seed_has_no_error_bar_and_the_others_keep_theirs(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.sensitivity({"eps": [(0.0, 60.0, 0.3), (0.01, 61.0, None), (0.02, 61.5, 0.2)]}, 90.0, tmp_path / "figure.png")
    bars = drawn[0].axes[0].containers[0].lines[2][0].get_segments()
    assert [len(bar) for bar in bars] == [2, 0, 2]


@pytest.mark.slow
def test_cells_share_images_equal_cells_are_one_run_and_seeds_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = sweep(tmp_path, seeds=2, finetune__epochs=1)
    base, again = small.run(Cell("base", {})), small.run(Cell("again", {"finetune.alignment": "rfa"}))
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "run", lambda *_: pytest.fail("these ranges are known"))
        small.run(Cell("other fine-tuning", {"finetune.eps": 0.0}))
    learned = small.run_one(Cell("learned", {"finetune.ranges": "learned"}), 0)
    assert "failed" not in learned  # its ranges are others
    more = small.images({"synthesis.images": 128, "synthesis.iterations": 0}, 0)
    assert len(np.load(more / "images.npy")) == 128
    fewer, noise = small.run_one(Cell("fewer", {"synthesis.images": 32}), 0), small.images({"synthesis.iterations": 0}, 0)
    assert base == again and [r["seed"] for r in base] == [0, 1] and (base[0]["images"], fewer["images"]) == (96, 32)

    def names(folder):
        return {path.name for path in (tmp_path / folder).iterdir()}

    assert names("images") == {"base-seed0", "base-seed1", "iterations=0-seed0", "images=128,iterations=0-seed0"}
    assert names("cells") == {
        "base-seed0",
        "base-seed1",
        "eps=0-seed0",
        "eps=0-seed1",
        "images=32-seed0",
        "ranges=learned-seed0",
    }
    images = {path.parent.name: np.load(path / "images.npy") for path in (tmp_path / "images").glob("*/synthetic")}
    assert np.abs(images["base-seed0"] - images["base-seed1"]).max() > 1
    np.testing.assert_allclose(np.load(noise / "images.npy").std(), 1, atol=0.05)

    def ranges(name):
        return (tmp_path / "cells" / name / "ranges.json").read_text()

    assert len({ranges(name) for name in ("base-seed0", "base-seed1", "images=32-seed0")}) == 3
    assert ranges("eps=0-seed0") == ranges("base-seed0")


def test_a_finished_cell_is_only_read_wherever_its_folder_has_moved(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(tmp_path / "here", finetune__epochs=1).run(Cell("base", {}))
    (tmp_path / "here").rename(tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "images")  # a table can be drawn again without them
    for stage in ("run", "run_synthesis"):
        monkeypatch.setattr(pipeline, stage, lambda *_: pytest.fail("it was finished"))
    assert sweep(tmp_path / "there", finetune__epochs=1).run(Cell("base", {})) == first
    with pytest.raises(UserError, match=r"finetune.epochs: 1 -> 2"):
        sweep(tmp_path / "there", finetune__epochs=2)
    with pytest.raises(UserError, match=r"began without config.synthesis.source: go on in the same way"):
        sweep(tmp_path / "there", finetune__epochs=1, synthesis__source=str(finished / "synthetic"))
    network, _ = from_config.teacher(tiny.config())
    monkeypatch.setattr(from_config, "teacher", lambda _: (network, {"kernel": np.ones(3)}))
    with pytest.raises(UserError, match="began with a teacher of other weights"):
        sweep(tmp_path / "there", finetune__epochs=1)


def test_agreement_that_is_asked_for_later_is_measured_of_finished_cells_too(tmp_path: Path, finished: Path) -> None:
    first = sweep(tmp_path, finetune__epochs=1).run_one(Cell("base", {}), 0)
    again = sweep(tmp_path, finetune__epochs=1, eval__held_out=str(finished / "synthetic"), seed=0)
    with pytest.raises(UserError, match="holds images that the student is trained on"):
        again._result({}, 0, again.path(Cell("base", {}), 0))
    held_out = again.images({"synthesis.iterations": 0}, 0)
    found = sweep(tmp_path, finetune__epochs=1, eval__held_out=str(held_out)).run_one(Cell("base", {}), 0)
    assert found["held_out"]["images"] == 96 and found | {"held_out": None, "config": first["config"]} == first


def test_images_that_are_there_already_must_be_those_of_the_config(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(finished / "synthetic")
    config = tiny.config(synthesis__source=source, finetune__epochs=1, synthesis__save_every=7)
    config.lock()  # as a config from the command line is
    given = Sweep(config, tmp_path / "a", 1)
    assert given.images({"finetune.eps": 1.0}, 0) == finished / "synthetic"
    with pytest.raises(UserError, match=r"iterations: 20 -> 30"):
        sweep(tmp_path / "b", synthesis__source=source, synthesis__iterations=30)
    two = sweep(tmp_path / "c", seeds=2, synthesis__source=source)
    assert two.images({"synthesis.iterations": 0}, 1) == two.images({"synthesis.iterations": 0}, 0)
    assert "seed 0, 1 on the images of seed 0, " in tables.context(two, devices=2)
    network, _ = from_config.teacher(config)
    monkeypatch.setattr(from_config, "teacher", lambda _: (network, {"kernel": np.ones(3)}))
    with pytest.raises(UserError, match=r"began with a teacher of other weights"):
        sweep(tmp_path / "d", synthesis__source=source)


def test_the_teacher_of_a_sweep_is_judged_once(finished: Path, tmp_path: Path, monkeypatch) -> None:
    judged = []
    true = teacher.evaluator
    monkeypatch.setattr(teacher, "evaluator", lambda *given: judged.append(1) or true(*given))
    its = sweep(tmp_path, synthesis__source=str(finished / "synthetic"), finetune__epochs=1)
    first, second = (its.run_one(Cell("", {"finetune.eps": eps}), 0) for eps in (0.01, 0.03))
    assert len(judged) == 3  # the teacher, and two students
    assert first["teacher"] == second["teacher"]


@pytest.mark.slow
def test_real_images_are_those_of_the_train_split(tmp_path: Path) -> None:
    config = tiny.config(synthesis__real_split="train")
    images, labels = datasets.sample(config, 10**7)
    train, test = (datasets.load(config, split) for split in ("train", "test"))
    assert len(images) == len(train.labels) and np.array_equal(np.bincount(labels), np.bincount(train.labels))
    back = np.round((images * 0.3762 + 0.3053) * 255).astype(np.uint8)
    seen = {image.tobytes() for image in back}
    assert seen == {image.tobytes() for image in train.images} and not seen & {image.tobytes() for image in test.images}
    found = sweep(tmp_path, finetune__epochs=1).run_one(Cell("", {"synthesis.real_split": "train", "synthesis.images": 64}), 0)
    assert (found["images"], found["real_split"]) == (64, "train") and not (tmp_path / "images").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lam", [2000.0, 0.0])
def test_figure_2_comes_from_the_kept_checkpoints(tmp_path: Path, lam: float) -> None:
    small = sweep(tmp_path, finetune__epochs=4, finetune__lam=lam)
    reproduce.run(["figure2a"], small)
    reproduce.run(["figure2b"], small)
    angles = json.loads((tmp_path / "figure2a.json").read_text())
    assert angles["epochs"] == [0, 1, 2, 3, 4]
    found = figure2.base(small)
    batch = found.students[-1][1], found.fixed, found.fixed.images[:16], found.fixed.labels[:16]
    expected = jax.jit(functools.partial(landscape.gradient_cosines, found.losses))(*batch)
    for loss, cosines in angles["cosine_with_kl"].items():
        assert np.shape(cosines) == (5, 6) and np.abs(cosines).max() <= 1
        np.testing.assert_allclose(cosines[-1][0], expected[loss], atol=1e-5)
    spectra = json.loads((tmp_path / "figure2b.json").read_text())["spectra"]
    for row in spectra.values():
        assert row["smallest"] <= row["mean"] <= row["largest"] and 0 < row["root_mean_square"] <= row["largest"]
    for name in ("figure2a", "figure2b"):
        assert f"]({name}.png)" in (tmp_path / f"{name}.md").read_text()
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
    shutil.rmtree(small.path(Cell("", {}), 0) / "checkpoints" / "latest")
    with pytest.raises(UserError, match="no checkpoint of its last epoch, which Figure 2 needs"):
        figure2.base(small)


def test_images_that_cannot_be_made_are_tried_once_for_all_their_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def diverge(*_) -> Path:
        arrays = np.ones(4)
        tries.append(weakref.ref(arrays))
        raise UserError("synthesis diverged")

    monkeypatch.setattr(pipeline, "run_synthesis", diverge)
    small = sweep(tmp_path)
    cells = [Cell("base", {}), Cell("other", {"finetune.eps": 0.0})]
    assert [small.run_one(cell, 0) for cell in cells] == [{"failed": "synthesis diverged"}] * 2 and len(tries) == 1
    gc.collect()
    assert tries[0]() is None, "the arrays of the failed synthesis take up memory while the other cells run"


def test_all_experiments_make_one_page_though_a_cell_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_run, real_synthesis = pipeline.run, pipeline.run_synthesis

    def run(config, path, progress):
        if path.name == "alignment=dfa-seed0":
            raise MemoryError("too large")
        if path.name == "base-seed0":
            return real_run(config, path, progress)
        return result(20.0)

    base_set = []

    def run_synthesis(config, path, progress):
        base_set[:] = base_set or [real_synthesis(config, path, progress)]
        return base_set[0]

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "run_synthesis", run_synthesis)
    small = sweep(tmp_path, finetune__epochs=1)
    page = reproduce.run(reproduce.SUPPLEMENT, small)
    assert page == (tmp_path / "reproduction.md").read_text() and small.failed == ["alignment=dfa-seed0"]
    assert "RFA) beats direct (DFA): not measured, because a cell failed or was left out" in page
    assert "promotion helps: **holds** (HAST +" in page
    assert "MemoryError" in (tmp_path / "cells" / "alignment=dfa-seed0" / "error.txt").read_text()
    for name in reproduce.SUPPLEMENT:
        assert (tmp_path / f"{name}.md").exists() and (tmp_path / f"{name}.json").exists()
    assert page.count("](figure") == 3 == len(list(tmp_path.glob("figure*.png")))
    part = reproduce.run(["table2", "table4"], small, skip=["a=1, b=4"])
    assert "| a=1, b=4 |" in page and "| a=1, b=4 |" not in part and "| a=1, b=3 |" in part and "## Table 4" in part
    with pytest.raises(UserError, match=r"--skip=a=9: no cell has this label; there are: 32 images; .*a=3, b=1"):
        reproduce.run(["table2", "table4"], small, skip=["a=9"])
    with pytest.raises(UserError, match=r"--skip leaves no cell of table4: leave out table4 itself"):
        reproduce.run(["table2", "table4"], small, skip=[cell.label for cell in EXPERIMENTS["table4"](small.config).cells])


def test_an_experiment_that_fails_leaves_its_traceback_until_it_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, drawn = sweep(tmp_path), lambda _: tables.Section("drawn", "", {})
    monkeypatch.setattr(reproduce, "FIGURES", {"figure2a": lambda _: 1 / 0, "figure2b": drawn})
    page = reproduce.run(["figure2a", "figure2b"], small)
    assert "Not measured: ZeroDivisionError: division by zero" in page and "## drawn" in page and small.failed == ["figure2a"]
    assert "1 / 0" in (tmp_path / "figure2a.error.txt").read_text()
    monkeypatch.setitem(reproduce.FIGURES, "figure2a", drawn)
    assert "Not measured" not in reproduce.run(["figure2a", "figure2b"], small)
    assert not (tmp_path / "figure2a.error.txt").exists()


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(90, 80, "holds"), (80, 90, "does not hold"), (80, 80.5, "undecided"), (100, 100, "undecided")],
)
def test_a_difference_decides_where_it_is_larger_than_twice_its_error(first: float, second: float, verdict: str) -> None:
    assert f"**{verdict}**" in promotion_helps(row("HAST", first), row("no promotion", second, changes={"finetune.b": 0.0}))


def test_the_error_of_a_difference_is_of_the_seeds_too() -> None:
    without = row("no promotion", 86, changes={"finetune.b": 0.0})
    for std, seeds, verdict in [(0.5, 4, "holds"), (4.0, 4, "undecided"), (4.0, 64, "holds")]:
        assert f"**{verdict}**" in promotion_helps(row("HAST", 90, std=std, seeds=seeds), without)


def test_a_cell_is_not_compared_with_itself() -> None:
    config = tiny.config(finetune__b=0.0)
    cells = EXPERIMENTS["baselines"](config).cells
    rows = tables.rows(EXPERIMENTS["baselines"](config), {cell.label: [result(90.0)] for cell in cells}, config)
    assert "not measured, because with this config both cells are the same run" in promotion_helps(*rows)
    config.synthesis.images = config.synthesis.batch
    config.finetune.eps = 0.0
    for name, count in {"table4": 1, "figure1": 11}.items():
        assert len(EXPERIMENTS[name](config).cells) == count


def row(label: str, mean: float, **changes) -> dict:
    return {"label": label, "mean": mean, "std": None, "seeds": 1, "failed": [], "changes": {}} | changes


def promotion_helps(*rows: dict) -> str:
    sections = {"baselines": tables.Section("", "", {"rows": list(rows)})}
    return tables.verdict(FINDINGS[0], sections, images=1000)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    def command(workdir: Path) -> list[str]:
        fields = [f"--config.{name}={value}" for name, value in tiny.FIELDS.items()]
        config = f"--config={tiny.ROOT}/configs/digits.py"
        return [*tiny.module("reproduce"), "table1", config, f"--workdir={workdir}", *fields]

    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    done = tiny.call_anew(command(unbroken))
    assert done.returncode == 0, done.stderr
    tiny.kill_when(command(killed), tiny.logged(killed / "cells" / "direction=kl-seed0", "finetune", 15))
    assert tiny.call(command(killed)).returncode == 0
    found = [json.loads((workdir / "table1.json").read_text()) for workdir in (killed, unbroken)]
    assert found[0] == found[1] and len([row["mean"] for row in found[0]["rows"]]) == 3
    cell = json.loads((killed / "cells" / "base-seed0" / "result.json").read_text())
    assert cell["hardware"].startswith("2 x cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one or several experiments of: baselines, table1, table2"),
        (["tabel2"], "there is no experiment 'tabel2' (did you mean table2?): choose from baselines, table1, table2"),
        (["table1", "all"], "there is no experiment 'all': all stands alone."),
    ],
)
def test_an_unknown_experiment_is_refused_with_those_there_are(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = tiny.call(
        [*tiny.module("reproduce"), *arguments, f"--config={tiny.ROOT}/configs/digits.py", f"--workdir={tmp_path}"]
    )
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_sweep_and_a_run_refuse_each_others_folder(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="is the folder of a run: a sweep needs a folder of its own"):
        sweep(copy)
    (tmp_path / "sweep" / "cells").mkdir(parents=True)
    (tmp_path / "sweep" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the folder of a sweep: a run needs a folder of its own"):
        tiny.run(tmp_path / "sweep")


def test_what_no_table_can_be_made_of_is_refused_before_the_folder_is_made(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UserError, match=r"set config.eval.dataset"):
        sweep(tmp_path / "run", eval__dataset="none")
    with pytest.raises(UserError, match=r"config.seed is 4294967296"):
        sweep(tmp_path / "run", seeds=2, seed=2**32 - 1)
    with pytest.raises(UserError, match=r"takes the set of a run, FOLDER/synthetic"):
        sweep(tmp_path / "run", synthesis__source=str(shutil.copytree(finished / "synthetic", tmp_path / "alone" / "set")))
    assert not (tmp_path / "run").exists()


def test_cells_that_change_other_things_have_other_folders() -> None:
    cells = [
        {"synthesis.batch": 64},
        {"finetune.batch": 64},
        {"finetune.lr": 1e-5},
        {"finetune.lr": 1.0000001e-5},
        {"finetune.lr": 1.0000002e-5},
        {"synthesis.images": 1234567},
        {"synthesis.images": 1234568},
        {"finetune.augment": True},
        {"finetune.b": 1.0},
    ]
    assert len({_name(cell) for cell in cells}) == len(cells)
    assert _name({"finetune.eps": 0.02}) == "eps=0.02" and _name({}) == "base"


@pytest.mark.parametrize("name", ["table1", "table3", "figure1"])
def test_experiments_about_alignment_align_a_recipe_that_has_none(name: str) -> None:
    def lambdas(lam: float) -> set[float]:
        config = tiny.config(finetune__lam=lam)
        return {cell.changes.get("finetune.lam", lam) for cell in EXPERIMENTS[name](config).cells}

    expected = {"table1": {100.0}, "table3": {0.1, 100.0}, "figure1": {0.0, 50.0, 100.0, 200.0, 400.0}}
    assert lambdas(0.0) == expected[name] and lambdas(2000.0) == {20 * each for each in expected[name]}
    assert ("lambda = 100" in EXPERIMENTS[name](tiny.config(finetune__lam=0.0)).title) == (name != "figure1")
