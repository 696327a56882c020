"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, said in one sentence that names the file, row or flag and the mend.

    The command line prints the sentence alone and exits with status 2.
    """
