"""What a service refuses, and how it says so."""

import dataclasses
import ipaddress


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of each request."""

    images: int = 16
    image_bytes: int = 10 * 2**20
    pixels: int = 2**25  # that a file claims in its header
    seconds: float = 10.0  # until there is an answer
    waiting: int = 256  # images of all requests at once

    @property
    def body_bytes(self) -> int:
        """All images as base64, and some words."""
        return min(self.images, 4) * self.image_bytes * 4 // 3 + 2**16


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone, whatever a name server says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
