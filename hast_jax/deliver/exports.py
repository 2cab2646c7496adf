"""Export a student to a file in one of `FORMATS`, and compare the file with the student before it is written."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import export as jax_export

from hast_jax import networks, paths
from hast_jax.data.datasets import normalise, real_images
from hast_jax.deliver import comparison, integers
from hast_jax.deliver.comparison import Comparison, Judged
from hast_jax.errors import InputError, UserError, pip_install, sentence
from hast_jax.networks.marks import activation_grid
from hast_jax.runs.files import write_bytes
from hast_jax.student import DESCRIPTION, WEIGHTS, Student

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a file.

    weights: "int8"; "int4" (only onnx: a smaller file); "packed" (only safetensors: each weight takes its own bits).
    operators: only onnx. "float": Conv and MatMul with dequantized integers, which every runtime supports. "exact": Conv and
    MatMul with the integers as floats, so that no sum is rounded. "integer": ConvInteger and MatMulInteger.
    layout: only onnx: axes of the images, "nhwc" or "nchw".
    normalised: the file takes float32 images in the network's normalised space. If False, it takes pixels of 0 ... 255 and
    normalises them itself; pixels are uint8 in ONNX and StableHLO, float32 in LiteRT.
    """

    weights: str = "int8"
    operators: str = "float"
    layout: str = "nhwc"
    normalised: bool = False


@dataclasses.dataclass(frozen=True)
class Exported:
    """The written file, and what its check found.

    bytes, float_bytes: size of the file, and of the same network in float32 in the same format.
    comparisons: one for each set of images; empty for a format that cannot be run.
    layers: name of a quantized activation -> share of its integers that differ from the student's, in order of execution.
    operators: (type, kind, number); kind is "integer", "float", or "between" for an operator that converts.
    milliseconds, float_milliseconds: time for one image on one thread, of the file and of the network in float32, measured in
    turns; None if they were not measured.
    """

    path: Path
    bytes: int
    float_bytes: int
    comparisons: tuple[Comparison, ...] = ()
    layers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    operators: tuple[tuple[str, str, int], ...] = ()
    milliseconds: float | None = None
    float_milliseconds: float | None = None


class Format(NamedTuple):
    """suffix: of the files. options: option -> its possible values, the default first. write: see `_onnx`."""

    suffix: str
    options: Mapping[str, tuple[Any, ...]]
    write: Callable[[Student, Options, Sequence[Judged]], tuple[bytes, dict[str, Any]]]


