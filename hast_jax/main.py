"""Quantize a network without its data.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3

The same command goes on where a killed run was.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from hast_jax import cli, pipeline
from hast_jax.runs import preemption
from hast_jax.runs.report import show_result

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, with a variant after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: made, or gone on in.", required=True)


def main(_: list[str]) -> None:
    """Run the stages."""
    with cli.user_errors():
        cli.join()
        preemption.listen()
        console = Console()
        show_result(console, pipeline.run(CONFIG.value, Path(WORKDIR.value), console))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
