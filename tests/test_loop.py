"""The loop around a step: when it looks, and what it refuses."""

import itertools

import jax.numpy as jnp
import pytest

from hast_jax.errors import UserError
from hast_jax.runs.loop import call_length, drive


def count(state, add):
    return state + add, {"value": jnp.asarray([state + add])}


def looks(**changes) -> list[int]:
    arguments = {"start": 0, "stop": 20, "steps_per_call": 1, "every": (6, 10), "what": "finetune"} | changes
    return [look.done for look in drive(count, 0, itertools.repeat((1,)), **arguments)]


def test_a_snapshot_is_made_at_multiples_of_each_interval_and_at_the_end() -> None:
    assert looks() == [6, 10, 12, 18, 20]
    assert looks(start=12, stop=19) == [18, 19]
    assert looks(start=20) == []


def test_a_call_of_several_steps_gives_a_snapshot_where_it_reaches_a_multiple() -> None:
    assert looks(steps_per_call=4, every=(6,)) == [8, 12, 20]
    assert looks(steps_per_call=5, every=(3, 100)) == [5, 10, 15, 20]


def test_the_metrics_are_those_of_the_step_just_done() -> None:
    loop = drive(count, 0, itertools.repeat((1,)), start=0, stop=4, steps_per_call=1, every=(2,), what="finetune")
    assert [(done, metrics["value"]) for done, _, metrics, _ in loop] == [(2, 2.0), (4, 4.0)]


def test_a_value_that_is_not_finite_stops_it_with_the_step_and_what_to_do() -> None:
    def bad(state):
        return (state, {"loss": jnp.asarray([jnp.nan]), "lr": jnp.ones(1)})

    with pytest.raises(UserError, match=r"synthesis diverged: loss not finite at step 3; lower config\.synthesis\.lr"):
        list(drive(bad, 0, itertools.repeat(()), start=0, stop=9, steps_per_call=1, every=(3,), what="synthesis"))


@pytest.mark.parametrize(
    ("requested", "intervals", "length"),
    [(50, (200, 50), 50), (50, (20, 30), 10), (1, (7, 3), 1), (4, (6, 9), 3), (50, (0, 0), 50)],
)
def test_a_call_is_as_long_as_divides_every_interval(requested: int, intervals: tuple[int, ...], length: int) -> None:
    assert call_length(requested, *intervals) == length
