"""A Markdown table of finished runs, from their `result.json` files, such as the table in docs/results.md.

python -m hast_jax.results runs/c100-w3a3 runs/c100-w4a4
python -m hast_jax.results runs/c100-w3a3 --over_time=over_time      # top-1 over the time of the whole job, and a figure
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from hast_jax import cli, paths
from hast_jax.deliver.console import format_bits, format_images, format_seconds
from hast_jax.errors import UserError
from hast_jax.runs.files import read_json
from hast_jax.runs.progress import read_metrics

HEADER = (
    "| network, data | bits | settings | teacher | no fine-tuning | HAST, last epoch | drop | best epoch* "
    "| seed | synthesis | steps x batch | time, hardware |"
)


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table. Accuracies are top-1 in per cent."""
    drop = result["teacher"] - result["last"]
    cells = [
        f"{result['network']}, {result['dataset']}",
        format_bits(result["bits"]),
        name,
        f"{result['teacher']:.2f}",
        f"{result['no_finetuning']:.2f}",
        f"{result['last']:.2f}",
        f"{drop:.2f}",
        f"{result['best']:.2f} ({result['best_epoch']})",
        str(result["seed"]),
        format_images(result),
        f"{result['steps']} x {result['batch']}",
        f"{format_seconds(sum(result['seconds'].values()))}, {result['hardware']}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(folders: list[Path]) -> str:
    """The table of these run folders, and a line for each folder without accuracies. Raises UserError if no folder has any."""
    rows, notes = [], []
    for folder in folders:
        path = folder / "result.json"
        result = read_json(path) if path.exists() else None
        if result is None:
            notes.append(f"{folder} has no result.json: let its run finish.")
        elif result["teacher"] is None:
            notes.append(f"{folder} was run without evaluation data: it has no accuracies.")
        else:
            rows.append(row(folder.name, result))
    if not rows:
        raise UserError(" ".join(notes))
    return "\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1), *rows, "", "\\* selected on test data.", *notes])


def over_time(folder: Path) -> list[tuple[float, float]]:
    """For each evaluation of a finished run: the seconds since the job's start, and the student's top-1."""
    settings = read_json(folder / "config.json")["finetune"]
    evaluations = {int(epoch): top1 for epoch, top1 in read_json(folder / "evaluations.json").items()}
    before, at = 0.0, {0: 0.0}
    for line in read_metrics(folder / "metrics.jsonl"):
        if line["stage"] == "finetune":
            at.setdefault(line["step"], line["seconds"])
    for stage, seconds in read_json(folder / "result.json")["seconds"].items():
        before += seconds if stage != "finetune" else 0.0
    return [(before + at[epoch * settings["steps_per_epoch"]], top1) for epoch, top1 in sorted(evaluations.items())]


def over_time_table(folders: list[Path], picture: Path) -> str:
    """A table of top-1 over time, of finished runs of one teacher. The figure is written to `picture`.png and .svg.

    Raises UserError if no run has accuracies.
    """
    from hast_jax.paper import figures

    results = {folder: read_json(folder / "result.json") for folder in folders if (folder / "result.json").exists()}
    teachers = {folder: found["teacher"] for folder, found in results.items() if found["teacher"] is not None}
    if not teachers:
        raise UserError("none of these run folders is finished and has accuracies: there is nothing to draw.")
    unique = len({folder.name for folder in teachers}) == len(teachers)
    curves = {folder.name if unique else str(folder): over_time(folder) for folder in teachers}
    figures.over_time(curves, next(iter(teachers.values())), picture)
    rows = [f"| {name} | {format_seconds(seconds)} | {top1:.2f} |" for name, curve in curves.items() for seconds, top1 in curve]
    lines = ["| run | time of the whole job | top-1 |", "|---|---|---|", *rows]
    left_out = [folder for folder in folders if folder not in teachers]
    notes = [f"{folder} is left out, because its run has not finished or has no accuracies." for folder in left_out]
    return "\n".join([*lines, "", *notes] if notes else lines)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string(
        "over_time", "", "Print top-1 over the time of the whole job, and draw it to this path (.png and .svg)."
    )


def main(arguments: list[str]) -> None:
    """Print the table."""
    with cli.user_errors():
        if len(arguments) < 2:
            raise UserError("give one or more run folders: python -m hast_jax.results runs/*.")
        folders = [paths.local(argument) for argument in arguments[1:]]
        picture = flags.FLAGS.over_time
        print(over_time_table(folders, paths.local(picture)) if picture else table(folders))


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
