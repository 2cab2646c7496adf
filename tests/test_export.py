"""An exported file judges images as the student does, in each format; what cannot be exported ends in one sentence."""

import contextlib
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given as with_values
from hypothesis import strategies as st
from students import onnx_logits, random_images, student

import hast_jax
from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver import comparison, exports, integers
from hast_jax.errors import InputError, UserError
from hast_jax.networks import rules as rules_lib
from hast_jax.student import Student

pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("little_optimization")


@pytest.mark.parametrize(("name", "normalised"), [("remat", False), ("mobilenetv3", True)])
def test_the_litert_file_judges_as_the_student_does(name: str, normalised: bool, tmp_path: Path) -> None:
    pytest.importorskip("litert_converter")
    pytest.importorskip("ai_edge_litert")
    from hast_jax.deliver import litert_export

    its = student(name, {"default": "w3a3", "Dense_0": (8, 8)})
    found = hast_jax.export(its, tmp_path / "student.tflite", "litert", normalised=normalised)
    assert found.comparisons[0].different <= 1
    kinds = {name: kind for name, kind, _ in found.operators}
    assert kinds["QUANTIZE"] == kinds["DEQUANTIZE"] == "between" and kinds["CONV_2D"] == "float"
    images = random_images(its, 3)
    given = np.asarray(normalise(jnp.asarray(images), its.mean, its.std)) if normalised else images.astype(np.float32)
    np.testing.assert_allclose(litert_export.run(given, found.path.read_bytes()).logits, its(images), atol=1e-3)


