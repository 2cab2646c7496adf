"""Every table and figure of the paper's supplement, and the baselines.

    python -m hast_jax.reproduce table2 --config=configs/cifar10.py:w3a3 --workdir=runs/table2
    python -m hast_jax.reproduce all --config=configs/digits.py --workdir=runs/reproduction

The same command goes on where a killed sweep was; a cell that failed is tried again. WORKDIR then holds NAME.md and
NAME.json for each table, NAME.png and NAME.svg for each figure, and `all` also writes the page reproduction.md.
"""

from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from hast_jax import cli, data, figure2, networks, tables
from hast_jax.errors import UserError
from hast_jax.experiments import EXPERIMENTS
from hast_jax.files import write_json, write_text
from hast_jax.sweep import Sweep

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, with a variant after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep: made, or gone on in.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds of each cell, from config.seed on.", lower_bound=1)

Section = Callable[[Sweep, str], str]


def table(sweep: Sweep, name: str) -> str:
    """Run an experiment of `EXPERIMENTS`; write its JSON and return its Markdown."""
    experiment = EXPERIMENTS[name](sweep.config)
    results = {cell.label: sweep.run(cell) for cell in experiment.cells}
    rows = tables.rows(experiment, results, sweep.config)
    write_json(sweep.workdir / f"{name}.json", {"title": experiment.title, "rows": rows})
    text = tables.markdown(experiment.title, rows)
    if name == "figure1":
        tables.draw_sensitivity(rows, sweep.workdir / name)
        text += f"\n![{experiment.title}]({name}.png)\n"
    return text


SECTIONS: dict[str, Section] = {
    **dict.fromkeys(EXPERIMENTS, table),
    "figure2a": figure2.gradient_angles,
    "figure2b": figure2.hessian_spectra,
}


def run(name: str, sweep: Sweep) -> str:
    """Run one experiment, or all; write and return the Markdown. Raises UserError where nothing can be compared."""
    dataset = data.load(sweep.config.eval.dataset, sweep.config.eval.split, sweep.config.eval.data_dir)
    if dataset is None:
        raise UserError("a table needs accuracies: set config.eval.dataset to the data set of the teacher.")
    networks.teacher(sweep.config)
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    names = list(SECTIONS) if name == "all" else [name]
    texts = []
    for each in names:
        text = SECTIONS[each](sweep, each)
        write_text(sweep.workdir / f"{each}.md", text)
        texts.append(text)
    if name == "all":
        page = tables.page(texts, sweep, len(dataset.labels))
        write_text(sweep.workdir / "reproduction.md", page)
        return page
    return texts[0]


def main(arguments: list[str]) -> None:
    """Run what the first argument names."""
    with cli.user_errors():
        known = [*SECTIONS, "all"]
        if len(arguments) != 2 or arguments[1] not in known:
            raise UserError(f"name one experiment of: {', '.join(known)}.")
        console = Console()
        text = run(arguments[1], Sweep(CONFIG.value, Path(WORKDIR.value), SEEDS.value, console))
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
