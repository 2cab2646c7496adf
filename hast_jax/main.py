"""Quantize a network without its data.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3

The same command resumes a run that was stopped or killed.
"""

import functools
import shlex
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
    cli.define_workdir("Folder of the run. An unfinished run in it resumes.")
    cli.define_processes()


def main(_: list[str]) -> None:
    """Run the stages and show the result."""
    with cli.user_errors(resumes=True):
        cli.join()
        preemption.listen()
        config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
        config_lib.validate(config)
        parallel.setup(config.devices, config.finetune.batch)
        console = Console(quiet=not processes.is_main())
        say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)  # lines to copy, as they are
        with Bar(console) as progress:
            result = pipeline.run(config, paths.local(workdir), progress)
        show_result(console, result)
        if config.report and (paths.local(workdir) / "report.html").exists():
            say(f"report: {workdir}/report.html")
        network = from_config.own_code(config).get("network")
        flags_of_export = [f"--workdir={workdir}", "--format=onnx", *([f"--network={network}"] if network else [])]
        say(f"export: python -m hast_jax.export {shlex.join(flags_of_export)}")


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
