"""What the commands show of a run's progress."""

import io
import re

from rich.console import Console

from hast_jax.deliver.console import Bar
from hast_jax.runs.progress import Update


def test_an_evaluation_within_a_stage_has_a_bar_of_its_own() -> None:
    terminal = io.StringIO()
    with Bar(Console(file=terminal, force_terminal=True, width=100)) as progress:
        for done in (0, 50, 100):
            progress(Update("finetune", done, 200, done / 10, {"loss": 3.0}))
            progress(Update("evaluate", 3, 7, 0.0, {}))
            progress(Update("evaluate", 7, 7, 0.0, {}, finished=True))
        progress(Update("finetune", 200, 200, 20.0, {}, finished=True))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert lines[-1].startswith("finetune") and "200/200" in lines[-1] and "10.0/s" in lines[-1]
    assert not any(line.startswith("finetune") and "/7" in line for line in lines)
    assert not any(line.startswith("evaluate") and "/200" in line for line in lines)


def test_where_there_is_no_terminal_each_stage_is_one_line() -> None:
    plain = io.StringIO()
    with Bar(Console(file=plain, width=100)) as progress:
        progress(Update("teacher", 1, 1, 0.0, {"top1": 67.62, "images": 10_000}, finished=True))
        progress(Update("synthesis", 20, 60, 1.0, {}))
        progress(Update("synthesis", 60, 60, 3.2, {}, finished=True))
        progress(Update("evaluate", 7, 7, 0.0, {}, finished=True))
    assert plain.getvalue() == "teacher: top-1 67.62 % of 10000 images\nsynthesis: 60 steps in 3.2 s\n"
