"""An ONNX file judges images as the student does, whatever the network, and holds the student's integers."""

import dataclasses
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from students import onnx_logits, random_images, student
from test_any_network import NETWORKS, given

import hast_jax
from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver import measure
from hast_jax.errors import InputError, UserError
from hast_jax.networks.resnet import ResNet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("little_optimization")

TRANSPOSED = "unusual"  # it has a transposed convolution
QUICK = ("resnet", "densenet", "again", "bfloat16")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in (*QUICK, TRANSPOSED)]
RULES = {"default": "w3a3", "Conv_0": (8, 8), "Dense_0": None}


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_the_onnx_file_of_any_network_judges_as_the_student_does(name: str, tmp_path: Path) -> None:
    its = student(name)
    found = hast_jax.export(its, tmp_path / "student.onnx")
    (compared,) = found.comparisons
    assert compared.images == 256 and compared.different <= 1
    assert found.layers and np.median(list(found.layers.values())) < 0.03  # bfloat16 rounds otherwise; others are far below
    images = random_images(its, 3)
    stored = onnx.load(tmp_path / "student.onnx").graph.initializer
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in stored) == len(its.codes())
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
@pytest.mark.parametrize(
    "options", [{}, {"operators": "integer"}, {"operators": "exact", "weights": "int4"}], ids=["float", "integer", "exact int4"]
)
@pytest.mark.parametrize("bits", [(None, 4), {"default": "w4a4", ".*1": "a4"}], ids=["no weights", "some weights"])
def test_beside_weights_in_full_precision_quantized_activations_are_those_of_the_student(
    name: str, options: dict[str, str], bits, tmp_path: Path
) -> None:
    found = hast_jax.export(student(name, bits), tmp_path / "student.onnx", **options)
    assert found.layers and max(found.layers.values()) < 1e-3 and found.comparisons[0].different <= 1


class LinearLayers(nn.Module):
    """A linear layer on pixels, one without a bias, and one whose output is scaled."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(x)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        x = nn.relu(nn.Dense(32, use_bias=False)(x.mean((1, 2))))
        return nn.Dense(10)(x) * 2


@pytest.mark.parametrize("options", [{}, {"operators": "exact"}, {"operators": "integer"}, {"weights": "int4"}])
@pytest.mark.parametrize("bits", [(4, None), {"default": "w4a4", "Dense_[12]": "w8"}])
def test_beside_quantized_weights_activations_in_full_precision_are_not_rounded(
    bits, options: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(NETWORKS, "linear layers", (LinearLayers(), (8, 8, 3)))
    its, images = student("linear layers", bits), random_images(student("linear layers", bits), 32)
    hast_jax.export(its, tmp_path / "student.onnx", **options)
    different = np.abs(onnx_logits(tmp_path / "student.onnx", images) - its(images)).max(1)
    assert np.median(different) < 1e-5


@pytest.mark.parametrize("operators", ["float", "exact", "integer"])
def test_integers_of_a_kernel_that_fit_no_small_type_are_exported(operators: str, tmp_path: Path) -> None:
    """With the paper's ranges, the integers of a kernel of one sign lie far from zero."""
    its = student("remat", "w8a8", learned=False)
    kernels = [name for name, codes in its.codes().items() if codes.integers.ndim == 4]
    params = flatten_dict(its.variables["params"], sep="/")
    params[kernels[1]] = jnp.abs(params[kernels[1]]) + 0.3
    its = dataclasses.replace(its, variables={**its.variables, "params": unflatten_dict(params, sep="/")})
    assert its.codes()[kernels[1]].integers.min() > 127
    found = hast_jax.export(its, tmp_path / "student.onnx", operators=operators)
    assert found.comparisons[0].different <= 1 and max(found.layers.values()) < 1e-3


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_with_exact_operators_no_sum_is_rounded_so_the_integers_are_those_of_integer_operators(name: str) -> None:
    from hast_jax.deliver import onnx_check, onnx_export

    its = student(name, "w4a4")
    images = random_images(its, 32)
    exact, integer = (
        onnx_check.integers(onnx_export.build(its, operators=operators), images) for operators in ("exact", "integer")
    )
    assert exact.keys() == integer.keys() and all(np.array_equal(exact[key], integer[key]) for key in exact)


