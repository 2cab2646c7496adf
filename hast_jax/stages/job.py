"""The inputs that every stage of a run shares."""

from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from hast_jax.networks import Network
from hast_jax.networks.weights import Variables
from hast_jax.runs.memory import MemoryRun
from hast_jax.runs.progress import Recorder
from hast_jax.runs.run_folder import RunFolder


class Job(NamedTuple):
    """One quantization of one network.

    config: the whole config. devices: how many this process uses. storage: keeps what the run needs to resume.
    recorder: records the progress. variables: the teacher's.
    """

    config: ConfigDict
    devices: int
    storage: RunFolder | MemoryRun
    recorder: Recorder
    teacher: Network
    student: Network
    variables: Variables

    def key(self, number: int) -> jax.Array:
        """The key of everything random in the stage of this number: 1 synthesis, 2 calibration, 3 fine-tuning."""
        return jax.random.fold_in(jax.random.key(self.config.seed), number)
