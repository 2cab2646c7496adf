"""The library: what a person types in a notebook, whole or stage by stage."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

import hast_jax
from hast_jax import from_config, networks
from hast_jax.data import datasets
from hast_jax.errors import Notice, UserError
from hast_jax.given import Setting
from hast_jax.networks import weights
from hast_jax.runs import run_folder
from hast_jax.stages import teacher

MEAN, STD = (0.3053,), (0.3762,)
FEW_STEPS = {
    "synthesis.images": 96,
    "synthesis.batch": 32,
    "synthesis.iterations": 20,
    "calibration.batches": 5,
    "calibration.batch": 16,
    "finetune.batch": 16,
    "finetune.epochs": 2,
    "finetune.steps_per_epoch": 10,
    "finetune.lr": 1e-4,
    "log_every": 5,
    "report": False,
    "devices": 1,
}


@pytest.fixture(scope="module")
def digits() -> datasets.Arrays:
    return datasets.load(tiny.config(), "test")


@pytest.fixture(scope="module")
def network() -> tuple:
    """A module and its trained variables."""
    teacher, variables = from_config.teacher(tiny.config())
    return teacher.module, variables


def quantize(network: tuple, **changes) -> hast_jax.Student:
    model, variables = network
    settings = {"image": (8, 8, 1), "mean": MEAN, "std": STD, "bits": "w3a3", "fields": FEW_STEPS} | changes
    return hast_jax.quantize(model, variables, **settings)


@pytest.fixture(scope="module")
def student(network: tuple, digits: datasets.Arrays) -> hast_jax.Student:
    with warnings.catch_warnings():
        warnings.simplefilter("error", hast_jax.AccuracyWarning)
        return quantize(network, test=(digits.images, digits.labels))


def test_a_network_becomes_a_student_that_reports_its_accuracy(student: hast_jax.Student, digits: datasets.Arrays) -> None:
    record = student.record
    assert record["segments"][-1]["command"] == "hast_jax.quantize(..., budget='small', recipe='best')"
    assert record["teacher"] > 99 and record["last"] > 50 and record["bits"]["weights"] == 3
    found = hast_jax.evaluate(student, images=digits.images, labels=digits.labels)
    assert found.top1 == pytest.approx(record["last"], abs=0.2)
    assert record["dataset"] == "(given in Python)"
    assert repr(student) == "<Student of ResNet, images 8 x 8 x 1, bits w3a3>"
    right = np.argmax(student(digits.images), 1) == digits.labels
    assert 100 * right.mean() == pytest.approx(record["last"], abs=0.2)


def test_one_number_stands_for_all_channels() -> None:
    variables = networks.module("resnet20", 10).init(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    setting = Setting(networks.module("resnet20", 10), variables, (32, 32, 3), 0, 1 / 255, 3, 0, None, {}, None)
    assert (setting.mean, setting.std, setting.rules[0][1]) == ((0, 0, 0), (1 / 255,) * 3, (3, 3))


def test_only_images_of_the_students_shape_are_evaluated(student: hast_jax.Student, digits: datasets.Arrays) -> None:
    three = np.repeat(digits.images, 3, -1)
    with pytest.raises(hast_jax.UserError, match=r"give uint8 images \[n, 8, 8, 1\]"):
        hast_jax.evaluate(student, images=three, labels=digits.labels)
    with pytest.raises(hast_jax.UserError, match="a Student has its own variables: give evaluate"):
        hast_jax.evaluate(student, digits.images, digits.labels)


@pytest.mark.parametrize("given", [{"bits": "w2a2"}, {"mean": 0.0, "std": 1 / 255}, {"call": {"train": True}}])
def test_a_student_is_not_evaluated_with_other_settings_than_its_own(
    student: hast_jax.Student, digits: datasets.Arrays, given: dict
) -> None:
    with pytest.raises(hast_jax.UserError, match=f"a Student has its own {next(iter(given))}"):
        hast_jax.evaluate(student, images=digits.images, labels=digits.labels, **given)


def test_a_student_takes_uint8_images_and_normalised_ones(student: hast_jax.Student, digits: datasets.Arrays) -> None:
    normalised = np.asarray(datasets.normalise(digits.images[:9], MEAN, STD))
    np.testing.assert_array_equal(student(digits.images[:9]), student(normalised))
    with pytest.raises(ValueError, match="give uint8 images, or floating point ones"):
        student(digits.images[:9].astype(np.int64))
    with pytest.raises(hast_jax.UserError, match=r"the student takes \[n, 8, 8, 1\]"):
        student(digits.images[:9, :7])


def test_a_saved_student_gives_the_same_logits(student: hast_jax.Student, digits: datasets.Arrays, tmp_path: Path) -> None:
    student.save(tmp_path / "student")
    for folder in (tmp_path / "student", tmp_path):  # as in a run folder
        again = hast_jax.load(folder, student.network.module)
        np.testing.assert_array_equal(again(digits.images), student(digits.images))
    assert again.record == json.loads(json.dumps(student.record))
    with pytest.raises(hast_jax.UserError, match="do not fit the network"):
        hast_jax.load(tmp_path / "student", networks.module("resnet20", 10))
    (tmp_path / "student" / "student.json").write_text("{")
    with pytest.raises(hast_jax.UserError, match="is damaged"):
        hast_jax.load(tmp_path / "student", student.network.module)
    with pytest.raises(hast_jax.UserError, match="holds no student"):
        hast_jax.load(tmp_path / "other")


def test_the_codes_of_a_student_are_whole_numbers_of_its_bits_and_give_its_weights(student: hast_jax.Student) -> None:
    params = flatten_dict(student.params, sep="/")
    assert len(student.codes()) == len(student.network.structure.layers)
    for name, each in student.codes().items():
        assert each["codes"].dtype == np.int8 and each["codes"].min() >= -4 and each["codes"].max() <= 3
        weights = (each["codes"] + each["zero_point"]) / each["scale"]
        np.testing.assert_allclose(weights, params[name], rtol=1e-5, atol=1e-7)


def test_without_a_workdir_nothing_is_written_printed_or_changed(
    network: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    before, updates = dict(os.environ), []
    capfd.readouterr()
    quantize(network, progress=updates.append)
    assert dict(os.environ) == before and not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    finished = [update.stage for update in updates if update.finished]
    assert finished == ["synthesis", "calibrate", "finetune"]
    assert all(0 <= update.done <= update.total for update in updates)


def test_a_call_shows_its_progress_unless_told_otherwise(network: tuple, capfd: pytest.CaptureFixture) -> None:
    quantize(network)
    shown = capfd.readouterr()
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["synthesis", "calibration", "fine-tuning"]
    quantize(network, progress=False)
    assert not shown.out and capfd.readouterr() == ("", "")
    with pytest.raises(hast_jax.InputError, match="progress is 'bar': give True, False or a function"):
        quantize(network, progress="bar")


def test_a_run_in_a_workdir_goes_on_holds_no_lock_and_its_result_never_changes(
    network: tuple, digits: datasets.Arrays, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    first = quantize(network, workdir=workdir)
    result = (workdir / "result.json").read_bytes()
    code = f"from pathlib import Path\nfrom hast_jax.runs import run_folder as r\nr._hold(Path({str(workdir / '.lock')!r}))"
    assert tiny.call_anew([sys.executable, "-c", code]).returncode == 0  # another process may hold it now
    again = quantize(network, workdir=str(workdir), fields=FEW_STEPS | {"devices": 2})
    np.testing.assert_array_equal(again(digits.images), first(digits.images))
    assert (workdir / "result.json").read_bytes() == result
    loaded = hast_jax.load(workdir / "student", network[0])
    np.testing.assert_array_equal(loaded(digits.images), first(digits.images))
    with pytest.raises(hast_jax.UserError, match=r"seed: 0 -> 1"):
        quantize(network, workdir=workdir, seed=1)
    done = tiny.call(tiny.evaluate(workdir, "--dataset=digits"))
    assert done.returncode == 1 and "was given in Python, so no command can make it: load the student" in done.stderr


def test_each_stage_stands_alone_on_plain_arrays(network: tuple, digits: datasets.Arrays) -> None:
    model, variables = network
    images, labels = hast_jax.synthesize(model, variables, image=(8, 8, 1), count=96, iterations=20, fields=FEW_STEPS)
    assert images.shape == (96, 8, 8, 1) and images.dtype == np.float32 and labels.shape == (96,) and labels.max() < 10
    ranges = hast_jax.calibrate(model, variables, images, bits="w3a3", fields=FEW_STEPS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ranges))
    trained = hast_jax.finetune(model, variables, ranges, images, labels, bits="w3a3", epochs=2, fields=FEW_STEPS)
    norm = ("init_block", "bn", "scale")  # kernels move onto their grids even without training
    assert np.abs(flatten_dict(trained["params"])[norm] - flatten_dict(variables["params"])[norm]).max() > 0
    real = digits.images, digits.labels
    assert hast_jax.evaluate(model, variables, *real, mean=MEAN, std=STD).top1 > 99
    assert hast_jax.evaluate(model, trained, *real, mean=MEAN, std=STD, bits="w3a3").top1 > 50
    given = {**trained, "ranges": jax.tree.map(lambda each: np.asarray(each).tolist(), trained["ranges"])}  # as from JSON
    flat = {"/".join(path): each for path, each in flatten_dict({**trained, "ranges": {}}).items()}
    for variables in (given, {**flat, "ranges": trained["ranges"]}):
        assert hast_jax.evaluate(model, variables, *real, mean=MEAN, std=STD, bits="w3a3").top1 > 50
    with pytest.raises(ValueError, match="the variables hold the ranges of a quantized network: give its bits"):
        hast_jax.evaluate(model, trained, *real, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"the ranges hold .*, which this student does not have"):
        hast_jax.finetune(model, trained, ranges, images, labels, bits=(4, None))
    fixed = hast_jax.calibrate(model, trained, images, bits="w3a3", fields=FEW_STEPS | {"finetune.ranges": "fixed"})
    with pytest.raises(ValueError, match=r"the ranges lack .*kernel/high: give .* and the same finetune\.ranges"):
        hast_jax.finetune(model, trained, fixed, images, labels, bits="w3a3")


def test_calibration_gives_the_same_ranges_however_many_batches_one_call_takes(network: tuple) -> None:
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype(np.float32)

    def ranges(steps_per_call):
        fields = FEW_STEPS | {"calibration.batches": 10, "steps_per_call": steps_per_call}
        return hast_jax.calibrate(*network, images, bits="w3a3", fields=fields)

    one, several = ranges(1), ranges(4)  # 1 + 3 + 3 + 3 batches
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), several, one)


@pytest.mark.usefixtures("little_optimization")
def test_the_student_is_trained_in_the_arithmetic_asked_for_and_ends_in_float32(network: tuple) -> None:
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype(np.float32)

    def student(arithmetic):
        fields = FEW_STEPS | {"finetune.epochs": 1, "finetune.steps_per_epoch": 2, "student.arithmetic": arithmetic}
        return quantize(network, images=(images, np.arange(40) % 10), fields=fields)

    exact, rounded = student("float32"), student("bfloat16")
    weight = [each.variables["params"]["init_block"]["conv"]["kernel"] for each in (exact, rounded)]
    assert 0 < np.abs(weight[0] - weight[1]).max() < 0.05 * np.abs(weight[0]).max()
    assert exact.network.arithmetic == rounded.network.arithmetic == "float32"


def test_fields_may_be_nested(network: tuple) -> None:
    model, variables = network
    setting = Setting(
        model, variables, (8, 8, 1), MEAN, STD, "w4a4", 0, None, {"finetune.epochs": 9}, {"finetune": {"epochs": 3}}
    )
    assert setting.config.finetune.epochs == 3


def test_a_student_can_be_pickled_before_and_after_a_call(student: hast_jax.Student, digits: datasets.Arrays) -> None:
    logits = student(digits.images[:4])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(student))(digits.images[:4]), logits)


def test_a_network_that_ends_in_a_softmax_is_used_with_a_notice(network: tuple) -> None:
    class Probabilities(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.softmax(nn.Dense(5)(nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x)).mean((1, 2))))

    def check(model, variables):
        teacher.check_logits(networks.create(model, (8, 8, 1)), variables, tiny.config())

    with pytest.warns(Notice, match="are probabilities: let the network return what it computes before its softmax"):
        check(Probabilities(), Probabilities().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*network)


@pytest.mark.slow
def test_images_that_are_there_already_are_learned_from(network: tuple) -> None:
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype(np.float32)
    student = quantize(network, images=(images, np.arange(40) % 10))
    assert student.record["images"] == 40 and student.record["iterations"] is None
    images[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="image 3 holds values that are not finite"):
        quantize(network, images=(images, np.arange(40) % 10))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": "w9a9"}, "between 2 and 8"),
        ({"bits": {"default": (3, 3), "nowhere": (8, 8)}}, "names no layer"),
        ({"budget": "huge"}, "budget is 'huge': choose one of trial, small, full"),
        ({"recipe": "bst"}, "recipe is 'bst': choose one of best, paper"),
        ({"image": (8, 8)}, r"image is \(8, 8\): it must be \(height, width, channels\)"),
        ({"image": (0, 8, 1)}, r"image is \(0, 8, 1\): it must be \(height, width, channels\), all positive"),
        ({"image": (1, 8, 8)}, r"image is \(1, 8, 8\): give \(height, width, channels\), such as \(8, 8, 1\)"),
        ({"image": (8, 8, 3)}, "one number, or 3 numbers, because the image has 3 channels"),
        ({"image": (8, 8, 2), "mean": None, "std": None}, r"do not fit the network on images of \(8, 8, 2\): params/"),
        ({"mean": (0.5, 0.5)}, "it must be one number, because the image has one channel"),
        ({"std": None}, "mean and std belong together: give both, or neither"),
        ({"mean": (4.9,)}, r"^mean is \(4.9,\): it must be between 0 and 1 for each channel, as pixels are here: divide it"),
        ({"fields": {"finetune.epss": 1}}, "did you mean finetune.eps"),
        ({"fields": {"finetune": {"epss": 1}}}, "did you mean finetune.eps"),
        ({"fields": {"bits": {"weights": 2}}}, "bits.weights cannot be set .* use the arguments of the function"),
        ({"fields": {"eval.dataset": "digits"}}, "use the arguments of the function"),
        ({"fields": 5}, "give a dict such as"),
        ({"image": 8}, r"must be \(height, width, channels\)"),
        ({"mean": ((0.5, 0.5), 0.5)}, "it must be one number, because the image has one channel"),
        ({"std": "0.5"}, "it must be one number, because the image has one channel"),
        ({"std": (0.0,)}, "positive for each channel"),
        ({"call": {"train": np.False_}}, "must be numbers, texts"),
        ({"test": (np.zeros((3, 8, 8, 1)), np.zeros(3))}, "give uint8 images"),
        ({"test": (np.zeros((3, 8, 8, 1), np.uint8), np.full(3, 10))}, "from 0 to 9"),
        ({"call": {"train": True}}, "with the moments of the batch"),
        ({"call": "train"}, "call is 'train': give a dict of keyword arguments"),
        ({"recipe": ["best"]}, r"recipe is \['best'\]: choose one of best, paper"),
        ({"budget": {}}, "budget is {}: choose one of trial"),
        ({"test": np.zeros((3, 8, 8, 1), np.uint8)}, r"test is a ndarray: give a pair \(images, labels\)"),
        ({"images": np.zeros((3, 8, 8, 1), np.float32)}, r"images is a ndarray: give a pair \(images, labels\)"),
        ({"std": (1e-12,)}, "the squares of their variances are too large for float32: check mean and std, and the weights"),
    ],
)
def test_what_is_impossible_is_refused_in_one_sentence(network: tuple, changes: dict, words: str) -> None:
    with pytest.raises(hast_jax.UserError, match=words) as error:
        quantize(network, **changes)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


@pytest.mark.parametrize("count", ["5", 1.5, 0, True])
def test_a_number_of_images_that_is_no_whole_number_is_refused(network: tuple, count: object) -> None:
    with pytest.raises(hast_jax.UserError, match=f"count is {count!r}: it must be a whole number above zero"):
        hast_jax.synthesize(*network, image=(8, 8, 1), count=count)


def test_the_number_of_images_is_that_of_the_argument(network: tuple) -> None:
    fields = {"synthesis.images": 32, "synthesis.batch": 32}
    with pytest.raises(hast_jax.UserError, match=r"fields set synthesis\.images to less than count, 64"):
        hast_jax.synthesize(*network, image=(8, 8, 1), count=np.int64(64), iterations=np.int64(1), fields=fields)


@pytest.mark.parametrize("images", [[[1.0], [1.0, 2.0]], [np.zeros((8, 8, 1)), np.zeros((8, 9, 1))]])
def test_images_of_unequal_sizes_are_no_array(network: tuple, student: hast_jax.Student, images: list, tmp_path: Path) -> None:
    labels = [0, 1]
    for call in (
        lambda: quantize(network, images=(images, labels)),
        lambda: quantize(network, test=(images, labels)),
        lambda: hast_jax.evaluate(student, images=images, labels=labels),
        lambda: hast_jax.calibrate(*network, images),
        lambda: hast_jax.export(student, tmp_path / "student.onnx", images=images),
        lambda: student(images),
    ):
        with pytest.raises(ValueError, match="the images cannot become one array, like lists of unequal lengths"):
            call()


def test_given_images_may_be_more_than_the_budget_makes_and_are_named_if_they_are_too_few(network: tuple) -> None:
    many = np.zeros((300, 8, 8, 1), np.float32), np.zeros(300, int)
    with pytest.raises(RuntimeError, match="enough"):
        quantize(network, images=many, budget="trial", fields={"finetune.batch": 300}, progress=stop)
    with pytest.raises(hast_jax.UserError, match="the given set holds 20 images, fewer than a batch"):
        quantize(network, images=(many[0][:20], many[1][:20]), fields=FEW_STEPS | {"finetune.batch": 21})


@pytest.mark.parametrize("path", [3, b"/tmp/run", "a\0b"])
def test_a_workdir_that_is_no_path_is_refused(network: tuple, path: object) -> None:
    with pytest.raises(hast_jax.UserError, match=r"is no path: give a text or a pathlib\.Path"):
        quantize(network, workdir=path)


def test_variables_without_values_are_named(network: tuple) -> None:
    model, variables = network
    with pytest.raises(hast_jax.UserError, match=r"is no array of numbers, such as a jax.ShapeDtypeStruct"):
        quantize((model, jax.eval_shape(lambda: variables)))


def test_a_weight_file_is_read_into_variables(network: tuple) -> None:
    model, variables = network
    read = hast_jax.read_weights("digits")
    jax.tree.map(np.testing.assert_array_equal, weights.from_variables(model, read, (8, 8, 1)), dict(variables))
    with pytest.raises(hast_jax.UserError, match=r"there is no weight file nowhere\.npz"):
        hast_jax.read_weights("nowhere.npz")
    with pytest.raises(hast_jax.UserError, match="the path of the weight file is empty"):
        hast_jax.read_weights("")
    with pytest.raises(hast_jax.UserError, match="None is no path"):
        hast_jax.read_weights(None)


@pytest.mark.usefixtures("little_optimization")
def test_strict_promotion_of_types_is_no_obstacle(network: tuple, digits: datasets.Arrays) -> None:
    with jax.numpy_dtype_promotion("strict"):
        student = quantize(network, test=(digits.images, digits.labels), fields=FEW_STEPS | {"finetune.epochs": 1})
        assert hast_jax.evaluate(student, images=digits.images, labels=digits.labels).top1 == student.record["last"]


def test_variables_that_a_network_reads_and_nobody_gave_are_named() -> None:
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            scale = self.variable("constants", "scale", jnp.ones, ())
            return nn.Dense(10)(nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x)).mean((1, 2)) * scale.value)

    model = Scaled()
    variables = dict(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    del variables["constants"]
    with pytest.raises(hast_jax.UserError, match=r"besides params and batch_stats, which are not given .*constants"):
        hast_jax.quantize(model, variables, image=(8, 8, 1))


def test_weights_in_double_precision_are_read_without_a_warning(network: tuple) -> None:
    model, variables = network
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weights.from_variables(model, double, (8, 8, 1))
    jax.tree.map(np.testing.assert_array_equal, found, {name: variables[name] for name in found})


def test_a_train_state_is_taken_and_no_variables_are_refused(network: tuple) -> None:
    model, variables = network
    state = SimpleNamespace(step=3, **variables)
    images, labels = hast_jax.synthesize(model, state, image=(8, 8, 1), count=67, iterations=20, fields=FEW_STEPS)
    assert images.shape == (67, 8, 8, 1) and labels.shape == (67,)
    with pytest.raises(ValueError, match="the variables are missing: give"):
        hast_jax.synthesize(model, None, image=(8, 8, 1), count=8, iterations=1)
    with pytest.raises(ValueError, match="the variables hold no params"):
        hast_jax.synthesize(model, {}, image=(8, 8, 1), count=8, iterations=1)
    with pytest.raises(ValueError, match=r"the network is the class ResNet: give an instance, such as ResNet\(...\)"):
        hast_jax.synthesize(type(model), variables, image=(8, 8, 1), count=8, iterations=1)
    with pytest.raises(ValueError, match="the variables hold no batch_stats, the statistics of batch norms: give"):
        hast_jax.synthesize(model, {"params": variables["params"]}, image=(8, 8, 1), count=8, iterations=1)


def stop(update: hast_jax.Update) -> None:
    """Break a run off at its first step."""
    raise RuntimeError("enough")


def test_a_run_is_judged_by_the_images_that_it_began_with(network: tuple, digits: datasets.Arrays, tmp_path: Path) -> None:
    fewer = digits.images[:99], digits.labels[:99]
    with pytest.raises(RuntimeError, match="enough"):
        quantize(network, workdir=tmp_path / "run", test=fewer, progress=stop)
    for other in (None, (digits.images, digits.labels)):
        with pytest.raises(hast_jax.UserError, match="began with other test images"):
            quantize(network, workdir=tmp_path / "run", test=other)


def test_a_stage_refuses_what_the_others_did_not_make(network: tuple, digits: datasets.Arrays) -> None:
    model, variables = network
    images = np.zeros((20, 8, 8, 1), np.float32)
    with pytest.raises(ValueError, match="whole number from 0 to 9"):
        hast_jax.finetune(model, variables, {}, images, np.full(20, 10))
    with pytest.raises(ValueError, match="give what calibrate returned"):
        hast_jax.finetune(model, variables, None, images, np.zeros(20, int))
    with pytest.raises(ValueError, match=r"finetune\.batch is 60, more than the 20 images"):
        hast_jax.finetune(model, variables, {}, images, np.zeros(20, int), fields={"finetune.batch": 60})
    with pytest.raises(ValueError, match="positive for each channel"):
        hast_jax.evaluate(model, variables, digits.images, digits.labels, mean=MEAN, std=(0.0,))
    with pytest.raises(ValueError, match="evaluate needs images and labels"):
        hast_jax.evaluate(model, variables, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"the images have the shape \(719, 8, 8\): give uint8 images \[n, height"):
        hast_jax.evaluate(model, variables, digits.images[..., 0], digits.labels)
    for bits in (0, {}, ""):
        with pytest.raises(ValueError, match="bits"):
            hast_jax.evaluate(model, variables, digits.images, digits.labels, bits=bits)


def test_a_weight_that_is_not_finite_is_named(network: tuple) -> None:
    model, variables = network
    spoilt = jax.tree.map(np.array, variables)
    spoilt["params"]["output"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="output/kernel holds numbers that are not finite"):
        quantize((model, spoilt))


def test_a_teacher_that_is_no_better_than_chance_is_warned_of_before_any_work(network: tuple, digits: datasets.Arrays) -> None:
    updates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", hast_jax.AccuracyWarning)
        with pytest.raises(hast_jax.AccuracyWarning, match="no better than chance"):
            quantize(network, test=(digits.images, (digits.labels + 1) % 10), progress=updates.append)
    assert {update.stage for update in updates} == {"teacher", "evaluate"}


def test_importing_it_loads_nothing_that_takes_long_and_the_commands_can_be_imported_together() -> None:
    heavy = {"orbax", "optax", "rich", "matplotlib", "tensorboardX", "sklearn", "grain"}
    code = f"""
