"""Stage 4, evaluation of a run folder: top-1 of the teacher and of the student, on real images.

python -m hast_jax.evaluate --workdir=runs/c100-w3a3
"""

from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from hast_jax import cli, pipeline
from hast_jax import config as config_lib
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.networks import from_config, user_files
from hast_jax.runs import parallel, run_folder
from hast_jax.stages.accuracy import Accuracy, make_evaluator

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which student: best was selected on test data.")
DATASET = flags.DEFINE_string("dataset", None, "Data set (eval.dataset), where it is not the run's.")
SPLIT = flags.DEFINE_string("split", None, "Its split (eval.split), where it is not the run's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the images (eval.data_dir), where it is not the run's.")
NETWORK = flags.DEFINE_string("network", None, "FILE.py:CLASS of a network of your own, whose code is run.")
DEVICES = flags.DEFINE_integer("devices", 0, "Local devices used; 0: all.", lower_bound=0)


def run(
    workdir: Path,
    checkpoint: str,
    devices: int,
    console: Console,
    *,
    dataset: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    network: str | None = None,
) -> dict[str, Accuracy]:
    """Print and return the accuracy of teacher and student of a run folder. Raises UserError.

    dataset, split, data_dir: instead of those of the run's config.
    A network of one's own must be named by `network`: code that a run folder names is never run, as it may be a stranger's.
    """
    folder, config = run_folder.open_for_reading(workdir)
    if network is not None:
        config.teacher.network = network
    elif user_files.is_own(config.teacher.network):
        name = config.teacher.network
        raise UserError(f"{workdir} names {name}, a network of its maker's own: if you trust its code, add --network={name}.")
    count = parallel.setup(devices)
    console.quiet = console.quiet or not parallel.is_main()
    chosen = {"dataset": dataset, "split": split, "data_dir": data_dir}
    config.eval.update({name: value for name, value in chosen.items() if value is not None})
    config_lib.validate(config)
    images = datasets.load(config, config.eval.split)
    if images is None:
        raise UserError(f"{workdir} was run with config.eval.dataset none: name a data set with --dataset.")
    teacher, variables = from_config.teacher(config)
    folder.check_teacher(variables, remember=False)
    student_variables, steps = pipeline.restore_student(folder, variables, config, checkpoint)
    found = {
        "teacher": make_evaluator(teacher, images, config, count, console)(variables),
        "student": make_evaluator(from_config.student(config), images, config, count, console)(student_variables),
    }
    bits = f"W{config.bits.weights}A{config.bits.activations}"
    judged_on = f"{len(images.labels)} images, {config.eval.dataset} {config.eval.split}"
    table = Table("", "top-1 %", "drop", "top-5 %", title=f"{config.teacher.network} on {judged_on}")
    full, quantized = found["teacher"], found["student"]
    table.add_row("full precision (teacher)", f"{full.top1:.2f}", "", f"{full.top5:.2f}")
    name, drop = f"{bits} student, {checkpoint}, after {steps} steps", full.top1 - quantized.top1
    table.add_row(name, f"{quantized.top1:.2f}", f"{drop:.2f}", f"{quantized.top5:.2f}")
    console.print(table)
    return found


def main(_: list[str]) -> None:
    """Evaluate a run folder."""
    with cli.user_errors():
        cli.join()
        data_set = {"dataset": DATASET.value, "split": SPLIT.value, "data_dir": DATA_DIR.value}
        run(Path(WORKDIR.value), CHECKPOINT.value, DEVICES.value, Console(), **data_set, network=NETWORK.value)


if __name__ == "__main__":
    cli.run(main)
