"""A step of synthesis sees the batch through a random crop as often as the config says, and learns through it."""

from functools import partial

import jax
import numpy as np
import tiny

from hast_jax import networks, synthesize


def test_every_other_step_sees_a_crop_and_leaves_the_pixels_outside_it_alone() -> None:
    """All images of a batch share the crop, so that a pixel outside it stands still in each."""
    config = tiny.config(synthesis__crop_probability=0.5)
    teacher, variables = networks.teacher(config)
    key, shape = jax.random.key(0), (8, *config.teacher.image)
    state = synthesize.init(0, key, shape, config.teacher.classes, config.synthesis.lr)
    do = lambda config: jax.jit(
        partial(synthesize.step, variables=variables, teacher=teacher, key=key, config=config.synthesis)
    )
    step, whole = do(config), do(tiny.config(synthesis__crop_probability=0.0))
    without, expected = whole(state)
    assert (np.asarray(without.images) != state.images).all()
    cropped = 0
    for iteration in range(40):
        after, metrics = step(state._replace(iteration=np.int32(iteration)))
        if metrics["loss"] == expected["loss"]:
            np.testing.assert_array_equal(after.images, without.images)
            continue
        cropped += 1
        still = np.asarray(after.images == state.images)
        assert (still.all(0) == still.any(0)).all() and 0.3 < 1 - still[0].mean() <= 1
    assert 10 <= cropped <= 30
