"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, in one sentence that names the file, row or flag and how to fix it.

    The command line prints the sentence alone and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, in the one line that fits into a sentence."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
