"""The only room that knows Orbax: saving a tree of arrays by step, and restoring the newest that is whole."""

import errno
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hast_jax.errors import CheckpointWarning, UserError
from hast_jax.runs.files import crc32

NOT_DAMAGED = (errno.EACCES, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)  # of a file system that fails for now
DISK_MARGIN = 2**20  # bytes beside the arrays of a checkpoint


class Checkpoints:
    """Checkpoints of one kind in a folder, the newest `keep` of them and those at multiples of `keep_every` steps.

    writing=False only reads: it leaves alone what a running job has half written.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, writing: bool = True):
        policies = ocp.training.preservation_policies
        policy: Any = policies.LatestN(keep)
        if keep_every:
            policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(), preservation_policy=policy, cleanup_tmp_directories=writing
        )

    def save(self, step: int, tree: Any) -> None:
        """Save `tree` (arrays of this process) under `step`, over what may be there. It is on disk on return."""
        tree = jax.tree.map(np.asarray, tree)
        metadata = {"crc32": crc32(tree)}
        # Asked beforehand: TensorStore meets a full disk in threads of its own, with pages of tracebacks.
        if shutil.disk_usage(self._folder).free < sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + DISK_MARGIN:
            raise UserError(
                f"the disk is full: no room for a checkpoint in {self._folder}; make room and run the same command "
                "again, it goes on where it was."
            )
        self._checkpointer.save(step, tree, force=True, overwrite=True, custom_metadata=metadata)

    def restore(self, like: Any, rows: int | None = None) -> Any | None:
        """The newest whole tree with the structure and shapes of `like`, as NumPy arrays; None where there is none.

        rows: where given, arrays may have any leading axis up to that, instead of that of `like`.
        A checkpoint that cannot be read, or is not what was saved, is passed over with a warning for the one before it.
        Raises UserError where there are checkpoints and none is whole.
        """
        steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
        for step in steps:
            try:
                return self._restore(step, like, rows)
            except Exception as error:  # Orbax and TensorStore raise many kinds on damaged files
                words = _first_line(error)
                if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_DAMAGED:
                    raise UserError(
                        f"checkpoint {self._folder}/{step} cannot be read now ({words}): run the same command again later."
                    ) from error
                warnings.warn(
                    f"checkpoint {self._folder}/{step} cannot be read and is passed over: {words}.",
                    CheckpointWarning,
                    stacklevel=2,
                )
        if steps:
            raise UserError(
                f"no checkpoint in {self._folder} can be read ({words}): where that cannot be mended, delete that folder to "
                "start this stage anew."
            )
        return None

    def restore_each(self, like: Any) -> Iterator[tuple[int, Any]]:
        """(step, tree) of every checkpoint, the oldest first. Raises UserError where one is damaged."""
        for step in sorted(c.step for c in self._checkpointer.checkpoints):
            try:
                yield step, self._restore(step, like, None)
            except Exception as error:  # as above
                words = (
                    f"checkpoint {self._folder}/{step} cannot be read ({_first_line(error)}): repeat the run in another folder."
                )
                raise UserError(words) from error

    def _restore(self, step: int, like: Any, rows: int | None) -> Any:
        metadata = self._checkpointer.metadata(step)

        def tail(leaf):
            return leaf.shape[0 if rows is None else 1 :]

        saved_leaves, wanted_leaves = jax.tree.leaves(metadata.metadata), jax.tree.leaves(like)
        # Before any array is read: a forged shape could fill the memory.
        if sorted(map(tail, saved_leaves)) != sorted(map(tail, wanted_leaves)):
            raise ValueError("its arrays have other shapes")
        if rows is not None and max(leaf.shape[0] for leaf in saved_leaves) > rows:
            raise ValueError(f"it holds more than {rows} rows")
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        tree = jax.tree.map(np.asarray, self._checkpointer.load(step, abstract))
        saved = metadata.custom_metadata
        if saved is None or crc32(tree) != saved["crc32"]:
            raise ValueError("its arrays are not those that were saved")
        return tree

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._checkpointer.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
