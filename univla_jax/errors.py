"""The one error type that users of the commands are meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can fix: names the thing, its value, what was expected and the remedy.

    Commands print it as one line on standard error and exit with status 2; library callers catch
    it as a ``ValueError``.
    """
