"""Buckets, gs:// and s3://, as file systems of fsspec."""

import contextlib
import logging
import os
import re
import socket
import urllib.request
from collections.abc import Iterator

from vitcls.core import extras
from vitcls.core.errors import RunError, UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}  # what pip installs for a scheme
_ANSWER = 15.0  # seconds in which a bucket answers; two tries to renew a lock are shorter than its silence
_SLOWEST = 2**17  # bytes a second of a line that is not taken for a dead one
# What Python, aiohttp, botocore and fsspec raise where there is no way to a server, or no answer of it.
_AWAY = {"gaierror", "ConnectionError", "ClientConnectionError", "HTTPClientError", "TimeoutError", "FSTimeoutError"}
for _noisy in ("gcsfs", "google.auth"):
    logging.getLogger(_noisy).setLevel(logging.CRITICAL)  # what they raise is told in a line


def is_url(name: os.PathLike | str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(name)) is not None


def is_in_bucket(name: os.PathLike | str) -> bool:
    """Whether a URL is that of something in a bucket of a known kind."""
    return re.match(rf"({'|'.join(EXTRAS)})://[^/]+/+[^/]", os.fspath(name)) is not None


def check_local(path: str, key: str) -> None:
    """Raises UserError for a URL, which would be taken for a directory called `gs:`."""
    if is_url(path):
        raise UserError(f"{key}='{path}' is a URL; it must be a path on this machine")


def file_system(url: str, flag: str):
    """fsspec's file system of a URL. `flag` is where the user has said it.

    Raises UserError where the bucket or the rights to it are missing, RunError where it is out of reach.
    """
    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for credentials that nobody needs
    with extras.needed(f"{scheme}://", EXTRAS[scheme]):
        import fsspec

        fsspec.get_filesystem_class(scheme)
    emulated = scheme == "gs" and "STORAGE_EMULATOR_HOST" in os.environ  # which knows no credentials
    options = {"consistency": "md5"} if scheme == "gs" else {}  # S3's client compares checksums unasked
    options |= {"token": "anon"} if emulated else {}
    try:
        if scheme == "gs" and not emulated and not urllib.request.getproxies():
            socket.getaddrinfo("storage.googleapis.com", 443)  # gcsfs would look for credentials for half a minute
        files = fsspec.filesystem(scheme, use_listings_cache=False, **options)
        files.ls(bucket, timeout=limit())
    except FileNotFoundError:
        raise UserError(f"the bucket {scheme}://{bucket} is not there; create it, or use another {flag}") from None
    except Exception as error:  # of credentials, names and networks, in as many kinds as there are services
        if _AWAY & {kind.__name__ for kind in type(error).__mro__}:
            raise RunError(f"the bucket {scheme}://{bucket} is out of reach: {reason(error)}") from None
        raise UserError(f"the bucket {scheme}://{bucket} cannot be read: {reason(error)}") from None
    return files


def limit(size: int = 0) -> float:
    """Seconds after which a request is given up, with all that fsspec tries again on its own, for `size` bytes.

    Without one, a server that takes a request and falls silent would hold it for minutes, and a heartbeat with it.
    """
    return _ANSWER + size / _SLOWEST


@contextlib.contextmanager
def in_one_line(url: str) -> Iterator[None]:
    """Raises RunError for whatever a network, a proxy or a service says."""
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:
        raise RunError(f"{url} cannot be reached ({reason(error)}); the same command tries again") from error


def reason(error: Exception) -> str:
    """What a service, a network or a proxy says, in a line."""
    if isinstance(error, TimeoutError):
        return "no answer"
    return " ".join(str(error).split())[:200] or type(error).__name__
