"""Quantize a network without its data.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3

The same command resumes a run that was stopped or killed.
"""

import sys

from absl import flags
from rich.console import Console

from hast_jax import cli, from_config, paths, pipeline
from hast_jax import config as config_lib
from hast_jax.deliver.console import Bar, show_result
from hast_jax.runs import parallel, preemption, processes


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run. An unfinished run in it resumes.", required=True)


def main(_: list[str]) -> None:
    """Run the stages and show the result."""
    with cli.user_errors():
        cli.join()
        preemption.listen()
        config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
        config_lib.validate(config)
        parallel.setup(config.devices, config.finetune.batch)
        console = Console(quiet=not processes.is_main())
        with Bar(console) as progress:
            result = pipeline.run(config, paths.local(workdir), progress)
        show_result(console, result)
        if config.report and (paths.local(workdir) / "report.html").exists():
            console.print(f"report: {workdir}/report.html")
        network = from_config.own_code(config).get("network")
        own = f" --network={network}" if network else ""
        console.print(f"export: python -m hast_jax.export --workdir={workdir} --format=onnx{own}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
