"""An exported file judges images as the student does, whatever the network."""

import dataclasses
import functools
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
from flax.traverse_util import flatten_dict
from hypothesis import given as with_values
from hypothesis import strategies as st
from test_any_network import NETWORKS, given

import hast_jax
from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver import comparison, exports, integers
from hast_jax.errors import InputError, UserError
from hast_jax.networks import rules as rules_lib
from hast_jax.student import Student

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("little_optimization")

TRANSPOSED = "unusual"  # it has a transposed convolution
QUICK = ("resnet", "densenet", "again", "bfloat16")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in (*QUICK, TRANSPOSED)]
RULES = {"default": "w3a3", "Conv_0": (8, 8), "Dense_0": None}


def student(name: str, bits="w4a4", learned: bool = True) -> Student:
    """A network with random weights, quantized, with ranges of random images."""
    its = given(name)
    rules = rules_lib.normalise(bits)
    network = networks.create(its.module, its.image, rules=rules, learned_ranges=learned)
    images = jax.random.uniform(jax.random.key(0), (32, *its.image), minval=-2, maxval=2)
    ranges = jax.jit(functools.partial(networks.observe, network))(its.variables, {}, images)
    channels = its.image[-1]
    return Student(network, {**its.variables, "ranges": ranges}, rules, its.image, (0.5,) * channels, (0.25,) * channels, {})