def test_what_the_converter_of_litert_cannot_carry_ends_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("litert_converter")
    from hast_jax.deliver import litert_export

    written = litert_export._converted
    monkeypatch.setattr(litert_export, "_converted", lambda program: written(program[: len(program) // 2]))
    with pytest.raises(UserError, match=r"LiteRT cannot convert or run this network.*choose the format onnx"):
        hast_jax.export(student("vgg"), tmp_path / "student.tflite", "litert")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["int8", "packed"])
def test_numpy_alone_reads_the_integers_of_a_file(weights: str, tmp_path: Path) -> None:
    its = student("resnet", {"default": "w3a3", "Dense_0": (8, 8)})
    found = hast_jax.export(its, tmp_path / "student.safetensors", "safetensors", weights=weights)
    content = found.path.read_bytes()
    for path, kernel in flatten_dict(its.params).items():
        if path[-1] == "kernel":
            np.testing.assert_allclose(integers.kernel(content, "/".join(path)), kernel, rtol=1e-6)
    assert found.bytes < found.float_bytes


@with_values(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packed_integers_come_back(bits: int, numbers: list[int]) -> None:
    numbers = np.asarray(numbers) % 2**bits
    packed = integers.pack(numbers, bits)
    assert packed.nbytes == -(-len(numbers) * bits // 8)
    assert np.array_equal(integers.unpack(packed, bits, numbers.shape), numbers)


def test_variables_of_other_collections_are_written_under_the_collections_name() -> None:
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            x = x * self.variable("masks", "alpha", lambda: jnp.asarray(0.5, jnp.bfloat16)).value
            return nn.Dense(10)(x.mean((1, 2))) * self.param("alpha", lambda key: jnp.asarray(2.0))

    module = Masked()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    network = networks.create(module, (8, 8, 3), rules=rules_lib.normalise("w4a4"))
    ranges = networks.observe(network, variables, {}, jnp.ones((2, 8, 8, 3)))
    rest = (rules_lib.normalise("w4a4"), (8, 8, 3), (0.5,) * 3, (0.25,) * 3, {})
    arrays = safetensors.numpy.load(integers.build(Student(network, {**variables, "ranges": ranges}, *rest)))
    assert arrays["alpha"] == 2 and arrays["masks/alpha"] == 0.5


def test_a_student_of_a_network_that_keeps_tuples_is_written_in_every_format(tmp_path: Path) -> None:
    class Keeps(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
            self.sow("losses", "l2", jnp.sum(x**2))
            offset, _ = self.variable("state", "pair", lambda: (jnp.ones(4), jnp.ones(3))).value
            return nn.Dense(10)(x.mean((1, 2)) + offset[None])

    variables = Keeps().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    network = networks.create(Keeps(), (8, 8, 3), rules=rules_lib.normalise("w4a4"))
    ranges = networks.observe(network, variables, {}, jnp.ones((2, 8, 8, 3)))
    rest = (rules_lib.normalise("w4a4"), (8, 8, 3), (0.5,) * 3, (0.25,) * 3, {})
    its = Student(network, {**variables, "ranges": ranges}, *rest)
    its.save(tmp_path / "saved")
    loaded = hast_jax.load(tmp_path / "saved", Keeps())
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(its.variables)
    images = random_images(its)
    np.testing.assert_array_equal(loaded(images), its(images))
    for format in ("onnx", "safetensors", "stablehlo"):
        hast_jax.export(loaded, tmp_path / f"student{exports.FORMATS[format].suffix}", format, images=images)


def test_a_file_that_judges_otherwise_than_the_student_is_not_written(tmp_path: Path, monkeypatch) -> None:
    its = student("vgg")
    flat = flatten_dict(its.variables["ranges"])
    name = ("Conv_2", "input", "high")
    true = exports._onnx

    def wrong(student, options, sets):
        """Writes the file of a student with one range that is not the student's."""
        other = {**flat, name: flat[name] / 9}
        changed = dataclasses.replace(student, variables={**student.variables, "ranges": unflatten_dict(other)})
        from hast_jax.deliver import onnx_export

        build = onnx_export.build
        with monkeypatch.context() as patch:
            patch.setattr(onnx_export, "build", lambda _, **options: build(changed, **options))
            return true(student, options, sets)

    monkeypatch.setitem(exports.FORMATS, "onnx", exports.FORMATS["onnx"]._replace(write=wrong))
    words = r"of 256 random images \(rounding alone changes the class of \d+\); the first layer that differs is Conv_2/input"
    with pytest.raises(UserError, match=words):
        hast_jax.export(its, tmp_path / "student.onnx")
    assert not any(tmp_path.iterdir())


def test_a_file_may_differ_where_rounding_alone_changes_the_student(monkeypatch) -> None:
    its = student("vgg")
    images = random_images(its, 64)
    precise = comparison._in_double_precision(its, images)
    assert precise.dtype == np.float64 and np.median(np.abs(precise - np.asarray(its(images)))) < 1e-5

    def compared(of: int, by_double_precision: int) -> comparison.Comparison:
        changed = np.where(np.arange(64)[:, None] < by_double_precision, -1, 1) * precise
        monkeypatch.setattr(comparison, "_in_double_precision", lambda *_: changed)

        def run(given):
            return np.where(np.arange(64)[:, None] < of, -1, 1) * np.asarray(its(given))

        return comparison.compare(its, run, [comparison.Judged("images", images)])[0]

    few, many, excused = compared(1, 5), compared(5, 0), compared(5, 2)
    assert (few.different, few.rounded) == (1, None)
    assert (many.different, many.rounded, excused.rounded) == (5, 0, 2)
    comparison.refuse_difference([few, excused], {})
    with pytest.raises(UserError, match=r"for 5 of 64 images \(rounding alone changes the class of 0\)"):
        comparison.refuse_difference([many], {})


@pytest.mark.parametrize("factor, shift, refused", [(1.0, 0.0, False), (1.02, 0.0, False), (2.0, 0.0, True), (1.0, 5.0, True)])
def test_a_file_with_other_logits_is_refused_though_it_gives_the_same_classes(factor, shift, refused) -> None:
    its = student("vgg")
    images = random_images(its, 64)
    wanted = np.asarray(its(images))
    shift = shift * wanted.std()
    found = comparison.compare(
        its, lambda given: factor * np.asarray(its(given)) + shift, [comparison.Judged("images", images)]
    )
    assert found[0].different == 0 and found[0].spread == pytest.approx(wanted.std())
    tenth = np.sort(np.abs((factor - 1) * wanted + shift), 0)[57 - 1].max()  # of 64 images, 8 differ by as much or more
    assert found[0].moved == pytest.approx(tenth, rel=1e-3, abs=1e-9)
    if not refused:
        comparison.refuse_difference(found, {})
        return
    with pytest.raises(
        UserError, match=r"for a tenth of 64 images a logit differs by \S+ or more \(rounding alone: \S+\): the file"
    ):
        comparison.refuse_difference(found, {})


@pytest.mark.parametrize(("wrong", "refused"), [(6, False), (16, True)])
def test_a_file_is_refused_that_is_wrong_for_some_images_alone(wrong: int, refused: bool) -> None:
    """For few images, rounding may explain the difference."""
    its = student("vgg")
    images = random_images(its, 64)
    factors = np.where(np.arange(64) < wrong, 1.5, 1)[:, None]
    found = comparison.compare(its, lambda given: factors * np.asarray(its(given)), [comparison.Judged("images", images)])
    assert found[0].different == 0
    with pytest.raises(UserError, match="other logits") if refused else contextlib.nullcontext():
        comparison.refuse_difference(found, {})


def test_logits_may_move_as_far_as_rounding_moves_the_students(monkeypatch) -> None:
    its = student("vgg")
    images = random_images(its, 64)
    wanted = np.asarray(its(images))
    monkeypatch.setattr(comparison, "_in_double_precision", lambda *_: 1.4 * wanted)
    found = comparison.compare(its, lambda given: 2 * np.asarray(its(given)), [comparison.Judged("images", images)])
    comparison.refuse_difference(found, {})


def test_the_ending_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .onnx, or choose the format safetensors\."):
        hast_jax.export(student("vgg"), tmp_path / "student.safetensors")
    with pytest.raises(InputError, match=r"student.pth must end in .onnx\."):
        hast_jax.export(student("vgg"), tmp_path / "student.pth")
    with pytest.raises(InputError, match=r"the student is a dict: give what quantize or load returned"):
        hast_jax.export({}, tmp_path / "student.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("tflite", {}, "the format 'tflite' is unknown: choose from onnx, litert, safetensors, stablehlo"),
        ("onnx", {"weights": "int2"}, "weights is 'int2': for onnx, choose from int8, int4"),
        ("onnx", {"weights": "int4", "operators": "integer"}, "integer operators take int8 weights"),
        ("stablehlo", {"weights": "int4"}, "stablehlo has no option 'weights'"),
        ("safetensors", {"layout": "nchw"}, "safetensors has no option 'layout'"),
        ("onnx", {"quality": 1}, "onnx has no option 'quality'"),
        ("onnx", {"images": np.zeros((2, 9, 9, 3), np.uint8)}, "the images have the shape"),
        ("onnx", {"images": np.zeros((2, 16, 16, 3), np.int64)}, "the images are int64: give uint8 images"),
        ("onnx", {"images": np.full((2, 16, 16, 3), np.nan)}, "the images are not all finite"),
        ("onnx", {"images": jnp.full((2, 16, 16, 3), jnp.inf, jnp.bfloat16)}, "the images are not all finite"),
    ],
)
def test_an_impossible_export_ends_in_one_sentence(format: str, options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        hast_jax.export(student("vgg"), tmp_path / f"student.{format}", format, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda images, labels: (images, labels[:, None]),
            r"the labels are \S+ of shape \(\d+, 1\): they must be one",
        ),
        (lambda images, labels: (images, labels[:-1]), r"the labels are \S+ of shape \(\d+,\): they must be one"),
        (lambda images, labels: (images / 255, labels), "give uint8 images"),
    ],
    ids=["a column of labels", "a label too few", "floats"],
)
def test_test_images_that_cannot_be_judged_are_refused(change, words: str, tmp_path: Path) -> None:
    its = student("vgg")
    images, labels = np.zeros((4, *its.image), np.uint8), np.arange(4)
    with pytest.raises(InputError, match=words):
        hast_jax.export(its, tmp_path / "student.onnx", test=change(images, labels))


# --- Run folders ---


@pytest.fixture(scope="module")
def run(learned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, into which files are exported."""
    return Path(shutil.copytree(learned_run, tmp_path_factory.mktemp("export") / "run"))


def test_the_command_exports_the_student_of_a_run_and_tells_what_it_found(run: Path) -> None:
    said = tiny.call([*tiny.module("export"), f"--workdir={run}", "--format=onnx"])
    assert said.returncode == 0, said.stderr
    for words in ("student.onnx", "0 of 96 synthetic images", "0 of 719 test images", "top-1 of file and student", "9 Conv"):
        assert words in " ".join(said.stdout.split()), words
    its = hast_jax.load(run / "student")
    images = random_images(its)
    np.testing.assert_allclose(onnx_logits(run / "student.onnx", images), its(images), atol=1e-3)


def test_real_images_are_left_out_by_name_and_missed_if_other_flags_speak_of_them(run: Path, tmp_path: Path) -> None:
    command = importlib.import_module("hast_jax.export")
    found = command.run(run, "stablehlo", tmp_path / "student.stablehlo", real={"dataset": "none"})
    assert [each.name for each in found.comparisons] == ["images"]
    with pytest.raises(UserError, match="there are no real images, because --dataset=none names none: name a data set"):
        command.run(run, "stablehlo", tmp_path / "student.stablehlo", real={"dataset": "none", "split": "train"})


def test_the_table_of_the_page_on_exports_can_be_printed_again(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(tiny.ROOT / "docs")
    table = importlib.import_module("export_table")
    monkeypatch.setattr(table, "MADE_UP", {})
    monkeypatch.setattr(table, "OTHERS", {"safetensors, packed": table.OTHERS["safetensors, packed"]})
    monkeypatch.setattr(sys, "argv", ["export_table.py", str(run)])
    table.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [each[:2] for each in rows] == [["| run", "onnx"], ["| run", "safetensors, packed"]]
    assert "of 719 test images" in rows[0][6] and rows[0][2].endswith(" kB")


def test_the_students_own_files_are_not_overwritten(run: Path) -> None:
    its = hast_jax.load(run / "student")
    with pytest.raises(InputError, match="is a file of the saved student itself: choose another name"):
        hast_jax.export(its, run / "student" / "student.safetensors", "safetensors")
    assert hast_jax.load(run / "student").record == its.record


def test_files_with_different_options_do_not_overwrite_one_another(run: Path) -> None:
    command = importlib.import_module("hast_jax.export")
    files = [command.run(run, "safetensors", **options).path for options in ({}, {"weights": "packed"})]
    assert [file.name for file in files] == ["student.safetensors", "student-packed.safetensors"]
    assert files[1].stat().st_size < files[0].stat().st_size


def test_a_run_that_has_not_finished_is_not_exported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    said = tiny.call([*tiny.module("export"), f"--workdir={tmp_path}"])
    assert said.returncode == 1 and "has not finished" in said.stderr and said.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.onnx"))


def test_a_hostile_run_folder_gets_nothing_written_but_the_file_and_none_of_its_code_run(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    said = json.loads((folder / "student" / "student.json").read_text())
    said["record"]["network"] = "../../evil.py:Net"
    (folder / "student" / "student.json").write_text(json.dumps(said))
    config = json.loads((folder / "config.json").read_text())
    config["teacher"]["network"] = f"{tmp_path}/evil.py:Net"
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    def files():
        return sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")

    before = files()
    ended = tiny.call([*tiny.module("export"), f"--workdir={folder}", f"--output={tmp_path}/out.onnx"])
    assert ended.returncode == 1 and "which is not built in" in ended.stderr
    assert files() == before


@pytest.mark.parametrize("bits", [None, {"default": "w3a3", "init_block|output": "w8a8", "stage1_unit1/conv1": "full"}])
def test_a_program_of_numpy_alone_runs_the_network_from_its_integers(bits: Any, run: Path, tmp_path: Path) -> None:
    its = hast_jax.load(run / "student")
    if bits is not None:
        network = networks.create(its.network.module, its.image, rules=rules_lib.normalise(bits), learned_ranges=True)
        noise = jax.random.normal(jax.random.key(0), (32, *its.image))
        observed = networks.observe(network, its.variables, {}, noise)
        # The pooled features, means of four values on a grid, would lie between two integers of their own grid: each program
        # would round them its own way. Ranges that were learned have no such relation to each other.
        factors = iter(np.random.default_rng(0).uniform(0.9, 1, len(jax.tree.leaves(observed))))
        ranges = jax.tree.map(lambda leaf: leaf * np.float32(next(factors)), observed)
        params, ranges = networks.settled(network, its.variables["params"], ranges)
        its = dataclasses.replace(its, network=network, variables={**its.variables, "params": params, "ranges": ranges})
    hast_jax.export(its, tmp_path / "student.safetensors", "safetensors", weights="packed")
    images = random_images(its, 6)
    np.save(tmp_path / "images.npy", images)
    program = tiny.ROOT / "docs" / "run_integers.py"
    imported = [line for line in program.read_text().splitlines() if line.startswith(("import", "from"))]
    assert imported == ["import json", "import sys", "from pathlib import Path", "import numpy as np"]
    command = [sys.executable, program, tmp_path / "student.safetensors", tmp_path / "images.npy", tmp_path / "logits.npy"]
    subprocess.run(command, check=True, env=tiny.environment())
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), its(images), atol=1e-3)
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "give uint8 images" in done.stderr and "Traceback" not in done.stderr
