"""The one exception that means: the user can mend this, and the message says how."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or constant and the mend.

    Scripts print it and exit with status 1 (see `common.script.run`); it is never shown as a traceback.
    """
