"""Write report.html and README.md of a finished run again, for example to suggest bits by layer for another average.

python -m hast_jax.report --workdir=runs/c100-w3a3 --average_bits=4
"""

import sys
from pathlib import Path

from absl import flags

from hast_jax import cli, from_config, paths, student
from hast_jax.deliver import report
from hast_jax.errors import UserError
from hast_jax.method.quantizer import MAX_BITS, MIN_BITS
from hast_jax.runs import parallel, run_folder


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_workdir("Folder of a finished run.")
    flags.DEFINE_float("average_bits", None, "Average bits of a weight in the suggested bits by layer.", MIN_BITS, MAX_BITS)
    cli.define_own_network()


def run(
    workdir: Path,
    average_bits: float | None = None,
    *,
    network: str | None = None,
    names: str | None = None,
    weights: str | None = None,
) -> Path:
    """Write the report of a finished run; returns the path of report.html. Raises UserError.

    weights: another path of the same weights. network, names: FILE.py:NAME and FILE.py:FUNCTION of the user, if the run has
    them. They must be given, because code that only a run folder names may be a stranger's and is never run.
    """
    if average_bits is not None and not MIN_BITS <= average_bits <= MAX_BITS:
        raise UserError(f"--average_bits={average_bits}: give a number from {MIN_BITS} to {MAX_BITS}.")
    folder, config = run_folder.open_for_reading(workdir)
    from_config.trust(config, workdir, network, names, weights)
    if folder.read_result() is None:
        raise UserError(f"the run in {workdir} has not finished: run its command again.")
    teacher, variables = from_config.teacher(config)
    folder.check_teacher(variables, teacher.structure.program, remember=False)
    images, _ = folder.learned_images(config)
    report.write(folder, student.load(folder.student, teacher.module), (teacher, variables), images, average_bits)
    return folder.report


def main(_: list[str]) -> None:
    """Write the report of a run folder."""
    with cli.user_errors():
        given = flags.FLAGS
        parallel.setup(1)
        path = run(paths.local(given.workdir), given.average_bits, **cli.own_network())
        print(path)


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
