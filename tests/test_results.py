"""The results table is made from result.json files."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from hast_jax import results
from hast_jax.errors import UserError

RESULT = {
    "network": "resnet20",
    "dataset": "cifar100",
    "bits": {"weights": 3, "activations": 3},
    "teacher": 67.62,
    "no_finetuning": 13.17,
    "last": 50.0,
    "best": 51.0,
    "best_epoch": 16,
    "seed": 0,
    "images": 1536,
    "iterations": 500,
    "steps": 4000,
    "batch": 64,
    "seconds": {"synthesis": 60.0, "finetune": 65.0},
    "hardware": "2 x cpu",
}


def test_a_row_shows_the_last_epoch_the_drop_and_the_best_only_beside_it(tmp_path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    text = results.table([tmp_path])
    assert (
        "| 67.62 | 13.17 | 50.00 | 17.62 | 51.00 (16) | 0 | 1,536 images x 500 iterations | 4,000 x 64 | 2 min 05 s, 2 x cpu |"
        in text
    )
    assert text.count("|---") == results.HEADER.count("|") - 1 and "selected on test data" in text


def test_a_folder_without_a_result_is_named_and_does_not_hide_the_others(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no result\.json"):
        results.table([tmp_path])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(RESULT))
    text = results.table([tmp_path, tmp_path / "run"])
    assert "| 50.00 |" in text and text.endswith("has no result.json: let its run finish.")


def test_runs_with_the_same_name_are_told_apart(tmp_path) -> None:
    for place in ("a/run", "b/run"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "result.json").write_text(json.dumps(RESULT))
    text = results.table([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert "| a/run |" in text and "| b/run |" in text
    assert results.table([tmp_path / "a" / "run"] * 2).count("| run |") == 2
    (tmp_path / "run").mkdir()
    for name in ("a", "run"):
        (tmp_path / name / "result.json").write_text(json.dumps(RESULT))
    text = results.table([tmp_path / "a", tmp_path / "a" / "run", tmp_path / "run"])
    assert all(f"| {name} |" in text for name in ("a", "a/run", "run"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m hast_jax.main --config=configs/cifar100.py:w3a3,best --workdir=a --config.seed=1", "w3a3,best"),
        ("hast-jax quantize --config=c.py:w3a3 --config.finetune.lr=1e-3 --config.eval.every=1", "w3a3; finetune.lr=1e-3"),
        ("hast_jax.quantize(..., budget='trial', recipe='best')", "budget='trial', recipe='best'"),
        (None, ""),
    ],
)
def test_the_settings_of_a_run_are_those_that_its_command_named(command: str | None, words: str, tmp_path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, "segments": [{"command": command}, {}]}))
    label = f"{tmp_path.name}: {words}" if words else tmp_path.name
    assert f"| {label} |" in results.table([tmp_path])


def test_a_damaged_result_is_named(tmp_path) -> None:
    (tmp_path / "result.json").write_text('{"half": ')
    with pytest.raises(UserError, match=r"result\.json is left out, because it is damaged"):
        results.table([tmp_path])


SEGMENTS = json.dumps({**RESULT, "segments": [{"command": "python -m 'hast_jax.main"}]})  # a quotation without its end


def test_the_folder_of_a_sweep_is_not_taken_for_an_unfinished_run(tmp_path) -> None:
    (tmp_path / "cells").mkdir()
    with pytest.raises(UserError, match=r"is the folder of a sweep: give \S+/cells/\*\.$"):
        results.table([tmp_path])


@pytest.mark.parametrize(
    "content",
    [
        '{"half": ',
        "[]",
        json.dumps({**RESULT, "hardware": None, "seconds": None}),
        "{}",
        json.dumps({**RESULT, "last": 1e999}),
        SEGMENTS,
    ],
)
def test_a_damaged_result_does_not_hide_the_others(content: str, tmp_path) -> None:
    for name, text in (("good", json.dumps(RESULT)), ("bad", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    text = results.table([tmp_path / "bad", tmp_path / "good", tmp_path / "typo"])
    assert text.count("| 50.00 |") == 1 and f"{tmp_path}/typo is no folder." in text
    assert f"{tmp_path}/bad/result.json is left out, because it is damaged" in text


def test_a_rule_with_a_bar_does_not_break_the_table(tmp_path) -> None:
    bits = {"weights": 3, "activations": 3, "rules": "init_block|output=w8a8"}
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, "bits": bits}))
    header, _, line, *_ = results.table([tmp_path]).split("\n")
    assert line.replace("\\|", "").count("|") == header.count("|") and "init_block\\|output" in line


def test_runs_of_two_teachers_are_not_drawn_together_and_an_incomplete_log_is_named(finished, tmp_path) -> None:
    for name in ("other", "cut", "empty", "words"):
        shutil.copytree(finished, tmp_path / name)
    (tmp_path / "empty" / "evaluations.json").write_text("{}")
    (tmp_path / "words" / "evaluations.json").write_text('{"0": "x"}')
    result = json.loads((finished / "result.json").read_text())
    (tmp_path / "other" / "result.json").write_text(json.dumps({**result, "teacher": result["teacher"] - 40}))
    (tmp_path / "cut" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="draw runs of one teacher"):
        results.over_time_table([finished, tmp_path / "other"], tmp_path / "picture")
    bad = [tmp_path / name for name in ("empty", "words", "cut")]
    text = results.over_time_table([finished, *bad], tmp_path / "picture")
    assert all(f"{folder} is left out, because its log is not complete" in text for folder in bad)
    assert re.search(r"cut is left out, because its log is not complete \(KeyError: \d+\)\.$", text)
    assert (tmp_path / "picture.png").exists()


def test_top1_is_shown_over_the_time_of_the_whole_job(finished, tmp_path) -> None:
    result = json.loads((finished / "result.json").read_text())
    points = results.over_time(finished)
    assert [top1 for _, top1 in points] == list(json.loads((finished / "evaluations.json").read_text()).values())
    seconds = [each for each, _ in points]
    assert seconds == sorted(seconds) and seconds[0] >= result["seconds"]["synthesis"]
    assert seconds[-1] <= sum(result["seconds"].values()) + 0.1
    text = results.over_time_table([finished, tmp_path], tmp_path / "curve")
    assert text.count(f"\n| {finished.name} |") == len(points)
    assert (tmp_path / "curve.png").exists() and (tmp_path / "curve.svg").exists()
    other = tmp_path / finished.name
    other.mkdir()
    for name in ("result.json", "config.json", "evaluations.json", "metrics.jsonl"):
        (other / name).write_text((finished / name).read_text())
    untested = tmp_path / "untested"
    untested.mkdir()
    (untested / "result.json").write_text(json.dumps(result | {"teacher": None}))
    text = results.over_time_table([untested, finished, other], tmp_path / "curve.png")
    above = Path(os.path.commonpath([finished, other]))
    assert all(text.count(f"\n| {folder.relative_to(above)} |") == len(points) for folder in (finished, other))
    assert f"{untested} was run without evaluation data" in text and not (tmp_path / "curve.png.png").exists()
    words = r"nothing to draw: \S+ has no result.json: let its run finish; \S+ was run without evaluation data: [^.]*\.$"
    with pytest.raises(UserError, match=words):
        results.over_time_table([tmp_path, untested], tmp_path / "curve")
