"""Measure every table and figure of the paper's supplement, the baselines, and the parts of the recipe `best`.

    python -m hast_jax.reproduce table2 --config=configs/cifar10.py:w3a3 --workdir=runs/table2
    python -m hast_jax.reproduce all --config=configs/digits.py        # the supplement, in runs/reproduction
    python -m hast_jax.reproduce recipe --config=configs/cifar100.py:w3a3,best,small --workdir=runs/recipe
    python -m hast_jax.reproduce table2 table4 --skip="a=1, b=4" --skip="a=1, b=2" --config=...

The same command resumes a sweep that was killed, and tries a failed cell again. WORKDIR holds NAME.md and NAME.json of each
experiment, and NAME.png and NAME.svg of each figure. After several experiments it also holds the page reproduction.md.
"""

import functools
import sys
import traceback
from collections.abc import Collection, Sequence

from absl import flags
from rich.console import Console

from hast_jax import cli, paths
from hast_jax import config as config_lib
from hast_jax.deliver.console import Bar
from hast_jax.errors import UserError, sentence
from hast_jax.kinds import close
from hast_jax.paper import figure2, tables
from hast_jax.paper.experiments import EXPERIMENTS
from hast_jax.paper.sweep import Sweep
from hast_jax.paper.tables import Section
from hast_jax.runs import parallel, preemption
from hast_jax.runs.files import write_json, write_text

FIGURES = {"figure2a": figure2.gradient_angles, "figure2b": figure2.hessian_spectra}
TAKES_WORDS = True
NAMES = [*EXPERIMENTS, *FIGURES]
SUPPLEMENT = [name for name in NAMES if name != "recipe"]


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_config()
    cli.define_workdir("Folder of the sweep. An unfinished sweep in it resumes.", "runs/reproduction")
    flags.DEFINE_integer("seeds", 1, "Number of seeds of each cell. The first seed is config.seed.", lower_bound=1)
    flags.DEFINE_multi_string("skip", [], "Label of a cell to leave out. The flag may be given several times.")


def table(name: str, sweep: Sweep, skip: Collection[str]) -> Section:
    """Run the cells of an experiment, except those whose label is in `skip`."""
    experiment = EXPERIMENTS[name](sweep.config)
    experiment = experiment._replace(cells=[cell for cell in experiment.cells if cell.label not in skip])
    results = {cell.label: sweep.run(cell) for cell in experiment.cells}
    section = tables.section(experiment, results, sweep.config)
    if name == "figure1" and tables.draw_sensitivity(section.data["rows"], sweep.workdir / name):
        return section.with_picture(f"{name}.png")
    return section


def run(names: Sequence[str], sweep: Sweep, skip: Collection[str] = ()) -> str:
    """Run these experiments, except cells whose label is in `skip`; write and return the Markdown.

    Raises UserError if a label belongs to no cell, or if an experiment has no other cells. SIGTERM ends the process between two
    experiments, cells or steps.
    """
    labels = {name: {cell.label for cell in EXPERIMENTS[name](sweep.config).cells} for name in names if name in EXPERIMENTS}
    known = set[str]().union(*labels.values())
    if unknown := set(skip) - known:
        there = "; ".join(sorted(known)) or "none, because figures have no cells"
        raise UserError(f"--skip={min(unknown)}: no cell has this label; there are: {there}.")
    if empty := [name for name, its in labels.items() if its <= set(skip)]:
        raise UserError(f"--skip leaves no cell of {empty[0]}: leave out {empty[0]} itself.")
    devices = parallel.choose(sweep.config.devices, sweep.config.finetune.batch)
    context = tables.context(sweep, devices)
    sections = {}
    for each in names:
        preemption.check()
        traceback_file = sweep.workdir / f"{each}.error.txt"
        try:
            section = FIGURES[each](sweep) if each in FIGURES else table(each, sweep, skip)
        except Exception as error:  # the other experiments can still be run
            if len(names) == 1:
                raise
            sweep.failed.append(each)
            write_text(traceback_file, traceback.format_exc())
            section = Section(each, f"Not measured: {sentence(error)}", {})
        else:
            traceback_file.unlink(missing_ok=True)
        sections[each] = section
        write_json(sweep.workdir / f"{each}.json", {"title": section.title, "context": context, **section.data})
        write_text(sweep.workdir / f"{each}.md", f"# {section.title}\n\n{context}\n\n{section.body}\n")
    if len(names) > 1:
        page = tables.page(sections, sweep, context)
        write_text(sweep.workdir / "reproduction.md", page)
        return page
    return (sweep.workdir / f"{names[0]}.md").read_text()


def main(arguments: list[str]) -> None:
    """Run the experiments that the arguments name; exit status 1 if a cell failed."""
    with cli.user_errors(resumes=True):
        names = SUPPLEMENT if arguments[1:] == ["all"] else arguments[1:]
        if not names:
            raise UserError(f"name one or several experiments of: {', '.join(NAMES)}; or all.")
        if unknown := [name for name in names if name not in NAMES]:
            advice = "all stands alone" if "all" in unknown else f"choose from {', '.join(NAMES)}; or all"
            raise UserError(f"there is no experiment {unknown[0]!r}{close(unknown[0], NAMES)}: {advice}.")
        preemption.listen()
        given, console = flags.FLAGS, Console()
        config_lib.validate(given.config)
        parallel.setup(given.config.devices, given.config.finetune.batch)
        say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
        with Bar(console if console.is_terminal else Console(quiet=True)) as progress:
            sweep = Sweep(given.config, paths.local(given.workdir), given.seeds, progress, say)
            page = run(names, sweep, given.skip)
        say(page)
        if sweep.failed:
            raise UserError(
                f"failed: {', '.join(sweep.failed)}; in {sweep.workdir}, error.txt of a cell or NAME.error.txt of an "
                "experiment says why; the same command tries them again."
            )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
