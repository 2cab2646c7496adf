"""A Markdown table of finished runs, from their `result.json` files: how that of docs/results.md is made.

python -m hast_jax.results runs/c100-w3a3 runs/c100-w4a4
"""

import sys
from pathlib import Path
from typing import Any

from hast_jax import cli
from hast_jax.deliver.console import format_bits, format_images, format_seconds
from hast_jax.errors import UserError
from hast_jax.runs.files import read_json

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
    """The table of these run folders, and a line for each that has no accuracies. Raises UserError where none has."""
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


def define_flags() -> None:
    """This command has none."""


def main(arguments: list[str]) -> None:
    """Print the table."""
    with cli.user_errors():
        if len(arguments) < 2:
            raise UserError("give one or more run folders: python -m hast_jax.results runs/*.")
        print(table([Path(argument) for argument in arguments[1:]]))


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
