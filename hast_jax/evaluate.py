"""Stage 4, evaluation of a run folder: top-1 of the teacher and of the student, on real images.

python -m hast_jax.evaluate --workdir=runs/c100-w3a3
"""

from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from hast_jax import cli, data, networks, parallel, pipeline, run_folder
from hast_jax.accuracy import Accuracy, make_evaluator
from hast_jax.errors import UserError
from hast_jax.models import own

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which student: best was selected on test data.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the images (eval.data_dir), where it is not the run's.")
NETWORK = flags.DEFINE_string("network", None, "FILE.py:CLASS of a network of your own, whose code is run.")
DEVICES = flags.DEFINE_integer("devices", 0, "Local devices used; 0: all.", lower_bound=0)


def run(
    workdir: Path, checkpoint: str, devices: int, data_dir: str | None, network: str | None, console: Console
) -> dict[str, Accuracy]:
    """Print and return the accuracy of teacher and student of a run folder. Raises UserError.

    A network of one's own must be named by `network`: code that a run folder names is never run, as it may be a stranger's.
    """
    folder, config = run_folder.open_for_reading(workdir)
    if network is not None:
        config.teacher.network = network
    elif own.is_own(config.teacher.network):
        name = config.teacher.network
        raise UserError(f"{workdir} names {name}, a network of its maker's own: if you trust its code, add --network={name}.")
    count = parallel.setup(devices)
    console.quiet = console.quiet or not parallel.is_main()
    name, split = config.eval.dataset, config.eval.split
    if data_dir is not None:
        config.eval.data_dir = data_dir
    dataset = data.load(config, split)
    if dataset is None:
        raise UserError(f"{workdir} was run with config.eval.dataset none: there is nothing to evaluate on.")
    teacher, variables = networks.teacher(config)
    folder.check_teacher(variables, remember=False)
    student_variables, steps = pipeline.restore_student(folder, variables, config, checkpoint)
    found = {
        "teacher": make_evaluator(teacher, dataset, config, count, console)(variables),
        "student": make_evaluator(networks.student(config), dataset, config, count, console)(student_variables),
    }
    bits = f"W{config.bits.weights}A{config.bits.activations}"
    table = Table(
        "", "top-1 %", "drop", "top-5 %", title=f"{config.teacher.network} on {len(dataset.labels)} images, {name} {split}"
    )
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
        run(Path(WORKDIR.value), CHECKPOINT.value, DEVICES.value, DATA_DIR.value, NETWORK.value, Console())


if __name__ == "__main__":
    cli.run(main)
