"""The one exception that means: the user can solve this, and the message says how."""


class UserError(Exception):
    """Bad input. The message is one sentence: which file or constant is wrong, and what to do.

    Scripts print it without a traceback and exit with status 1 (see `common.runtime.script.run`).
    """


def some(names: list[str]) -> str:
    """The first ten of the names, for a message."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
