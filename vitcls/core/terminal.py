"""What reaches a user's eyes: names of any bytes in print, and no chatter of the libraries."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator

_VISIBLE = "vitcls_visible"


def _visible(error: UnicodeError) -> tuple[str, int]:
    r"""A byte of a file name that is no UTF-8, which Python holds as a surrogate, becomes \xe9; the rest \u732b."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (
        f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c.encode("ascii", "backslashreplace").decode()
        for c in characters
    )
    return "".join(escaped), error.end


codecs.register_error(_VISIBLE, _visible)


def printable(text: str) -> str:
    r"""The text as UTF-8 can hold it: a byte of a file name that is no UTF-8 shows as \xe9."""
    return text.encode("utf-8", _VISIBLE).decode("utf-8")


def print_anything() -> None:
    """From here on stdout and stderr escape what their encoding lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a notebook has put there
            stream.reconfigure(errors=_VISIBLE)


def chatter_to_stderr() -> None:
    """From here on what libraries write to stdout by themselves, as Gloo does, goes to stderr; our own words stay."""
    try:
        own = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):  # no file, as in a notebook
        return
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115 (to the end)


def quiet_tensorflow() -> None:
    """Leaves TensorFlow its errors only; to be called before it is imported, which happens in several places.

    Its note on oneDNN is written before any level counts, and only where oneDNN is on, which vitcls has no use for:
    TensorFlow reads data here and computes nothing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Drops what libraries print, also from C++, which no log level reaches."""
    kept = {1: os.dup(1), 2: os.dup(2)}
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        try:
            for stream in kept:
                os.dup2(nothing.fileno(), stream)
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
        finally:
            for stream, own in kept.items():
                os.dup2(own, stream)
                os.close(own)
