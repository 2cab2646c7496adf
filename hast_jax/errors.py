"""The one exception that is a message to the person at the keyboard, and what such a message says of the disk."""

import errno

CAUSES = {
    errno.ENOSPC: "the disk is full: make room and run the same command again, it goes on where it was",
    errno.EDQUOT: "the disk quota is used up: make room and run the same command again, it goes on where it was",
    errno.EACCES: "no permission",
    errno.EROFS: "the file system is read-only",
}


class UserError(Exception):
    """Something the user can mend: the message is one sentence that says what is wrong and what to do."""


class InputError(UserError, ValueError):
    """An argument of a library call that is impossible."""


class Notice(UserWarning):
    """A warning of ours: one sentence for the person."""


class AccuracyWarning(Notice):
    """A network judges images no better than chance."""


class CheckpointWarning(Notice):
    """A damaged checkpoint was passed over for an older one."""


class Stopped(BaseException):
    """A run was asked to stop, and has saved all that it needs to go on. It is no error, so `except Exception` lets it pass."""


def sentence(error: Exception) -> str:
    """One line for what ended a part of the work; what is not the user's to mend is named by its type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0]


def refused_by_disk(error: OSError) -> UserError | None:
    """What the person can do about what the disk refused; None where it is something else."""
    cause = CAUSES.get(error.errno or 0)
    return UserError(f"{error.filename or 'a file of the run'}: {cause}.") if cause else None
