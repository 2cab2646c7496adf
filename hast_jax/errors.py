"""The exceptions and warnings whose messages are for the user, and the messages for errors of the disk."""

import errno
import importlib.metadata

CAUSES = {
    errno.ENOSPC: "the disk is full: make room and run the same command again; a run then resumes",
    errno.EDQUOT: "the disk quota is used up: make room and run the same command again; a run then resumes",
    errno.EFBIG: "a file is larger than this process may write: raise the limit (ulimit -f) and run the same command again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n) and run the same command again",
    errno.EIO: "the disk reports a fault: give a place on another disk",
    errno.EACCES: "no permission: change the permissions, or give another place",
    errno.EROFS: "the file system is read-only: give another place",
    errno.EEXIST: "a file is where a folder is needed: give another name",
    errno.ENOTDIR: "a file is where a folder is needed: give another name",
    errno.EISDIR: "a folder is where a file is needed: give another name",
}


class UserError(Exception):
    """An error that the user can mend. Its message is one sentence that says what is wrong and what to do."""


class InputError(UserError, ValueError):
    """An impossible argument of a library call, or an impossible value in a config."""


class Notice(UserWarning):
    """A warning by hast_jax: one sentence for the user."""


class AccuracyWarning(Notice):
    """The teacher classifies the real images no better than chance."""


class CheckpointWarning(Notice):
    """A checkpoint cannot be read and is passed over."""


class Stopped(BaseException):
    """A run was asked to stop, and has saved what it needs to resume. It is no error, so `except Exception` lets it pass."""


def sentence(error: Exception) -> str:
    """One line that says what the error is. Unless it is a `UserError`, the line begins with the name of its type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0]


def pip_install(extra: str) -> str:
    """The command that installs the packages of an optional dependency of hast_jax, such as "onnx"."""
    try:
        wanted = importlib.metadata.requires("hast_jax") or []
    except importlib.metadata.PackageNotFoundError:  # the package is used from its folder, without an installation
        return f"install hast_jax with its extra {extra!r}"
    packages = [each.partition(";")[0].strip() for each in wanted if f'extra == "{extra}"' in each]
    return "pip install " + " ".join(f"'{each}'" for each in packages)


def refused_by_disk(error: OSError) -> UserError | None:
    """A `UserError` that says what to do about an error of the disk (`CAUSES`); None for any other error."""
    cause = CAUSES.get(error.errno or 0)
    return UserError(f"{error.filename or 'a file of the run'}: {cause}.") if cause else None
