"""The one exception that is a message to the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence that says what is wrong and what to do."""
