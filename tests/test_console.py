"""What the commands show of a run's progress."""

import io
import re

import pytest
from rich.console import Console

from hast_jax.deliver.console import Bar, format_seconds, show_result
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
    assert lines[-1].startswith("fine-tuning") and "200/200" in lines[-1] and "10.0/s" in lines[-1]
    assert not any(line.startswith("fine-tuning") and "/7" in line for line in lines)
    assert not any(line.startswith("evaluate") and "/200" in line for line in lines)


def test_where_there_is_no_terminal_each_stage_is_one_line() -> None:
    plain = io.StringIO()
    with Bar(Console(file=plain, width=100)) as progress:
        progress(Update("teacher", 1, 1, 0.0, {"top1": 67.62, "images": 10_000}, finished=True))
        progress(Update("synthesis", 0, 60, 0.0, {}))
        progress(Update("synthesis", 20, 60, 1.0, {}))
        progress(Update("synthesis", 60, 60, 3.2, {}, finished=True))
        progress(Update("evaluate", 7, 7, 0.0, {}, finished=True))
    assert plain.getvalue() == "teacher: top-1 67.62 % of 10,000 images\nsynthesis: 60 steps in 3.2 s\n"


def test_a_resumed_stage_says_where_it_goes_on() -> None:
    plain = io.StringIO()
    with Bar(Console(file=plain, width=100)) as progress:
        progress(Update("synthesis", 60, 60, 3.2, {}))
        progress(Update("synthesis", 60, 60, 3.2, {}, finished=True))
        progress(Update("finetune", 1100, 2400, 5.0, {}))
        progress(Update("finetune", 2400, 2400, 9.0, {}, finished=True))
    assert plain.getvalue().splitlines() == [
        "synthesis: resumed after its last step",
        "synthesis: 60 steps in 3.2 s",
        "fine-tuning: resumed after step 1,100 of 2,400",
        "fine-tuning: 2,400 steps in 9.0 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.34, "12.3 s"), (59.96, "1 min 00 s"), (409.473, "6 min 50 s"), (409.5, "6 min 50 s"), (7380, "2 h 03 min")],
)
def test_a_duration_reads_the_same_wherever_it_is_shown(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == format_seconds(round(seconds, 1)) == words


def test_without_real_images_the_end_of_a_run_tells_the_agreement_on_held_out_images() -> None:
    plain = io.StringIO()
    bits = {"weights": 3, "activations": 3, "rules": "head=w8"}
    result = {"network": "resnet8", "dataset": "none", "bits": bits, "seed": 0, "teacher": None, "images": 1024}
    result |= {"iterations": 200, "steps": 2400, "batch": 64, "hardware": "2 x cpu", "seconds": {"finetune": 61.0}}
    show_result(Console(file=plain, width=200), result | {"held_out": {"agreement": 88.3, "images": 1024, "kl": 0.1234}})
    assert plain.getvalue().splitlines() == [
        "resnet8 on none, W3A3, some layers otherwise, seed 0: no evaluation data (config.eval.dataset is none)",
        "The student agrees with the teacher on 88.3 % of 1,024 synthetic images that it was not trained on (KL divergence "
        "0.123).",
        "1,024 images x 200 iterations, 2,400 steps of 64",
        "fine-tuning 1 min 01 s; 2 x cpu",
    ]