def random_images(its: Student, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *its.image), np.uint8)


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """As a stranger would run the file."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_the_onnx_file_of_any_network_judges_as_the_student_does(name: str, tmp_path: Path) -> None:
    its = student(name)
    found = hast_jax.export(its, tmp_path / "student.onnx")
    (compared,) = found.comparisons
    assert compared.images == 256 and compared.different <= 1
    assert found.layers and np.median(list(found.layers.values())) < 0.03  # bfloat16 rounds otherwise; others are far below
    images = random_images(its, 3)
    close = np.isclose(onnx_logits(tmp_path / "student.onnx", images), its(images), atol=1e-4).all(1)
    assert name in ("bfloat16", "sequential") or close.mean() > 0.5


@pytest.mark.parametrize(
    ("bits", "operators", "learned"),
    [
        ("w2a2", "float", True),
        ("w2a2", "exact", True),
        ("w8a8", "integer", True),
        ("w8a8", "float", False),
        ("w8a8", "integer", False),
        (RULES, "integer", True),
        (RULES, "float", False),
        (RULES, "exact", False),
    ],
)
def test_all_bits_all_rules_and_both_kinds_of_ranges_are_exported(bits, operators: str, learned: bool, tmp_path: Path) -> None:
    its = student("remat" if bits in ("w2a2", "w8a8") else "vgg", bits, learned)
    found = hast_jax.export(its, tmp_path / "student.onnx", operators=operators)
    assert found.comparisons[0].different <= 1 and max(found.layers.values()) < 1e-3
    kinds = {name: kind for name, kind, _ in found.operators}
    fits = learned or bits != "w8a8"  # the paper's ranges of eight bits need not be symmetric
    assert ("ConvInteger" in kinds) == (operators == "integer" and fits)
    assert kinds.get("ConvInteger", "integer") == "integer" and kinds["QuantizeLinear"] == "between"


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_with_exact_operators_no_sum_is_rounded_so_the_integers_are_those_of_integer_operators(name: str) -> None:
    from hast_jax.deliver import onnx_check, onnx_export

    its = student(name, "w4a4")
    images = random_images(its, 32)
    exact, integer = (
        onnx_check.integers(onnx_export.build(its, operators=operators), images) for operators in ("exact", "integer")
    )
    assert exact.keys() == integer.keys() and all(np.array_equal(exact[key], integer[key]) for key in exact)


def test_the_weights_of_the_file_are_the_students_integers_with_zero_point_zero(tmp_path: Path) -> None:
    its = student("resnet", "w3a3")
    hast_jax.export(its, tmp_path / "student.onnx")
    model = onnx.load(tmp_path / "student.onnx")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            assert len(node.input) == 2 or not stored[node.input[2]].any()
            found.append((stored[node.input[0]], stored[node.input[1]]))
    codes = its.codes().values()
    assert len(found) == len(codes)
    for kernel in codes:
        order = (3, 2, 0, 1) if kernel["codes"].ndim == 4 else (0, 1)
        wanted = kernel.integers.transpose(order)
        assert any(w.dtype == np.int8 and np.array_equal(w, wanted) and np.array_equal(s, kernel.step) for w, s in found)
    assert model.opset_import[0].version == 13 and model.ir_version == 7
    said = {each.key: each.value for each in model.metadata_props}
    assert (
        said["hast_jax"] == hast_jax.__version__ and said["classes"] == "10" and json.loads(said["rules"]) == [[".*", [3, 3]]]
    )


def test_activations_are_clipped_after_they_are_quantized(tmp_path: Path) -> None:
    its = student("resnet", "w3a3")
    hast_jax.export(its, tmp_path / "student.onnx")
    model = onnx.load(tmp_path / "student.onnx")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == len(quantized) == len(set(its.network.sites.values()))
    for node in clips:
        low, high = (stored[name] for name in node.input[1:])
        assert node.input[0] in quantized and high.dtype == np.uint8 and high - low == 7


def test_int4_makes_the_smallest_onnx_file_and_computes_the_same(tmp_path: Path) -> None:
    its = student("resnet", "w4a4")
    wide = hast_jax.export(its, tmp_path / "wide.onnx")
    small = hast_jax.export(its, tmp_path / "small.onnx", weights="int4")
    assert small.bytes < wide.bytes < small.float_bytes
    kinds = {each.data_type for each in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert onnx.TensorProto.INT4 in kinds
    images = random_images(its)
    np.testing.assert_allclose(onnx_logits(small.path, images), onnx_logits(wide.path, images), atol=1e-5)


@pytest.mark.parametrize(("layout", "normalised"), [("nchw", False), ("nhwc", True)])
def test_a_file_takes_pixels_or_normalised_images_in_either_layout(layout: str, normalised: bool, tmp_path: Path) -> None:
    its = student("vgg")
    hast_jax.export(its, tmp_path / "student.onnx", layout=layout, normalised=normalised)
    pixels = random_images(its, 5)  # of a number other than the one that was traced
    images = np.asarray(normalise(jnp.asarray(pixels), its.mean, its.std)) if normalised else pixels
    images = images.transpose(0, 3, 1, 2) if layout == "nchw" else images
    np.testing.assert_allclose(onnx_logits(tmp_path / "student.onnx", images), its(pixels), atol=1e-4)


class Assorted(nn.Module):
    """Operations that none of the other networks has."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.softplus(norm(nn.Conv(12, (3, 3))(x)))
        a, b, c = jnp.split(x, (3, 8), axis=-1)  # parts of a channel axis
        x = jnp.concatenate([jnp.sin(c), 1 - a, b[..., ::2], -b], axis=-1)  # 4 + 3 + 3 + 5 channels
        x = x.transpose(0, 2, 1, 3)[:, 1:-1]
        x = norm(nn.Conv(15, (3, 3), (2, 1), padding="SAME")(jnp.square(x) / (1 + jnp.abs(x))))
        gate = nn.softmax(x.max((1, 2)), axis=-1)
        x = jnp.where(x > 0.1, x, jnp.clip(x, -1, 0.05)) * gate[:, None, None] ** 0.5
        x = nn.avg_pool(x, (3, 3), (1, 2), "SAME", count_include_pad=False) - x.mean((1, 2), keepdims=True)
        x = x + 2 / (3 + x[:, :, ::2].max(2, keepdims=True) ** 2)
        return nn.log_softmax(nn.Dense(self.classes)(nn.selu(x[:, ::-1]).reshape((len(x), -1))))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_operations_of_all_kinds_are_written(weights: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "assorted", (Assorted(), (16, 16, 3)))
    its = student("assorted", "w8a8")
    found = hast_jax.export(its, tmp_path / "student.onnx", weights=weights)
    assert found.comparisons[0].different == 0 and found.comparisons[0].largest_difference < 0.1
    images = random_images(its, 5)
    np.testing.assert_allclose(onnx_logits(tmp_path / "student.onnx", images), its(images), atol=0.1)


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