@pytest.mark.parametrize("operators", ["float", "exact", "integer"])
def test_large_integers_are_multiplied_without_a_loss(operators: str, tmp_path: Path, monkeypatch) -> None:
    """A CPU without VNNI would cut off the sums of these products in 16 bits. On other CPUs the file is the same."""

    class Bare(nn.Module):
        """Convolutions and linear layers with nothing between them and the next quantized activation."""

        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(x)))
            x = nn.relu(nn.Conv(16, (3, 3), name="large")(x))
            x = nn.Conv(16, (3, 3), use_bias=False, name="larger")(x)
            x = nn.relu(nn.Dense(16, use_bias=False)(x.mean((1, 2))))
            return nn.Dense(10, use_bias=False)(x)

    monkeypatch.setitem(NETWORKS, "bare", (Bare(), (8, 8, 3)))
    given.cache_clear()
    its = student("bare", "w8a8")
    params = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.3 if leaf.ndim > 1 else leaf, its.variables["params"])
    images = jax.random.uniform(jax.random.key(0), (32, *its.image), minval=-2, maxval=2)
    ranges = networks.observe(its.network, {**its.variables, "params": params}, {}, images)
    its = dataclasses.replace(its, variables={**its.variables, "params": params, "ranges": ranges})
    hast_jax.export(its, tmp_path / "student.onnx", operators=operators)
    pixels = random_images(its, 32)
    np.testing.assert_allclose(onnx_logits(tmp_path / "student.onnx", pixels), its(pixels), rtol=0.01)
    model = onnx.load(tmp_path / "student.onnx")
    types = {each.name: each.data_type for each in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "MatMulInteger")]
    made = {node.output[0]: node.op_type for node in model.graph.node}
    for node in products:  # what keeps each product whole, whatever the CPU
        if operators == "integer":
            assert types[node.input[1]] == onnx.TensorProto.UINT8
        else:
            assert made[node.input[1]] == "Mul"
    assert len(products) == 2
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    doubled = {node.output[0] for node in model.graph.node if node.op_type == "Mul" and np.all(values.get(node.input[1]) == 2)}
    kept = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in doubled]
    assert len(kept) == (operators == "float")  # behind `large`; means are taken of the results of `larger`


@pytest.mark.parametrize("operators", ["integer", "exact"])
def test_the_maximum_of_integers_over_windows_is_an_integer(operators: str, tmp_path: Path, monkeypatch) -> None:
    """The convolutions behind the max pooling of an ImageNet ResNet compute with integers too."""
    monkeypatch.setitem(NETWORKS, "stem", (ResNet(10, (4, 8), (1, 1), imagenet_stem=True), (32, 32, 3)))
    its = student("stem")
    found = hast_jax.export(its, tmp_path / "student.onnx", operators=operators)
    assert found.comparisons[0].different == 0
    model = onnx.load(tmp_path / "student.onnx")
    convolutions = [node.op_type for node in model.graph.node if node.op_type in ("Conv", "ConvInteger")]
    assert len(convolutions) == 6
    if operators == "integer":
        assert convolutions.count("ConvInteger") == 5  # all but the first, which reads the image
    steps = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    kernels = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in steps]
    # The first convolution reads the image, and the linear layer reads means: both compute with dequantized kernels.
    assert len(kernels) == {"integer": 2, "exact": 7}[operators]
    if operators == "exact":  # five convolutions; the linear layer multiplies by two steps after its integers are halved
        assert sum(np.all(steps[node.input[1]] == 1) for node in kernels) == 5
    costs = {each.name: each for each in measure.costs(its.network, its.variables, its.image)}
    assert costs["stage1_unit1/conv1/conv"].activations == 4 and costs["init_block/conv"].activations == 32


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


OPERATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "selu": nn.selu,
    "softplus": nn.softplus,
    "sigmoid": nn.sigmoid,
    "softmax": lambda x: x * nn.softmax(x, axis=-1),
    "logsumexp": lambda x: jax.scipy.special.logsumexp(x, -1),
    "abs": jnp.abs,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "root": lambda x: jnp.abs(x) ** 0.5,
    "rsqrt": lambda x: lax.rsqrt(1 + x * x),
    "divide": lambda x: x / (1 + jnp.abs(x)),
    "divide a constant": lambda x: 2 / (3 + x**2),
    "subtract from a constant": lambda x: 1 - x,
    "negative": lambda x: -jnp.abs(x),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "erfc": jax.scipy.special.erfc,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "is_finite": lambda x: jnp.where(jnp.isfinite(1 / jnp.maximum(x, 0)), x, 0),
    "minimum": lambda x: jnp.minimum(x, x[:, ::-1]),
    "maximum": lambda x: jnp.maximum(x, 0.3 * x + 0.1),
    "clip": lambda x: jnp.clip(x, -1, 0.05),
    "where": lambda x: jnp.where((jnp.floor(x) > 0) & ~(jnp.floor(x) >= 2) | (jnp.floor(x) < -1), x, 0.2),
    "equal": lambda x: jnp.where((jnp.floor(x) == 1) | (jnp.floor(x) != -1) & (jnp.floor(x) <= 0), x, 0.2),
    "largest": lambda x: x.max((1, 2)),
    "smallest": lambda x: x[:, :, ::2].min(2, keepdims=True),
    "sum": lambda x: x.sum(2),
    "average pool": lambda x: nn.avg_pool(x, (3, 3), (1, 2), "SAME", count_include_pad=False),
    "largest pool": lambda x: nn.max_pool(x, (2, 3), (2, 1)),
    "transpose": lambda x: x.transpose(0, 2, 3, 1),
    "reverse": lambda x: x[:, ::-1, :, ::-1],
    "slice": lambda x: x[:, 1:-1, ::3, 2:],
    "split and join": lambda x: jnp.concatenate([jnp.sin(x[..., 8:]), 1 - x[..., :3], x[..., 3:8:2]], axis=-1),
    "constant positions": lambda x: x[..., np.asarray([3, 0, 0, 7, -1])],
    "stack": lambda x: jnp.stack([x, x * x], 1),
    "tile": lambda x: jnp.tile(x[:, :, :1], (1, 1, 3, 1)),
    "resize": lambda x: jax.image.resize(x, (x.shape[0], 9, 5, x.shape[-1]), "nearest"),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1))),
    "pad with the edge": lambda x: jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0)), mode="edge"),
    "pad with a mirror": lambda x: jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0)), mode="reflect"),
    "join rows": lambda x: jnp.concatenate([jnp.broadcast_to(ROWS, (*x.shape[:3], 1)), x, jnp.zeros_like(x[..., :2])], -1),
    "convolve with ones": lambda x: lax.conv(x.transpose(0, 3, 1, 2), jnp.ones((3, x.shape[-1], 3, 3)), (1, 1), "VALID"),
}
ROWS = jnp.linspace(-1, 1, 8)[:, None, None]


class Assorted(nn.Module):
    """Each logit is a weighted mean of what one operation makes of the same activations."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(12, (3, 3))(x))

        def mean(y):
            flat = y.reshape((len(y), -1))
            return (flat * jnp.linspace(1, 2, flat.shape[1])[None]).mean(1)

        return jnp.stack([mean(operation(x)) for operation in OPERATIONS.values()], 1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_operations_of_all_kinds_are_written(weights: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "assorted", (Assorted(), (8, 8, 3)))
    its = student("assorted", "w4a8")
    hast_jax.export(its, tmp_path / "student.onnx", weights=weights)
    images = random_images(its, 16)
    wanted, found = np.asarray(its(images)), onnx_logits(tmp_path / "student.onnx", images)
    for name, ours, theirs in zip(OPERATIONS, wanted.T, found.T):
        # Where rounding moved an activation to another integer, the logits of that image differ.
        assert np.median(np.abs(ours - theirs)) < 1e-3 * np.ptp(ours), name


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (lambda x: (x > 0).astype(jnp.int32) & 1, "the operation 'and' on integers"),
        (lambda x: -(x > 0).astype(jnp.int32), "the operation 'neg' on integers"),
        (lambda x: jnp.cumsum(x, 1), "the operation 'cumsum'"),
    ],
    ids=["and", "neg", "cumsum"],
)
def test_an_operation_that_cannot_be_written_is_named(operation, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(OPERATIONS, "abs", operation)
    monkeypatch.setitem(NETWORKS, "assorted", (Assorted(), (8, 8, 3)))
    with pytest.raises(InputError, match=f"{words}; format=stablehlo"):
        hast_jax.export(student("assorted", "w8a8"), tmp_path / "student.onnx")


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
    for kept in ("int8", "packed"):
        with pytest.raises(UserError, match="the integers of box/kernel do not fit into 32 bits"):
            hast_jax.export(its, tmp_path / "student.safetensors", "safetensors", weights=kept)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (lambda x: jnp.tile(x, (2, 1, 1, 1)), "merges the axis of the images"),
        (lambda x: x - x[np.zeros(1, int)], "at other positions than constant ones of one axis"),
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
    products = re.findall(r"stablehlo\.(?:convolution|dot_general)[ (].*", program.mlir_module())
    assert products and all("HIGHEST" in each for each in products)  # an accelerator would otherwise round the operands