def export(
    student: Student,
    path: str | Path,
    format: str = "onnx",
    *,
    images: Any = None,
    test: tuple[Any, Any] | None = None,
    **options: Any,
) -> Exported:
    """Write `student` to the file `path`. Before it is written, the file is compared with the student.

    Args:
      student: the quantized network.
      path: the file. An existing file is replaced. Nothing is written if the comparison fails.
      format: "onnx"; "litert" for phones and small devices; "safetensors", the integers for other programs; "stablehlo", the
        whole program for other users of JAX.
      images: images to compare on, [n, height, width, channels]: uint8, or normalised floats. By default they are random,
        which is a weaker check.
      test: real uint8 images [n, height, width, channels] and labels [n]. The accuracies are compared on them.
      options: the fields of `Options` that differ from their defaults.

    Raises InputError for impossible arguments, for a path without the format's ending, and for a network that cannot be written
    as ONNX or StableHLO. Raises UserError if LiteRT cannot convert or run the network, if a package is missing, if `path`
    cannot be written, or if classes or logits of the file differ too much from the student's (`comparison.refuse_difference`).
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise InputError(f"the format {format!r} is unknown: choose from {', '.join(FORMATS)}.")
    if not isinstance(student, Student):
        raise InputError(f"the student is a {type(student).__name__}: give what quantize or load returned.")
    path, suffix = paths.local(path), FORMATS[format].suffix
    if not path.name.endswith(suffix):
        other = next((name for name, each in FORMATS.items() if path.name.endswith(each.suffix)), None)
        raise InputError(f"{path} must end in {suffix}" + (f", or choose the format {other}." if other else "."))
    if path.name in (WEIGHTS, DESCRIPTION) and (path.parent / DESCRIPTION).exists():
        raise InputError(f"{path} is a file of the saved student itself: choose another name.")
    chosen = _options(format, options)
    sets = [comparison.judged(student, images), *_test_set(student, test)]
    content, found = FORMATS[format].write(student, chosen, sets)
    comparison.refuse_difference(found.get("comparisons", ()), found.get("layers", {}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another path.") from error
    return Exported(path, len(content), **found)


def _test_set(student: Student, test: tuple[Any, Any] | None) -> list[Judged]:
    if test is None:
        return []
    found = real_images(test, student.image, student.network.classes)
    return [Judged("test images", found.images, found.labels)]


def _options(format: str, given: Mapping[str, Any]) -> Options:
    known = FORMATS[format].options
    for name, value in given.items():
        if name not in Options.__dataclass_fields__ or (name not in known and value != getattr(Options, name)):
            raise InputError(f"{format} has no option {name!r}: its options are {', '.join(known) or 'none'}.")
        if name in known and value not in known[name]:
            raise InputError(f"{name} is {value!r}: for {format}, choose from {', '.join(map(str, known[name]))}.")
    return Options(**given)


def _in_float32(student: Student) -> Student:
    """The same network with nothing quantized. A file is compared with it in size and time."""
    plain = dataclasses.replace(student.network, kernels={}, sites={}, learned_ranges=False)
    return dataclasses.replace(student, network=plain)


def _prepared(student: Student, options: Options) -> Callable[[np.ndarray], np.ndarray]:
    """A function that turns uint8 images into the input of a file."""

    def prepare(images: np.ndarray) -> np.ndarray:
        if options.normalised:
            images = np.asarray(normalise(jnp.asarray(images), student.mean, student.std))
        return images.transpose(0, 3, 1, 2) if options.layout == "nchw" else images

    return prepare


def _onnx(student: Student, options: Options, sets: Sequence[Judged]) -> tuple[bytes, dict[str, Any]]:
    """The content of an ONNX file, and the fields of `Exported` that its check found."""
    _need("onnx", "onnxruntime", extra="onnx")
    from hast_jax.deliver import onnx_check, onnx_export, onnx_graph

    shape: dict[str, Any] = {"layout": options.layout, "normalised": options.normalised}
    int4 = options.weights == "int4"
    if int4 and options.operators == "integer":
        raise InputError("integer operators take int8 weights: leave out weights=int4 or operators=integer.")
    try:
        built = onnx_export.build(student, **shape, operators=options.operators, int4=int4)
        run = onnx_check.session(built.model)
        float_model, _ = onnx_export.build(_in_float32(student), **shape)
        float_run = onnx_check.session(float_model)
    except UserError:
        raise
    except Exception as error:  # of ONNX or onnxruntime, which refuse an operation on values of some types
        raise onnx_graph.cannot_write(sentence(error)) from error
    prepare = _prepared(student, options)
    few = sets[0].images[: 64 if max(student.image[:2]) <= 64 else 8]
    found = onnx_check.integers(built, prepare(few))
    timed = comparison.milliseconds([run, float_run], prepare(sets[0].images[:1]))
    return built.model.SerializeToString(), {
        "float_bytes": float_model.ByteSize(),
        "comparisons": comparison.compare(student, lambda images: run(prepare(images)), sets),
        "layers": _different_integers(student, few, found),
        "operators": onnx_check.operators(built.model),
        "milliseconds": timed[0],
        "float_milliseconds": timed[1],
    }


def _different_integers(student: Student, images: np.ndarray, found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Name of a quantized activation -> share of its integers that differ from the student's. found: the file's integers."""
    ranges = flatten_dict(student.variables["ranges"])
    _, taps = networks.apply(student.network, student.variables, normalise(jnp.asarray(images), student.mean, student.std))
    shares = {}
    for site in student.network.sites.values():
        name = "/".join(site.name)
        if name not in found:
            continue
        step, lowest = activation_grid(student.network, ranges[*site.name, "low"], ranges[*site.name, "high"], site.bits)
        own = np.rint(np.asarray(taps.activations[site.name], np.float64) / step) + max(0, -lowest)
        shares[name] = float(np.mean(own != found[name]))
    return {name: shares[name] for name in found if name in shares}