@pytest.mark.parametrize("operators", ["float", "integer"])
def test_a_kernel_whose_integers_need_32_bits_is_written_as_floats(operators: str, tmp_path: Path, monkeypatch) -> None:
    """A box filter, or any channel of nearly equal weights, with fixed ranges."""

    class Box(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
            x = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, name="box")(x)
            return nn.Dense(10)(nn.relu(nn.Conv(4, (1, 1), name="next")(x)).mean((1, 2)))

    monkeypatch.setitem(NETWORKS, "box", (Box(), (8, 8, 3)))
    its = student("box", "w8a8", learned=False)
    params = {**its.variables["params"], "box": {"kernel": jnp.full((3, 3, 1, 4), 1 / 9)}}
    its = dataclasses.replace(its, variables={**its.variables, "params": params})
    found = hast_jax.export(its, tmp_path / "student.onnx", operators=operators)
    assert found.comparisons[0].different <= 1
    with pytest.raises(UserError, match="the integers of box/kernel do not fit into 32 bits"):
        hast_jax.export(its, tmp_path / "student.safetensors", "safetensors")


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (lambda x: x - x[:1], "takes some images out of a batch"),
        (lambda x: x - x.mean(0, keepdims=True), "mixes the images of a batch"),
        (lambda x: x.reshape((-1, *x.shape[2:]))[:, None] * jnp.ones((1, 16, 1, 1)), "merges the axis of the images"),
        (lambda x: x + jnp.arange(len(x))[:, None, None, None], "for each image of a batch"),
    ],
)
def test_a_network_that_mixes_the_images_of_a_batch_is_refused(mix, words: str, tmp_path: Path, monkeypatch) -> None:
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            y = mix(nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))))
            return nn.Dense(10)(y.reshape((-1, *x.shape[1:3], 4))[: len(x)].mean((1, 2)))

    monkeypatch.setitem(NETWORKS, "mixed", (Mixed(), (16, 16, 3)))
    given.cache_clear()
    with pytest.raises(InputError, match=words):
        hast_jax.export(student("mixed"), tmp_path / "student.onnx")


def test_what_cannot_be_written_as_onnx_is_refused_by_name_and_stablehlo_holds_it(tmp_path: Path) -> None:
    its = student(TRANSPOSED)
    with pytest.raises(InputError, match=r"transposed convolution.*format=stablehlo holds"):
        hast_jax.export(its, tmp_path / "student.onnx")
    assert not any(tmp_path.iterdir())
    hast_jax.export(its, tmp_path / "student.stablehlo", "stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "student.stablehlo").read_bytes()))
    images = random_images(its, 7)
    np.testing.assert_allclose(program.call(images), its(images), atol=1e-4)


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


def test_a_file_that_judges_otherwise_than_the_student_is_not_written(tmp_path: Path, monkeypatch) -> None:
    its = student("vgg")
    flat = flatten_dict(its.variables["ranges"])
    name = ("Conv_2", "input", "high")
    true = exports._onnx

    def wrong(student, options, sets):
        """Writes the file of a student with one range that is not the student's."""
        other = {**flat, name: flat[name] / 9}
        changed = dataclasses.replace(student, variables={**student.variables, "ranges": flax_tree(other)})
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


def flax_tree(flat: dict) -> dict:
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat)


def test_the_ending_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .onnx, or give format='safetensors'\."):
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
    ],
)
def test_an_impossible_export_ends_in_one_sentence(format: str, options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        hast_jax.export(student("vgg"), tmp_path / f"student.{format}", format, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images, labels: (images, labels[:, None]), "the labels must be one whole number"),
        (lambda images, labels: (images, labels[:-1]), "the labels must be one whole number"),
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
    for words in ("student.onnx", "0 of 96 images", "0 of 719 test images", "top-1 of file and student", "9 Conv"):
        assert words in " ".join(said.stdout.split()), words
    its = hast_jax.load(run / "student")
    images = random_images(its)
    np.testing.assert_allclose(onnx_logits(run / "student.onnx", images), its(images), atol=1e-3)


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
