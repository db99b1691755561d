"""Micro-batches: images of many requests go through the model together.

While the device works, images wait; when it is free, those that wait go together, in the smallest of a few batch sizes
that holds them. It waits for others for a few milliseconds only while some are on their way. All state belongs to the
event loop; the device has a thread of its own.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vitcls.serve.model import Answers, Served

SIZES = (1, 2, 4, 8, 16, 32)  # of batches; compiled before the first request


class Busy(Exception):
    """There is no room for more images now."""


class Answer(NamedTuple):
    """What a model says of one image, and in what company."""

    model: Served
    outputs: np.ndarray  # float32 [K]
    probabilities: np.ndarray  # float32 [K]
    best: int  # the most probable class
    unknown: bool | None
    distance: float | None
    batch_size: int


def _each(model: Served, found: Answers, size: int) -> Iterator[Answer]:
    """The answers to the images of a batch, in order."""
    best = found.probabilities.argmax(axis=1).tolist()
    nothing = [None] * len(best)
    unknown, distance = (nothing if part is None else part.tolist() for part in (found.unknown, found.distance))
    for answer in zip(found.outputs, found.probabilities, best, unknown, distance, strict=True):
        yield Answer(model, *answer, size)


class _Waiting(NamedTuple):
    image: np.ndarray  # uint8 [H, W, C]
    answer: asyncio.Future


class Batcher:
    """Answers images one by one, of whichever request, in batches."""

    def __init__(
        self, model: Served, *, capacity: int = 256, window: float = 0.002, observe: Callable[[int, int], None]
    ):
        """`capacity` images may be on their way at once; `observe` gets the images and the size of each batch."""
        self.model = model  # another one may be put here at any time; a batch is of one model
        self._capacity, self._window, self._observe = capacity, window, observe
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._admitted = 0  # images between `room` and its end
        self._changed = asyncio.Event()
        self._device = concurrent.futures.ThreadPoolExecutor(1, "device")

    @property
    def admitted(self) -> int:
        return self._admitted

    @contextlib.contextmanager
    def room(self, count: int) -> Iterator[None]:
        """For `count` images from before they are decoded until they are answered; raises Busy where there is none."""
        if self._admitted + count > self._capacity:
            raise Busy
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count
            self._changed.set()

    async def answer(self, image: np.ndarray) -> Answer:
        """Of uint8 [H, W, C]. Whoever is cancelled meanwhile is left out of the batch."""
        waiting = _Waiting(image, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._changed.set()
        return await waiting.answer

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            model, size = self.model, next(size for size in SIZES if size >= len(batch))
            images = [waiting.image for waiting in batch]
            try:
                found = await loop.run_in_executor(self._device, model.answer, images, size)
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            self._observe(len(batch), size)
            for waiting, answer in zip(batch, _each(model, found, size), strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    async def _next(self) -> list[_Waiting]:
        """The next images, at least one, of those that somebody still waits for."""
        deadline = None
        while True:
            while self._waiting and self._waiting[0].answer.done():
                self._waiting.popleft()
            count = len(self._waiting)
            now = asyncio.get_running_loop().time()
            if count:
                deadline = deadline or now + self._window
                if count >= SIZES[-1] or count >= self._admitted or now >= deadline:
                    break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline if count else None):
                    await self._changed.wait()
        batch = []
        while self._waiting and len(batch) < SIZES[-1]:
            waiting = self._waiting.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch or await self._next()
