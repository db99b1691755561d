"""Packages that only some commands need; pip installs them by the name of an extra."""

import contextlib
from collections.abc import Iterator

from vitcls.core.errors import UserError


@contextlib.contextmanager
def needed(what: str, extra: str) -> Iterator[None]:
    """Imports within: where one fails, UserError says that `what` needs another package, and of which extra."""
    try:
        yield
    except ImportError:
        raise UserError(f"{what} needs another package: pip install 'vitcls[{extra}]'") from None
