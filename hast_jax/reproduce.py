"""Every table and figure of the paper's supplement, and the baselines.

    python -m hast_jax.reproduce table2 --config=configs/cifar10.py:w3a3 --workdir=runs/table2
    python -m hast_jax.reproduce all --config=configs/digits.py --workdir=runs/reproduction

The same command goes on where a killed sweep was; a cell that failed is tried again. WORKDIR then holds NAME.md and
NAME.json for each experiment, NAME.png and NAME.svg for each figure, and after `all` the page reproduction.md.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from hast_jax import cli, data, figure2, parallel, preemption, tables
from hast_jax.errors import UserError
from hast_jax.experiments import EXPERIMENTS
from hast_jax.files import write_json, write_text
from hast_jax.sweep import Sweep
from hast_jax.tables import Section

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, with a variant after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep: made, or gone on in.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds of each cell, from config.seed on.", lower_bound=1)


def table(name: str, sweep: Sweep) -> Section:
    """Run the cells of an experiment."""
    experiment = EXPERIMENTS[name](sweep.config)
    results = {cell.label: sweep.run(cell) for cell in experiment.cells}
    section = tables.section(experiment, results, sweep.config)
    if name == "figure1":
        tables.draw_sensitivity(section.data["rows"], sweep.workdir / name)
        return section.with_picture(f"{name}.png")
    return section


SECTIONS: dict[str, Callable[[Sweep], Section]] = {
    **{name: partial(table, name) for name in EXPERIMENTS},
    "figure2a": figure2.gradient_angles,
    "figure2b": figure2.hessian_spectra,
}


def run(name: str, sweep: Sweep) -> str:
    """Run one experiment, or all; write and return the Markdown. Raises UserError where nothing can be compared."""
    parallel.setup(sweep.config.devices, sweep.config.finetune.batch)
    dataset = data.load(sweep.config, sweep.config.eval.split)
    if dataset is None:
        raise UserError("a table needs accuracies: set config.eval.dataset to the data set of the teacher.")
    context = tables.context(sweep, len(dataset.labels))
    sections = {}
    for each in SECTIONS if name == "all" else [name]:
        try:
            section = SECTIONS[each](sweep)
        except Exception as error:  # the other experiments can still be run
            if name != "all":
                raise
            sweep.failed.append(each)
            section = Section(each, f"Not measured: {error}", {})
        sections[each] = section
        write_json(sweep.workdir / f"{each}.json", {"title": section.title, "context": context, **section.data})
        write_text(sweep.workdir / f"{each}.md", f"# {section.title}\n\n{context}\n\n{section.body}\n")
    if name == "all":
        page = tables.page(sections, sweep, context, len(dataset.labels))
        write_text(sweep.workdir / "reproduction.md", page)
        return page
    return (sweep.workdir / f"{name}.md").read_text()


def main(arguments: list[str]) -> None:
    """Run what the first argument names; exit status 1 where a cell failed."""
    with cli.user_errors():
        known = [*SECTIONS, "all"]
        if len(arguments) != 2 or arguments[1] not in known:
            raise UserError(f"name one experiment of: {', '.join(known)}.")
        cli.join(together=False)
        preemption.listen()
        console = Console()
        sweep = Sweep(CONFIG.value, Path(WORKDIR.value), SEEDS.value, console)
        console.print(run(arguments[1], sweep), markup=False, highlight=False, soft_wrap=True)
        if sweep.failed:
            raise UserError(
                f"failed: {', '.join(sweep.failed)} (see error.txt in {sweep.workdir}/cells); "
                "the same command tries them again."
            )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
