"""Deadlines, a full house and a lost database: a real server of a model that is slow on purpose."""

import asyncio
import contextlib
import http.client
import io
import socket
import threading
import time

import numpy as np
import requests
import uvicorn
from PIL import Image

from tests.serve.running import png
from vitcls.data.images import BY_FORMAT
from vitcls.feedback.store import open_store
from vitcls.serve import batcher
from vitcls.serve.app import make_app
from vitcls.serve.drift import Drift
from vitcls.serve.limits import Limits
from vitcls.serve.model import Answers, Served
from vitcls.serve.receipts import Receipts
from vitcls.serve.service import Service, Source


class Slow:
    """A model that takes its time, and counts its images."""

    def __init__(self, seconds):
        self.seconds, self.batches = seconds, []

    def __call__(self, images):
        if images.any():
            self.batches.append(len(images))
            time.sleep(self.seconds)
        return Answers(np.zeros((len(images), 2), np.float32), np.full((len(images), 2), 0.5, np.float32))


@contextlib.contextmanager
def serving(tmp_path, slow, kind=Served, **limits):
    """The URL, and the path of the database."""
    about = {"model": "slow", "checkpoint": {"step": 0}}
    model = kind("here", "", {}, ("a", "b"), (8, 8, 3), BY_FORMAT, about, slow, None)
    store = open_store(f"sqlite:///{tmp_path}/f.db")
    service = Service(
        lambda: Source("here"),
        lambda source: model,
        lambda source, model: Drift(2),
        store=store,
        kept=Receipts(store),
        limits=Limits(**limits),
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="critical", lifespan="off"))

    async def run():
        running = asyncio.create_task(service.run())
        await server.serve(sockets=[listening])
        running.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        while requests.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.05)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        service.close()


def ask_together(url, count):
    """The responses to requests that are asked at once."""
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(requests.post(f"{url}/v1/predict", data=png(i))))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_what_takes_too_long_is_told_in_time(tmp_path):
    with serving(tmp_path, Slow(1.0), seconds=0.3) as url:
        since = time.monotonic()
        response = requests.post(f"{url}/v1/predict", data=png())
        assert response.status_code == 504 and response.json() == {"error": "there was no answer in time"}
        assert time.monotonic() - since < 0.9


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    with serving(tmp_path, Slow(0), seconds=0.3) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/v1/predict")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"the beginning")
        assert connection.getresponse().status == 504
        connection.close()


def test_a_full_house_says_when_to_come_again(tmp_path):
    with serving(tmp_path, Slow(0.5), waiting=4) as url:
        found = ask_together(url, 8)
        busy = [response for response in found if response.status_code == 503]
        assert len(busy) == 4 and len(found) == 8
        assert all(response.headers["Retry-After"] == "1" for response in busy)
        assert busy[0].json() == {"error": "too many images are waiting; try again soon"}
        assert requests.post(f"{url}/v1/predict", data=png()).status_code == 200


def test_only_small_files_are_decoded_where_they_are_read(tmp_path):
    """A file of few bytes may hold many pixels, which would keep all others waiting."""
    threads = []

    class Watched(Served):
        def decode(self, data):
            threads.append(threading.current_thread().name.partition("_")[0])
            return super().decode(data)

    blank = io.BytesIO()
    Image.new("L", (1500, 1500)).save(blank, "PNG")
    assert len(blank.getvalue()) < 8192 < len(png(size=(100, 100)))
    with serving(tmp_path, Slow(0), kind=Watched) as url:
        for data in (png(), png(size=(100, 100)), blank.getvalue()):
            assert requests.post(f"{url}/v1/predict", data=data).status_code == 200
    assert threads[1:] == ["decode", "decode"] and threads[0] != "decode"


def test_for_who_has_gone_nothing_is_computed(tmp_path):
    slow = Slow(0.5)
    with serving(tmp_path, slow) as url:
        first = threading.Thread(target=requests.post, args=(f"{url}/v1/predict", png(1)))
        first.start()
        time.sleep(0.2)  # the device is busy now
        for i in range(3):
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request("POST", "/v1/predict", body=png(i))
            time.sleep(0.05)
            connection.close()
        first.join()
        time.sleep(0.3)
        assert slow.batches == [1]


def test_more_than_the_largest_batch_takes_turns(tmp_path):
    slow = Slow(0.2)
    with serving(tmp_path, slow) as url:
        found = ask_together(url, 40)
        assert {response.status_code for response in found} == {200}
        assert max(slow.batches) <= batcher.SIZES[-1] and len(slow.batches) < 8


def test_answers_go_on_without_a_database(tmp_path, caplog):
    with serving(tmp_path, Slow(0)) as url:
        (answer,) = requests.post(f"{url}/v1/predict", data=png()).json()["predictions"]
        time.sleep(0.5)
        for file in tmp_path.glob("f.db*"):
            file.write_bytes(b"not a database any more" * 1000)
        assert requests.post(f"{url}/v1/predict", data=png()).json()["predictions"] == [answer]
        response = requests.post(f"{url}/v1/feedback", data={"id": answer["id"], "right": "true"})
        assert response.status_code == 503 and "f.db" not in response.text
        assert requests.get(f"{url}/readyz").status_code == 200
