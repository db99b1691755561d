"""Micro-batches in one event loop, of a model that counts: who waits for whom, who is left out, and when it is full."""

import asyncio

import numpy as np
import pytest

from vitcls.data.images import BY_FORMAT
from vitcls.serve.batcher import Batcher, Busy
from vitcls.serve.model import Answers, Served


class Counting:
    """A model whose answer to an image is the image's value; each batch waits for `go`."""

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(images[:, 0, 0, 0].tolist())
        if 255 in self.batches[-1]:
            raise ValueError("the device is lost")
        return Answers(np.repeat(images[:, 0, 0].astype(np.float32), 2, axis=1), np.full((len(images), 2), 0.5))


def image(value):
    return np.full((1, 1, 1), value, np.uint8)


async def with_batcher(act, **options):
    """What `act` returns of a batcher that runs, and the batches that were computed."""
    program, sizes = Counting(), []
    model = Served("here", "", {}, ("a", "b"), (1, 1, 1), BY_FORMAT, {}, program, None)
    batcher = Batcher(model, observe=lambda images, size: sizes.append((images, size)), **options)
    running = asyncio.create_task(batcher.run())
    result = await act(batcher)
    running.cancel()
    return result, program.batches, sizes


async def ask(batcher, value):
    with batcher.room(1):
        return (await batcher.answer(image(value))).outputs[0]


def test_images_that_come_together_go_together():
    async def act(batcher):
        return await asyncio.gather(*(ask(batcher, value) for value in range(40)))

    found, batches, sizes = asyncio.run(with_batcher(act))
    assert found == list(range(40))
    assert sizes == [(32, 32), (8, 8)] and batches == [list(range(32)), list(range(32, 40))]


def test_one_that_comes_alone_waits_for_nobody():
    async def act(batcher):
        begun = asyncio.get_running_loop().time()
        await ask(batcher, 7)
        return asyncio.get_running_loop().time() - begun

    seconds, _, sizes = asyncio.run(with_batcher(act, window=5.0))
    assert seconds < 1 and sizes == [(1, 1)]


def test_it_waits_for_those_that_are_being_decoded_but_not_long():
    async def act(batcher):
        async def late(seconds):
            with batcher.room(1):
                await asyncio.sleep(seconds)
                return (await batcher.answer(image(9))).outputs[0]

        return await asyncio.gather(ask(batcher, 7), late(0.05), late(0.6))

    found, _, sizes = asyncio.run(with_batcher(act, window=0.3))
    assert found == [7, 9, 9] and sizes == [(2, 2), (1, 1)]


def test_who_has_gone_is_left_out():
    async def act(batcher):
        with batcher.room(3):
            tasks = [asyncio.create_task(ask(batcher, value)) for value in range(3)]
            await asyncio.sleep(0)
            tasks[1].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    (first, second, third), batches, _ = asyncio.run(with_batcher(act, window=0.1))
    assert (first, third) == (0, 2) and isinstance(second, asyncio.CancelledError)
    assert batches == [[0, 2]]


def test_beyond_its_capacity_it_is_busy():
    async def act(batcher):
        with batcher.room(3):
            with pytest.raises(Busy), batcher.room(2):
                pass
            with batcher.room(1):
                assert batcher.admitted == 4
        return batcher.admitted

    assert asyncio.run(with_batcher(act, capacity=4))[0] == 0


def test_a_batch_that_fails_does_not_end_the_server():
    async def act(batcher):
        failed = await asyncio.gather(ask(batcher, 255), ask(batcher, 1), return_exceptions=True)
        return failed, await ask(batcher, 3)

    (failed, after), _, _ = asyncio.run(with_batcher(act))
    assert [str(error) for error in failed] == ["the device is lost"] * 2 and after == 3