import sys, flax
before = set(sys.modules)
import hast_jax
assert not (set(sys.modules) - before) & {heavy}
import hast_jax.main, hast_jax.evaluate, hast_jax.reproduce, hast_jax.benchmark, hast_jax.pretrain, hast_jax.results
assert callable(hast_jax.evaluate) and hast_jax.__version__
"""
    done = tiny.call_anew([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tiny.ROOT))
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    binaries = tmp_path / "venv" / "bin"
    run(str(binaries / "pip"), "install", str(next(tmp_path.glob("*.whl"))))
    fields = [f"--config.{name}={value}" for name, value in tiny.FIELDS.items()]
    run(str(binaries / "hast-jax"), "quantize", "--config=digits:w3a3", "--workdir=run", *fields, "--config.report=True")
    assert "resnet8" in (tmp_path / "run" / "report.html").read_text() and (tmp_path / "run" / "README.md").exists()
    run(str(binaries / "hast-jax"), "export", "--workdir=run", "--format=safetensors")
    assert (tmp_path / "run" / "student.safetensors").stat().st_size > 1000
    assert "full precision (teacher)" in run(str(binaries / "hast-jax"), "evaluate", "--workdir=run")
    assert "Table 1" in run(str(binaries / "hast-jax"), "reproduce", "table1", "--config=configs/digits.py", *fields)
    assert "flops" in run(str(binaries / "hast-jax"), "benchmark", "--config=digits:small", "--compile_only", "--part=finetune")
    code = "import hast_jax; print(hast_jax.load('run/student').record['teacher'], hast_jax.__file__)"
    assert str(tmp_path) in run(str(binaries / "python"), "-c", code)


def test_a_link_in_a_folder_is_refused_and_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").symlink_to(tmp_path)
    before = dict(run_folder._held)
    for _ in range(2):
        with pytest.raises(hast_jax.UserError, match="is a link"):
            run_folder.open_for_run(tmp_path / "run", tiny.config())
    assert run_folder._held == before