def _stablehlo(student: Student, options: Options, sets: Sequence[Judged]) -> tuple[bytes, dict[str, Any]]:
    """The content of a StableHLO file for `jax_export.deserialize`, and the fields of `Exported` that its check found."""
    (batch,) = jax_export.symbolic_shape("n")
    given = jax.ShapeDtypeStruct((batch, *student.image), np.float32 if options.normalised else np.uint8)

    def written(student: Student) -> bytes:
        network = dataclasses.replace(student.network, fast_convolution=False)

        def logits(images: jax.Array) -> jax.Array:
            images = images if options.normalised else normalise(images, student.mean, student.std)
            return networks.logits(network, student.variables, images)

        with jax.default_matmul_precision("float32"):  # on every platform: an accelerator would round the operands by default
            return bytes(jax_export.export(jax.jit(logits), platforms=PLATFORMS)(given).serialize())

    try:
        content = written(student)
    except UserError:
        raise
    except Exception as error:  # from code that needs the number of images during tracing, such as len(images)
        words = sentence(error)
        raise InputError(f"the network cannot be traced for any number of images ({words}): use images.shape[0].") from error
    program = jax_export.deserialize(bytearray(content))
    prepare = _prepared(student, options)
    compared = comparison.compare(student, lambda images: np.asarray(program.call(prepare(images))), sets)
    return content, {"float_bytes": len(written(_in_float32(student))), "comparisons": compared}


def _litert(student: Student, options: Options, sets: Sequence[Judged]) -> tuple[bytes, dict[str, Any]]:
    """The content of a LiteRT file, and the fields of `Exported` that its check found."""
    _need("litert_converter", "ai_edge_litert", extra="litert")
    from hast_jax.deliver import litert_export

    content = litert_export.build(student, normalised=options.normalised)
    float_content = litert_export.build(_in_float32(student), normalised=options.normalised)
    prepare = _prepared(student, options)
    ran: list[litert_export.Found] = []

    def judge(images: np.ndarray) -> np.ndarray:
        ran.append(litert_export.run(prepare(images).astype(np.float32), content, float_content))
        return ran[-1].logits

    compared = comparison.compare(student, judge, comparison.fewer(sets))  # the file takes one image at a time
    return content, {
        "float_bytes": len(float_content),
        "comparisons": compared,
        "operators": ran[0].operators,
        "milliseconds": min(each.milliseconds[0] for each in ran),
        "float_milliseconds": min(each.milliseconds[1] for each in ran),
    }


def _safetensors(student: Student, options: Options, _: Sequence[Judged]) -> tuple[bytes, dict[str, Any]]:
    """The content of a safetensors file, and the fields of `Exported`. Its kernels are compared with the student's codes."""
    kernels = student.codes()
    for name, codes in kernels.items():
        if np.abs(codes.integers).max() > np.iinfo(np.int32).max:
            raise UserError(
                f"the integers of {name} do not fit into 32 bits, because an output channel has nearly equal weights: leave "
                "this layer in full precision, by a rule."
            )
    content = integers.build(student, packed=options.weights == "packed")
    for name, codes in kernels.items():
        if not np.allclose(integers.kernel(content, name), codes.integers / codes.spread("scale"), rtol=1e-6, atol=0):
            raise UserError(f"the file would not give the weights of {name}: export the student in another format.")
    sizes = [leaf.size for leaf in jax.tree.leaves({**student.variables, "ranges": {}})]
    return content, {"float_bytes": 4 * sum(sizes)}


def _need(*packages: str, extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this format needs {' and '.join(missing)}: {pip_install(extra)}.")


FORMATS = {
    "onnx": Format(
        ".onnx",
        {
            "weights": ("int8", "int4"),
            "operators": ("float", "exact", "integer"),
            "layout": ("nhwc", "nchw"),
            "normalised": (False, True),
        },
        _onnx,
    ),
    "litert": Format(".tflite", {"normalised": (False, True)}, _litert),
    "safetensors": Format(".safetensors", {"weights": ("int8", "packed")}, _safetensors),
    "stablehlo": Format(".stablehlo", {"normalised": (False, True)}, _stablehlo),
}
