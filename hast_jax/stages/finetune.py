"""Stage 3, fine-tuning: the quantized student follows the teacher on clean and on promoted images."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hast_jax import networks
from hast_jax.method import losses
from hast_jax.method.promotion import Distances, promote
from hast_jax.method.schedules import learning_rate, student_optimizer
from hast_jax.networks import Network
from hast_jax.runs import parallel, preemption, processes
from hast_jax.runs.loop import call_length, drive
from hast_jax.stages.batches import FixedInputs, Images, Strengths, draw, fixed_inputs, inputs
from hast_jax.stages.job import Job

Array = jax.Array
Variables = Mapping[str, Any]


class State(NamedTuple):
    """What fine-tuning changes: the trained collections, the optimizer's state, the number of steps done (scalar).

    trained: the student's `params`, and its `ranges` if they are learned.
    """

    trained: Variables
    opt_state: Any
    step: Array


def distances(teacher: Network, student: Network, fixed: FixedInputs, labels: Array, settings: ConfigDict) -> Distances:
    """The function (trained, images) -> {"kl": L_KL, "fa": L_FA} of the teacher and the student with collections `trained`.

    If `settings.ce` is above zero, it also gives "ce", the weighted cross-entropy of the student with `labels` [batch]. This
    serves comparisons with methods that train on labels.
    """

    def measure(trained: Variables, images: Array) -> dict[str, Array]:
        target, teacher_taps = networks.apply(teacher, fixed.teacher, images)
        logits, taps = networks.apply(student, {**fixed.teacher, "ranges": fixed.ranges, **trained}, images)
        kl = losses.distillation(target, logits, settings.temperature, settings.alpha)
        fa = fixed.strengths.lam * losses.ALIGNMENTS[settings.alignment](teacher_taps.branches, taps.branches)
        if settings.ce == 0:
            return {"kl": kl, "fa": fa}
        return {"kl": kl, "fa": fa, "ce": fixed.strengths.ce * losses.cross_entropy(logits, labels)}

    return measure


def loss_and_gradient(
    measure: Distances, trained: Variables, images: Array, strengths: Strengths, settings: ConfigDict
) -> tuple[dict[str, Array], Any]:
    """L = a * [L_KL(x) + L_FA(x)] + b * [L_KL(x') + L_FA(x')] on images x and promoted images x', with its gradient.

    If `measure` also gives a cross-entropy, both brackets include it.
    """
    clean, clean_gradient, hard_images = promote(measure, trained, images, strengths.eps, settings.direction)
    loss, gradient = strengths.a * sum(clean.values()), jax.tree.map(lambda g: strengths.a * g, clean_gradient)
    metrics = clean
    if settings.b > 0:

        def hard_loss(t: Variables) -> tuple[Array, dict[str, Array]]:
            parts = measure(t, hard_images)
            return strengths.b * sum(parts.values(), jnp.zeros(())), parts

        (hard_value, hard), hard_gradient = jax.value_and_grad(hard_loss, has_aux=True)(trained)
        metrics |= {f"{name}_promoted": value for name, value in hard.items()}
        loss, gradient = loss + hard_value, jax.tree.map(jnp.add, gradient, hard_gradient)
    return metrics | {"loss": loss}, gradient


def make_step(
    teacher: Network, student: Network, settings: ConfigDict
) -> Callable[[State, FixedInputs], tuple[State, dict[str, Array]]]:
    """One step of fine-tuning for `parallel.pmap_steps`. settings: `config.finetune`."""
    schedule, transform = learning_rate(settings), student_optimizer(settings)

    def step(state: State, fixed: FixedInputs) -> tuple[State, dict[str, Array]]:
        images, labels = draw(fixed, state.step, settings)
        measure = distances(teacher, student, fixed, labels, settings)
        metrics, gradient = loss_and_gradient(measure, state.trained, images, fixed.strengths, settings)
        metrics, gradient = parallel.mean((metrics, gradient))
        updates, opt_state = transform.update(gradient, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        if "ranges" in trained:
            trained = {**trained, "ranges": networks.proper_ranges(trained["ranges"])}
        metrics |= {
            "lr": jnp.asarray(schedule(state.step)),
            "gradient_norm": optax.tree.norm(gradient["params"]),
            "params_norm": optax.tree.norm(trained["params"]),
            "update_norm": optax.tree.norm(updates["params"]),
        }
        return State(trained, opt_state, state.step + 1), metrics

    return step


def init(params: Any, ranges: Any, settings: ConfigDict) -> State:
    """The state before the first step: the teacher's `params` and the calibrated `ranges`. settings: `config.finetune`."""
    trained = {"params": params, "ranges": ranges} if settings.ranges == "learned" else {"params": params}
    return State(trained, student_optimizer(settings).init(trained), jnp.zeros((), jnp.int32))


