"""Checkpoints, by Orbax: a tree of arrays is saved for a step, and the newest undamaged tree is restored."""

import contextlib
import errno
import os
import resource
import shutil
import sys
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

NOT_DAMAGED = (errno.EACCES, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)  # the file system fails for now
DISK_MARGIN = 2**20  # bytes of a checkpoint besides its arrays

NO_ROOM = ("No space left on device", "Disk quota exceeded")


@contextlib.contextmanager
def _without_late_answers() -> Iterator[None]:
    """Hide the tracebacks of reads that end after Orbax has given a damaged checkpoint up and closed its event loop."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


class DamagedError(UserError):
    """No checkpoint of a kind can be read."""


class Checkpoints:
    """Checkpoints of one kind in a folder. The newest `keep` are kept, and those at multiples of `keep_every` steps.

    writing: False for reading only, which leaves the half-written files of a running job alone.
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
        """Save `tree` (arrays of this process) under `step`, replacing an older one. It is on disk on return.

        Raises UserError if the disk is full. Raises OSError if a file would be larger than this process may write.
        """
        tree = jax.tree.map(np.asarray, tree)
        metadata = {"crc32": crc32(tree)}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + DISK_MARGIN
        # Checked before, because TensorStore's own threads answer a full disk and a limit with pages of tracebacks.
        if needed > resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self._folder))
        if shutil.disk_usage(self._folder).free < needed:
            raise _no_room(self._folder)
        try:
            self._checkpointer.save(step, tree, force=True, overwrite=True, custom_metadata=metadata)
        except Exception as error:  # TensorStore's errors have no errno. A quota, or others' files, can leave no room either
            if not any(words in str(_cause(error)) for words in NO_ROOM):
                raise
            raise _no_room(self._folder) from None  # a cause of TensorStore's has hundreds of lines

    def restore(self, like: Any, rows: int | None = None) -> Any | None:
        """The newest undamaged tree with the structure and shapes of `like`, as NumPy arrays; None if there are no checkpoints.

        rows: if given, the arrays' leading axis may have any length up to `rows`, instead of that of `like`.
        A checkpoint that cannot be read, or differs from what was saved, gives a warning and is passed over.
        Raises DamagedError if all checkpoints are damaged. Raises UserError if the file system fails for now.
        """
        steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
        for step in steps:
            try:
                return self._restore(step, like, rows)
            except Exception as error:  # Orbax and TensorStore raise many kinds of errors on damaged files
                words, cause = _first_line(error), _cause(error)
                if isinstance(cause, MemoryError) or getattr(cause, "errno", None) in NOT_DAMAGED:
                    raise UserError(
                        f"checkpoint {self._folder}/{step} cannot be read now ({words}): run the same command again later."
                    ) from error
                warnings.warn(
                    f"checkpoint {self._folder}/{step} is passed over, because it cannot be read: {words}.",
                    CheckpointWarning,
                    stacklevel=2,
                )
        if steps:
            raise DamagedError(
                f"no checkpoint in {self._folder} can be read ({words}): delete this folder to start this stage anew."
            )
        return None

    def restore_each(self, like: Any) -> Iterator[tuple[int, Any]]:
        """(step, tree) of every checkpoint, the oldest first. Raises UserError if one is damaged."""
        for step in sorted(c.step for c in self._checkpointer.checkpoints):
            try:
                yield step, self._restore(step, like, None)
            except Exception as error:  # as above
                words = (
                    f"checkpoint {self._folder}/{step} cannot be read ({_first_line(error)}): repeat the run in another folder."
                )
                raise UserError(words) from error

    @_without_late_answers()
    def _restore(self, step: int, like: Any, rows: int | None) -> Any:
        _open_each(self._folder / str(step))
        metadata = self._checkpointer.metadata(step)
        if metadata.metadata is None:
            raise ValueError("its description is damaged")

        def tail(leaf):
            return leaf.shape[0 if rows is None else 1 :]

        saved_leaves, wanted_leaves = jax.tree.leaves(metadata.metadata), jax.tree.leaves(like)
        # Checked before any array is read, because a forged shape could fill the memory.
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
        # After an error of `save`, closing raises it once more, and would hide the sentence that says what to do.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._checkpointer.close()


def _open_each(folder: Path) -> None:
    """Open every file below `folder`. Raises the OSError of one that cannot be opened, which Orbax would hide."""

    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            open(Path(place) / name, "rb").close()


def _no_room(folder: Path) -> UserError:
    return UserError(
        f"the disk is full, or a quota is used up: there is no room for a checkpoint in {folder}; make room and run the same "
        "command again to resume."
    )


def _first_line(error: BaseException) -> str:
    cause = _cause(error)
    return (str(cause).strip() or type(cause).__name__).split("\n")[0][:200]


def _cause(error: BaseException) -> BaseException:
    """The first error of those that led to `error`. Orbax hides the reader's own error behind one about its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
