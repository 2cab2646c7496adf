"""Stage 4, evaluation of a run folder: top-1 of the teacher and of the student, on real images.

python -m hast_jax.evaluate --workdir=runs/c100-w3a3
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hast_jax import cli, from_config, library, networks, paths, pipeline
from hast_jax import config as config_lib
from hast_jax.data import datasets
from hast_jax.deliver.console import Bar, format_bits
from hast_jax.errors import UserError
from hast_jax.runs import parallel, processes, run_folder
from hast_jax.runs.files import crc32
from hast_jax.runs.progress import Progress, silent
from hast_jax.stages.evaluate import Accuracy, evaluator


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_workdir("Folder of a run.")
    flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which student; best was selected on test data.")
    cli.define_real_images()
    cli.define_own_network()
    flags.DEFINE_integer("devices", 0, "Local devices that are used. 0: the default, as for config.devices.", lower_bound=0)
    cli.define_processes()


class Found(NamedTuple):
    """What an evaluation found: the accuracies, and a table of them for the console."""

    teacher: Accuracy
    student: Accuracy
    table: Table


def run(
    workdir: Path,
    checkpoint: str = "latest",
    devices: int = 1,
    progress: Progress = silent,
    *,
    real: Mapping[str, Any] = {},
    network: str | None = None,
    names: str | None = None,
    weights: str | None = None,
) -> Found:
    """The accuracies of the teacher and the student of a run folder. Raises UserError.

    real: values of config.eval that take the place of the run's, such as {"data_dir": DIR}. weights: another path of the same
    weights. network, names: FILE.py:NAME and FILE.py:FUNCTION of the user, if the run has them. They must be given, because
    code that only a run folder names may be a stranger's and is never run.
    """
    with processes.failing_as_one():
        folder, config = run_folder.open_for_reading(workdir)
        from_config.trust(config, workdir, network, names, weights)
        teacher, variables = from_config.teacher(config)
        student = from_config.student(config)
        if checkpoint == "best" and config.eval.dataset == "none":
            raise UserError(f"{workdir} has no best student, because its run had no real images: use --checkpoint=latest.")
        images = _real_images(config, real, workdir)
        folder.check_teacher(variables, teacher.structure.program, remember=False)
    processes.require_same(
        {
            "config": config_lib.checksum(config),
            "weights": crc32(variables),
            "number of devices": devices,
            "real images": pipeline.checksum(images) or 0,
        }
    )
    student_variables, steps = pipeline.restore_student(folder, variables, config, checkpoint, student)
    processes.require_same({"student": crc32(student_variables)})

    def judge(network):
        return evaluator(partial(networks.logits, network), images, config, devices, progress)

    full, quantized = judge(teacher)(variables), judge(student)(student_variables)
    judged_on = f"{len(images.labels)} images, {config.eval.dataset} {config.eval.split}"
    table = Table("", "top-1 %", "drop", "top-5 %", title=escape(f"{config.teacher.network} on {judged_on}"))
    table.add_row("full precision (teacher)", f"{full.top1:.2f}", "", f"{full.top5:.2f}")
    name = f"{format_bits(config.bits)} student, {checkpoint}, after {steps} steps"
    table.add_row(escape(name), f"{quantized.top1:.2f}", f"{full.top1 - quantized.top1:.2f}", f"{quantized.top5:.2f}")
    return Found(full, quantized, table)


def _real_images(config: ConfigDict, real: Mapping[str, Any], workdir: Path) -> datasets.Dataset:
    """The images of `config.eval`, in which `real` takes the place of the run's values. Raises UserError if there are none."""
    config.eval.update(real)
    config.synthesis.real_split = ""  # the student may also be judged on the images that it learned from
    config_lib.validate(config)
    images = datasets.load(config, config.eval.split)
    if images is None:
        whose = "--dataset=none names none" if "dataset" in real else f"{workdir} was run without any"
        raise UserError(f"there are no real images, because {whose}: name a data set with --dataset.")
    return images


def main(_: list[str]) -> None:
    """Evaluate a run folder."""
    with cli.user_errors():
        cli.join()
        given = flags.FLAGS
        devices = parallel.setup(given.devices)
        console = Console(quiet=not processes.is_main())
        with Bar(console) as progress:
            own = cli.own_network()
            found = run(paths.local(given.workdir), given.checkpoint, devices, progress, real=cli.real_images(), **own)
        console.print(found.table)


cli.make_callable(__name__, library.evaluate)

if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