def student_variables(student: Network, variables: Variables, ranges: Variables, trained: Variables) -> Variables:
    """The student's variables after fine-tuning, moved onto the grids of learned ranges (`networks.settled`).

    variables: the teacher's. ranges: the calibrated ones. trained: the collections of a `State`.
    """
    found = {**variables, "ranges": ranges, **trained}
    params, ranges = networks.settled(student, found["params"], found["ranges"])
    return {**found, "params": params, "ranges": ranges}


def run(job: Job, images: Images, labels: Images, ranges: Any, evaluate: Callable[[Any], float] | None) -> tuple[State, Any]:
    """Train the student and save it after each epoch; returns its last state and its accuracy by epoch.

    images, labels: NumPy arrays that may be memory-mapped. ranges: the calibrated ones. evaluate: a function from the student's
    variables to its accuracy; None: the student is not evaluated. Epoch 0 is before fine-tuning.
    """
    config, settings = job.config, job.config.finetune
    stop, every = settings.epochs * settings.steps_per_epoch, settings.steps_per_epoch
    fixed = fixed_inputs(job.variables, ranges, images, labels, config)
    learner = replace(job.student, arithmetic=config.student.arithmetic)

    def judge(state: State) -> None:
        epoch = int(state.step) // every
        if evaluate is not None:
            evaluations[epoch] = evaluate(student_variables(job.student, job.variables, ranges, state.trained))
        if best_epoch(evaluations) == epoch:
            best.save(int(state.step), state)
        # Written last, so that a run that was killed before this line evaluates the epoch again.
        processes.on_main(lambda: job.storage.write_evaluations(evaluations))

    with (
        job.storage.open_checkpoints("latest", keep=2, keep_every=settings.keep_every * every) as latest,
        job.storage.open_checkpoints("best", keep=1) as best,
    ):
        state, evaluations = _resume(job, ranges, latest)
        start = int(state.step)
        steps_per_call = call_length(parallel.steps_per_call(config.steps_per_call), every, start)

        def due(step):
            return step % every == 0 and (step // every % config.eval.every == 0 or step == stop)

        with job.recorder.stage("finetune", stop, start) as stage:
            if evaluate is not None and start and 0 not in evaluations:  # the file of the evaluations was lost
                fresh = init(job.variables["params"], ranges, settings)
                evaluations[0] = evaluate(student_variables(job.student, job.variables, ranges, fresh.trained))
            if due(start) and start // every not in evaluations:
                judge(state)
            loop = drive(
                parallel.pmap_steps(make_step(job.teacher, learner, settings), job.devices, steps_per_call, all_processes=True),
                parallel.replicate(state, job.devices),
                inputs(fixed, range(start, stop, steps_per_call), job.devices, settings),
                start=start,
                stop=stop,
                steps_per_call=steps_per_call,
                every=(config.log_every, every),
                what="finetune",
            )
            for done, replicated, metrics, preempted in loop:
                stage.update(done, metrics)
                if done % every == 0 or preempted:
                    state = jax.device_get(parallel.unreplicate(replicated))
                    latest.save(done, state)
                    if preempted:
                        preemption.leave()
                    if due(done):
                        judge(state)
    return state, evaluations


def best_epoch(evaluations: dict[int, float]) -> int | None:
    """The first epoch after epoch 0 with the highest accuracy, or None. The evaluation data select this epoch."""
    return max((epoch for epoch in evaluations if epoch > 0), key=lambda epoch: evaluations[epoch], default=None)


def _resume(job: Job, ranges: Variables, latest: Any) -> tuple[State, dict[int, float]]:
    """The newest saved state and the accuracies up to it. If nothing is saved: a fresh state and no accuracies."""
    fresh = init(job.variables["params"], ranges, job.config.finetune)
    saved = latest.restore(fresh)
    processes.require_same({"newest checkpoint": 0 if saved is None else int(saved.step)})
    if saved is None:
        return fresh, {}
    known = job.storage.read_evaluations()
    return saved, {e: top1 for e, top1 in known.items() if e * job.config.finetune.steps_per_epoch <= int(saved.step)}
