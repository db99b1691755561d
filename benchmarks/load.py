"""Load for a server of classifiers: many connections, each answer checked against its own image.

    python -m benchmarks.load --port=8000 --expected=FILE.json --clients=64 --seconds=10 [--rate=R] [--requests=N]

FILE.json is [[path of an image, its most probable class, the probability], ...]. Without --rate each client asks again
as soon as it is answered; with it requests begin R times a second, whether others are answered or not. A 503 is asked
again after its Retry-After. Prints one JSON object.
"""

import argparse
import asyncio
import base64
import itertools
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

_CLOSE = 1e-3  # probabilities of one image in batches of other sizes


class Request(NamedTuple):
    """The bytes of a request, and what is to be answered."""

    data: bytes
    label: str
    probability: float


class Tally:
    """What came back."""

    def __init__(self):
        self.seconds: list[float] = []
        self.busy = self.lost = self.swapped = 0

    def result(self, elapsed: float) -> dict[str, Any]:
        ordered = sorted(self.seconds)

        def quantile(q: float) -> float | None:
            return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None

        return {
            "answers": len(ordered),
            "per_second": len(ordered) / elapsed,
            "p50": quantile(0.5),
            "p99": quantile(0.99),
            "busy": self.busy,
            "lost": self.lost,
            "swapped": self.swapped,
        }


def requests(expected: str, path: str) -> list[Request]:
    found = []
    for file, label, probability in json.loads(pathlib.Path(expected).read_text(encoding="utf-8")):
        body = json.dumps({"image": base64.b64encode(pathlib.Path(file).read_bytes()).decode()}).encode()
        lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode()
        found.append(Request(head + body, label, probability))
    return found


class Connection:
    """One, kept alive."""

    def __init__(self, port: int):
        self._port, self._streams = port, None

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
            self._streams = None
        return int(head[0].split()[1]), headers, body


async def answered(connection: Connection, request: Request, tally: Tally) -> None:
    """Asks until there is an answer, and looks whether it is this image's."""
    since = time.perf_counter()
    try:
        while True:
            status, headers, body = await connection.ask(request.data)
            if status != 503:
                break
            tally.busy += 1
            await asyncio.sleep(float(headers.get("retry-after", 1)))
        top = json.loads(body)["predictions"][0]["top"][0]
    except (OSError, EOFError, ValueError, KeyError, asyncio.IncompleteReadError):
        tally.lost += 1
        return
    tally.seconds.append(time.perf_counter() - since)
    tally.swapped += top["class"] != request.label or abs(top["probability"] - request.probability) > _CLOSE


async def closed_loop(flags, some: list[Request]) -> Tally:
    """Each client asks one thing after another."""
    tally, order, end = Tally(), itertools.cycle(some), time.perf_counter() + flags.seconds
    left = itertools.count(flags.requests, -1)

    async def client() -> None:
        connection = Connection(flags.port)
        while next(left) > 0 if flags.requests else time.perf_counter() < end:
            await answered(connection, next(order), tally)

    await asyncio.gather(*(client() for _ in range(flags.clients)))
    return tally


async def open_loop(flags, some: list[Request]) -> Tally:
    """Requests begin at a rate, by whichever connection is free."""
    tally, order = Tally(), itertools.cycle(some)
    free: list[Connection] = [Connection(flags.port) for _ in range(flags.clients)]

    async def one() -> None:
        connection = free.pop() if free else Connection(flags.port)
        await answered(connection, next(order), tally)
        free.append(connection)

    begun, asked = time.perf_counter(), set()
    for i in range(int(flags.rate * flags.seconds)):
        await asyncio.sleep(max(0.0, begun + i / flags.rate - time.perf_counter()))
        task = asyncio.create_task(one())
        asked.add(task)
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/predict")
    parser.add_argument("--expected", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--requests", type=int, default=0)
    flags = parser.parse_args()
    some, since = requests(flags.expected, flags.path), time.perf_counter()
    tally = asyncio.run((open_loop if flags.rate else closed_loop)(flags, some))
    print(json.dumps(tally.result(time.perf_counter() - since)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
