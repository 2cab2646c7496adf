"""A Markdown table of finished runs, from their `result.json` files, such as the table in docs/results.md.

python -m hast_jax.results runs/c100-w3a3 runs/c100-w4a4
python -m hast_jax.results runs/c100-w3a3 --over_time=over_time      # top-1 over the time of the whole job, and a figure
"""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from hast_jax import cli, paths
from hast_jax.deliver.console import format_bits, format_images, format_seconds, markdown_row
from hast_jax.errors import UserError
from hast_jax.kinds import parse_json
from hast_jax.runs.progress import read_metrics
from hast_jax.runs.run_folder import CELLS

HEADER = (
    "| network, data | bits | settings | teacher | no fine-tuning | last epoch | drop | best epoch* "
    "| seed | synthesis | steps x batch | time, hardware |"
)
TAKES_WORDS = True
# Fields that do not change the student, or have a column of their own.
NO_SETTINGS = ("config.eval.", "config.seed", "config.devices", "config.report", "config.log_every", "config.steps_per_call")
SAME_TEACHER = 0.05  # points of top-1 by which devices may differ


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table. name: of the run, before its settings. Accuracies are top-1 in per cent."""
    settings = settings_of(result)
    drop = result["teacher"] - result["last"]
    cells = [
        f"{result['network']}, {result['dataset']}",
        format_bits(result["bits"]),
        f"{name}: {settings}" if settings else name,
        f"{result['teacher']:.2f}",
        f"{result['no_finetuning']:.2f}",
        f"{result['last']:.2f}",
        f"{drop:.2f}",
        f"{result['best']:.2f} ({result['best_epoch']})",
        str(result["seed"]),
        format_images(result),
        f"{result['steps']:,} x {result['batch']}",
        f"{format_seconds(sum(result['seconds'].values()))}, {result['hardware']}",
    ]
    return markdown_row(cells)


def table(folders: list[Path]) -> str:
    """The table of these run folders, and a line for each folder without accuracies. Raises UserError if no folder has any."""
    rows, notes = [], []
    for folder, name in zip(folders, _labels(folders)):
        try:
            rows.append(row(name, result_of(folder)))
        except UserError as error:
            notes.append(str(error))
    if not rows:
        raise UserError(_one_sentence(notes))
    return "\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1), *rows, "", "\\* selected on test data.", *notes])


def settings_of(result: dict[str, Any]) -> str:
    """The variants and fields that the run's command named, or the words of its call in Python; "" if no command is known."""
    command = next((each["command"] for each in reversed(result.get("segments", [])) if each.get("command")), "")
    if command.startswith("hast_jax."):
        return command.partition("..., ")[2].rstrip(")")
    words = []
    for word in shlex.split(command):
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config" and ":" in value:
            words.append(value.rpartition(":")[2])
        elif name.startswith("config.") and not name.startswith(NO_SETTINGS):
            words.append(f"{name.removeprefix('config.')}={value}")
    return "; ".join(words)


def _one_sentence(notes: list[str]) -> str:
    return "; ".join(note.removesuffix(".") for note in notes) + "."


def result_of(folder: Path) -> dict[str, Any]:
    """The result of a run with accuracies. Raises UserError if the folder has none, or none that can be read."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder.")
    path = folder / "result.json"
    if not path.exists() and (folder / CELLS).is_dir():
        raise UserError(f"{folder} is the folder of a sweep: give {folder / CELLS}/*.")
    if not path.exists():
        raise UserError(f"{folder} has no result.json: let its run finish.")
    try:
        result = parse_json(path.read_text())
        if result["teacher"] is not None:
            row("", result)  # raises if a field is missing or damaged
            if not all(math.isfinite(result[name]) for name in ("teacher", "no_finetuning", "last", "best")):
                raise ValueError("an accuracy is not a finite number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is left out, because it is damaged ({type(error).__name__}: {error}).") from error
    if result["teacher"] is None:
        raise UserError(f"{folder} was run without evaluation data: it has no accuracies.")
    return result


def over_time(folder: Path) -> list[tuple[float, float]]:
    """For each evaluation of a finished run: the seconds since the job's start, and the student's top-1.

    Raises UserError if the run's log is missing or damaged.
    """
    try:
        settings = parse_json((folder / "config.json").read_text())["finetune"]
        evaluations = {int(epoch): top1 for epoch, top1 in parse_json((folder / "evaluations.json").read_text()).items()}
        before, at = 0.0, {0: 0.0}
        for line in read_metrics(folder / "metrics.jsonl"):
            if line["stage"] == "finetune":
                at.setdefault(line["step"], line["seconds"])
        for stage, seconds in result_of(folder)["seconds"].items():
            before += seconds if stage != "finetune" else 0.0
        curve = [(before + at[epoch * settings["steps_per_epoch"]], top1) for epoch, top1 in sorted(evaluations.items())]
        if not curve or not all(math.isfinite(seconds) and math.isfinite(top1) for seconds, top1 in curve):
            raise ValueError("its evaluations are missing, or are no finite numbers")
        return curve
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is left out, because its log is not complete ({type(error).__name__}: {error}).") from error


def over_time_table(folders: list[Path], picture: Path) -> str:
    """A table of top-1 over time, of finished runs of one teacher. The figure is written to `picture`.png and .svg.

    Raises UserError if no run has accuracies, or if the teachers have different accuracies.
    """
    from hast_jax.paper import figures

    teachers, found, notes = {}, {}, []
    for folder in folders:
        try:
            teachers[folder], found[folder] = result_of(folder)["teacher"], over_time(folder)
        except UserError as error:
            notes.append(str(error))
    if not found:
        raise UserError(f"there is nothing to draw: {_one_sentence(notes)}")
    teacher = next(iter(teachers.values()))
    other = next((folder for folder, top1 in teachers.items() if abs(top1 - teacher) > SAME_TEACHER), None)
    if other is not None:
        words = f"{next(iter(teachers))} has a teacher of {teacher:.2f} %, {other} one of {teachers[other]:.2f} %"
        raise UserError(f"{words}: draw runs of one teacher.")
    curves = dict(zip(_labels(list(found)), found.values()))
    try:
        figures.over_time(curves, teacher, picture)
    except OSError as error:
        raise UserError(f"{picture} cannot be written: {error.strerror}; choose another path.") from error
    rows = [
        markdown_row([name, format_seconds(seconds), f"{top1:.2f}"])
        for name, curve in curves.items()
        for seconds, top1 in curve
    ]
    lines = ["| run | time of the whole job | top-1 |", "|---|---|---|", *rows]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _labels(folders: list[Path]) -> list[str]:
    """Names of the folders; if two have the same name, their paths below the last folder that holds them all."""
    whole = [folder.resolve() for folder in folders]
    names = [path.name for path in whole]
    if len(set(names)) < len(names):
        above = Path(os.path.commonpath(whole))
        above = above.parent if above in whole else above
        names = [str(path.relative_to(above)) for path in whole]
    return names


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
