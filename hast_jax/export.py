"""Write the student of a run folder to a file that other programs run, and check the file by running it.

python -m hast_jax.export --workdir=runs/c100-w3a3 --format=onnx
"""

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hast_jax import cli, from_config, paths, student
from hast_jax import config as config_lib
from hast_jax.data import datasets
from hast_jax.deliver.exports import FORMATS, Exported, Options, export
from hast_jax.errors import Notice, UserError
from hast_jax.runs import parallel, run_folder

MOST_SYNTHETIC = 1024  # images on which the file and the student are compared
MOST_BYTES = 2**30  # of real images: some 7,000 of ImageNet's, and all of CIFAR's


def define_flags() -> None:
    """Define the flags of this command."""
    default = Options()
    cli.define_workdir("Folder of a finished run.")
    flags.DEFINE_enum("format", "onnx", list(FORMATS), "Format of the file.")
    flags.DEFINE_string(
        "output",
        None,
        "The file to write. By default it lies in the run's folder and is called student, with the options: student-int4.onnx.",
    )
    flags.DEFINE_enum("weights", default.weights, ["int8", "int4", "packed"], "int4 is for onnx, packed for safetensors.")
    flags.DEFINE_enum(
        "operators",
        default.operators,
        ["float", "exact", "integer"],
        "How an onnx file computes. float: on dequantized integers. exact: on integers as floats, so that no sum is rounded. "
        "integer: on integers.",
    )
    flags.DEFINE_enum("layout", default.layout, ["nhwc", "nchw"], "Layout of the images that an onnx file takes.")
    flags.DEFINE_bool("normalised", default.normalised, "The file takes float32 images that are normalised already.")
    cli.define_real_images()
    flags.DEFINE_string("network", None, "FILE.py:NAME of your own network. Its code is run.")


def run(
    workdir: Path,
    format: str = "onnx",
    output: Path | None = None,
    *,
    real: Mapping[str, Any] = {},
    network: str | None = None,
    **options: Any,
) -> Exported:
    """Export the student of a finished run. Raises UserError.

    real: values of config.eval that take the place of the run's, such as {"data_dir": DIR}. They name the real images on which
    the file is checked. network: FILE.py:NAME of the user's network, if the run has one. It must be given, because code that
    only a run folder names may be a stranger's and is never run. options: those of `deliver.exports.Options`.
    """
    folder, config = run_folder.open_for_reading(workdir)
    if folder.read_result() is None:
        raise UserError(f"the run in {workdir} has not finished: run its command again before the export.")
    from_config.trust(config, workdir, network, config.teacher.names, config.teacher.weights)  # the last two are not read
    found = student.load(folder.student, from_config.module(config))
    config.eval.update(real)
    config_lib.validate(config)
    if config.eval.dataset == "none" and set(real) - {"dataset"}:
        whose = "--dataset=none names none" if "dataset" in real else f"{workdir} was run without any"
        raise UserError(f"there are no real images, because {whose}: name a data set with --dataset.")
    path = output or workdir / _name(format, options)
    return export(found, path, format, images=_synthetic(folder, config), test=_real(config), **options)


def _name(format: str, options: Mapping[str, Any]) -> str:
    """The name of the file, which tells the options that are not the defaults, such as student-int4.onnx."""
    defaults = dataclasses.asdict(Options())
    chosen = [name if value is True else str(value) for name, value in options.items() if value != defaults.get(name)]
    return "-".join(["student", *chosen]) + FORMATS[format].suffix


def _synthetic(folder: run_folder.RunFolder, config: ConfigDict) -> np.ndarray | None:
    """Some of the synthetic images that the student learned from; None, with a warning, if there are none."""
    try:
        return np.asarray(folder.learned_images(config)[0][:MOST_SYNTHETIC])
    except UserError as error:
        warnings.warn(f"the file is checked on random images: {error}", Notice, stacklevel=1)
        return None


def _real(config: ConfigDict) -> tuple[Any, Any] | None:
    """Some of the run's real images and their labels; None if there are none on this machine."""
    try:
        dataset = datasets.load(config, config.eval.split)
    except UserError as error:
        warnings.warn(f"the file is not checked on real images: {error}", Notice, stacklevel=1)
        return None
    if dataset is None:
        return None
    count = min(len(dataset.labels), MOST_BYTES // math.prod(dataset.shape))
    rows = np.linspace(0, len(dataset.labels) - 1, count).astype(int)  # evenly, so that all classes are among them
    return dataset.read(rows), dataset.labels[rows]


def table(found: Exported, title: str) -> Table:
    """A table for the console of what an export found."""
    made = Table("", "the file", "float32", title=title, title_justify="left")
    made.add_row("size", f"{found.bytes:,} bytes", f"{found.float_bytes:,} bytes")
    if found.milliseconds is not None and found.float_milliseconds is not None:
        made.add_row("time for an image, one thread", f"{found.milliseconds:.2f} ms", f"{found.float_milliseconds:.2f} ms")
    for each in found.comparisons:
        rounded = "" if each.rounded is None else f"; rounding alone changes {each.rounded}"
        name = "synthetic images" if each.name == "images" else each.name
        made.add_row("another class than the student's", f"{each.different} of {each.images:,} {name}{rounded}", "")
        made.add_row("largest difference of a logit", f"{each.largest_difference:.2g}", "")
        if each.top1 is not None:
            made.add_row("top-1 of file and student", f"{each.top1:.2f} and {each.student_top1:.2f} %", "")
    if found.layers:
        worst = max(found.layers, key=lambda name: found.layers[name])
        share = found.layers[worst]
        made.add_row("other integers in a layer", f"at most {1e6 * share:.3g} of a million ({worst})" if share else "none", "")
    for kind in ("integer", "between", "float"):
        names = ", ".join(f"{number} {name}" for name, of, number in found.operators if of == kind)
        if names:
            made.add_row(f"operators, {kind}", names, "")
    return made


def main(_: list[str]) -> None:
    """Export a run folder."""
    with cli.user_errors():
        given = flags.FLAGS
        parallel.setup(1)
        workdir = paths.local(given.workdir)
        output = paths.local(given.output) if given.output else None
        options = {name: given[name].value for name in Options.__dataclass_fields__}
        found = run(workdir, given.format, output, real=cli.real_images(), network=given.network, **options)
        Console().print(table(found, escape(f"{found.path}")))


cli.make_callable(__name__, export)

if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
