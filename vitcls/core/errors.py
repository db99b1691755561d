"""Exceptions that end a command, and their messages."""

import difflib
from collections.abc import Iterable

_SHORT_LIST = 20  # names that are listed beside the nearest


copies: dict[str, str] = {}  # directory of a copy on this machine -> the URL that the user has given


def said(text: str) -> str:
    """A text of paths in the user's words: what is in a copy of a bucket goes by its URL."""
    for directory, url in tuple(copies.items()):  # other threads may add some
        text = text.replace(directory, url)
    return text


class UserError(ValueError):
    """Bad config, flags or input: one line on stderr that says what to do, exit code 2."""

    def __str__(self) -> str:
        return said(super().__str__())


class RunError(RuntimeError):
    """The work itself failed (divergence, no readable checkpoint): one line on stderr, exit code 1."""

    def __str__(self) -> str:
        return said(super().__str__())


class Stopped(Exception):
    """The run was stopped by a signal, after saving; `code` is the exit code, 128 + the number of the signal."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def unknown(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a `name` that is not one of `valid`."""
    return UserError(not_known(kind, name, valid))


def not_known(kind: str, name: object, valid: Iterable[str]) -> str:
    """What is said of a `name` that is not one of `valid`, with the nearest name that is.

    >>> not_known("dataset", "cifar1000", ["cifar10", "cifar100"])
    "dataset 'cifar1000' is not known; did you mean 'cifar100'? Known: cifar10, cifar100"
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if close and len(valid) > _SHORT_LIST:
        return f"{kind} {str(name)!r} is not known; did you mean '{close[0]}'?"
    if len(valid) > 2 * _SHORT_LIST:
        valid = [*valid[:_SHORT_LIST], f"... ({len(valid)} in all)"]
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{kind} {str(name)!r} is not known{hint} Known: {', '.join(valid)}"
