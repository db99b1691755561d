"""A real server in a process of its own."""

import base64
import contextlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import requests
from PIL import Image


class Server:
    """`vitcls serve`, ready."""

    def __init__(self, *flags, wait=True):
        command = [sys.executable, "-m", "vitcls.serve", "--port=0", *map(str, flags)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        )
        self.lines = [self.process.stderr.readline()]
        port = re.search(r"listening on http://\S+:(\d+)", self.lines[0])
        if not port:
            raise AssertionError(self.lines[0] + self.process.communicate()[1])
        self.port = int(port[1])
        self.url = f"http://127.0.0.1:{port[1]}"
        if wait:
            self.wait()

    def wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(self.process.communicate()[1])

    def predict(self, *files, **options):
        return requests.post(f"{self.url}/v1/predict", files=[("file", file) for file in files], **options)

    def stop(self, number=signal.SIGTERM):
        """The exit code, and what was logged."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err

    def metric(self, name):
        """The value of a line of /metrics."""
        (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", requests.get(f"{self.url}/metrics").text, re.M)
        return float(value)


@contextlib.contextmanager
def server(*flags, **options):
    running = Server(*flags, **options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


class Load(threading.Thread):
    """Asks one thing after another, `pause` seconds apart, until it is stopped."""

    def __init__(self, running, path="/v1/predict", seed=0, pause=0.0):
        super().__init__()
        self.running, self.path, self.seed, self.pause = running, path, seed, pause
        self.responses, self.broken, self.stopping = [], [], threading.Event()
        self.start()

    def run(self):
        session, i = requests.Session(), 0
        while not self.stopping.wait(self.pause):
            i += 1
            try:
                self.ask(session, png(1000 * self.seed + i))
            except requests.RequestException as error:
                self.broken.append(error)
                return

    def ask(self, session, image):
        self.responses.append(session.post(f"{self.running.url}{self.path}", data=image))

    def stop(self):
        self.stopping.set()
        self.join()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def png(seed=0, size=(8, 8), channels=3):
    """A picture of noise, as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def expected(workdir, folder: pathlib.Path, count):
    """What `vitcls predict --json` says of `count` pictures, and their files, as benchmarks.load wants it."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        file.write_bytes(png(i))
    command = [sys.executable, "-m", "vitcls.predict", f"--workdir={workdir}", "--json", *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def base64_of(data):
    return base64.b64encode(data).decode()
