"""What is refused, in one line, before it costs anything; and two thousand hostile uploads."""

import http.client
import io
import json
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import sys
import zlib

import pytest
import requests
from PIL import Image

from tests.serve.running import base64_of, png, server
from vitcls.serve.limits import Limits

JSON = {"Content-Type": "application/json"}

STATUSES = {200, 400, 404, 405, 408, 413, 415, 422, 431, 500, 503}


def claiming(width, height):
    """A PNG of a few bytes whose header claims many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (dict(data=b"x" * (11 * 2**20)), 422, "the file has 11.0 MiB; at most 10 are taken"),
        (dict(data=b"x" * (Limits().body_bytes + 1)), 413, "a request has at most"),
        (dict(files=[("file", png())] * 17), 413, "a request has at most 16 images"),
        (dict(json={"images": [base64_of(png())] * 17}), 413, "a request has at most 16 images"),
        (dict(data=b""), 400, "there is no image in the request"),
        (dict(files=[("other", (None, "text"))]), 400, "there is no image in the request"),
        (dict(data=b"{", headers={"Content-Type": "application/json"}), 400, "the body is not JSON"),
        (dict(data=b"[" * 10**5, headers={"Content-Type": "application/json"}), 400, "the body is not JSON"),
        (dict(json=[1]), 400, "the JSON is to be an object"),
        (dict(json={"image": "not base64!"}), 422, "the file is not base64"),
        (dict(json={"images": [3, None]}), 422, "the file is not base64"),
        (dict(data=b"a", headers={"Content-Type": "text/plain"}), 415, "send images as multipart/form-data, image/*"),
        (dict(data=b"a", headers={"Content-Type": "multipart/form-data"}), 400, "the form cannot be read"),
        (dict(data=claiming(9000, 9000)), 422, "claims 9000x9000 pixels; at most 33,554,432 are decoded"),
        (dict(data=claiming(6000, 6000)), 422, "claims 6000x6000 pixels; at most 33,554,432 are decoded"),
        (dict(data=claiming(100_000, 100_000)), 422, "claims more than 33,554,432 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_too_much_is_one_line(served, request_, status, words):
    response = requests.post(f"{served.url}/v1/predict", **request_)
    said = response.json()
    assert response.status_code == status
    assert words in (said["error"] if "error" in said else said["predictions"][0]["error"])


def test_a_body_without_a_length_is_bounded_too(served):
    def chunks():
        for _ in range(Limits().body_bytes // 2**16 + 2):
            yield b"x" * 2**16

    with pytest.raises(requests.ConnectionError):  # or the answer comes while the body is still sent
        raise_for = requests.post(f"{served.url}/v1/predict", data=chunks())
        assert raise_for.status_code == 413
        raise requests.ConnectionError


def test_what_is_not_there(served):
    for path in ("/nothing", "/v1", "/page/index.html", "/..%2f..%2fetc/passwd", "/v1/model/"):
        response = requests.get(f"{served.url}{path}", allow_redirects=False)
        assert response.status_code == 404 and response.json() == {"error": "there is nothing here; see /docs"}
    response = requests.delete(f"{served.url}/v1/predict")
    assert response.status_code == 405 and "another method" in response.json()["error"]


def test_headers_are_strict_everywhere(served):
    for path in ("/", "/docs", "/v1/model", "/nothing"):
        headers = requests.get(f"{served.url}{path}").headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and "Server" not in headers


def test_the_page_has_nothing_of_others(served):
    for path in ("/", "/page.css", "/page.js", "/docs"):
        text = requests.get(f"{served.url}{path}").text.replace("http://127.0.0.1:8000", "")
        assert "http" not in text.replace("http-equiv", "")
    assert "<script>" not in requests.get(served.url).text and "style=" not in requests.get(served.url).text


def test_pages_of_other_sites_and_other_names_are_not_answered(served):
    url = f"{served.url}/v1/predict"
    assert requests.post(url, data=png(), headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert requests.post(url, data=png(), headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    for origin in ("http://evil.example", "null"):  # the latter of a frame in a sandbox
        assert requests.post(url, data=png(), headers={"Origin": origin}).status_code == 403
    assert requests.post(url, data=png(), headers={"Origin": served.url}).status_code == 200
    response = requests.post(url, data=png(), headers={"Host": "evil.example"})
    assert response.status_code == 403 and "names of its own machine" in response.json()["error"]
    for name in ("127.0.0.2:8000", "LOCALHOST", "[::1]:80"):
        assert requests.post(url, data=png(), headers={"Host": name}).status_code == 200


def test_words_without_images_are_few(served):
    """Or a server would read them for seconds, and say nothing meanwhile."""
    url, kind = f"{served.url}/v1/feedback", {"Content-Type": "application/x-www-form-urlencoded"}
    response = requests.post(url, data=b"a=1&" * 20_000, headers=kind)
    assert response.status_code == 413 and "at most 65,536 bytes" in response.json()["error"]
    response = requests.post(url, data=b"a=1&" * 9, headers=kind)
    assert response.status_code == 400 and "at most 8 fields" in response.json()["error"]


def test_half_characters_are_no_server_error(served):
    response = requests.post(f"{served.url}/v1/feedback", data=b'{"id": "\\ud800", "right": true}', headers=JSON)
    assert response.status_code == 404 and response.json()["error"] == "no answer has this id"
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a\\ud800.png"\r\n\r\n'
        + png()
        + b"\r\n--x--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = requests.post(f"{served.url}/v1/predict", data=form, headers=kind)
    assert response.status_code in (200, 400), response.text


@pytest.mark.by_turns
def test_another_address_demands_a_token(trained, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    command = [sys.executable, "-m", "vitcls.serve", f"--workdir={trained}", "--host=0.0.0.0", "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "can be reached from other machines: give --token_file=FILE" in done.stderr
    database = f"--database=sqlite:///{tmp_path}/f.db"
    with server(f"--workdir={trained}", "--host=0.0.0.0", f"--token_file={token}", database) as running:
        for path in ("/", "/page.js", "/docs", "/healthz", "/readyz"):
            assert requests.get(f"{running.url}{path}").status_code == 200
        for path in ("/v1/model", "/metrics", "/v1/feedback", "/openapi.json", "/nothing"):
            assert requests.get(f"{running.url}{path}").status_code == 401
        assert running.predict(("a.png", png())).status_code == 401
        wrong, right = ({"Authorization": f"Bearer {word}"} for word in ("0123", "0123456789abcdef0123"))
        assert running.predict(("a.png", png()), headers=wrong).status_code == 401
        assert running.predict(("a.png", png()), headers=right).status_code == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give one of --workdir=DIR and --artefact=FILE"),
        (["--artefact=/nowhere.zip"], "/nowhere.zip is not there"),
        (["--workdir=/nowhere/at/all"], "/nowhere/at/all is not the workdir of a run"),
        (["--workdir=tests"], "tests is not the workdir of a run: its config.json cannot be read"),
        (["--workdir=RUN", "--database=sqlite://"], "a database of feedback is sqlite:///PATH or postgresql://"),
        (
            ["--workdir=RUN", "--database=sqlite:////dev/null/f.db"],
            "/dev/null/f.db cannot be: /dev/null is not a directory",
        ),
        (["--workdir=tests", "--port=99999999"], "cannot be listened on"),
        (["--workdir=tests", "--workers=0"], "--workers=0 must be at least 1"),
        (["--workdir=tests", "--token_file=/nowhere"], "--token_file=/nowhere cannot be read: No such file"),
        (["--workdir=RUN", "--checkpoint=7"], "checkpoint '7' is not there; use 'last', 'best' or one of"),
        (["--workdir=RUN", "--proxy=nginx"], "--proxy=nginx: 'nginx' is not an IP address"),
        (["--artefact=README.md"], "README.md is no exported program of vitcls"),
        (["--artefact=RUN/half.tflite"], "half.tflite is no exported program of vitcls"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_left(flags, words, trained, tmp_path):
    run = tmp_path / "run"  # of its own: a server of another test may yet write to the shared one
    shutil.copytree(trained, run, ignore=lambda folder, names: {name for name in names if "drift.json" in name})
    (run / "half.tflite").write_bytes(b"\x1c\0\0\0TFL3")
    before = set(run.rglob("*"))
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    done = subprocess.run([sys.executable, "-m", "vitcls.serve", *flags], capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert words in lines[-1] and lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert set(run.rglob("*")) == before
    assert not pathlib.Path("tests/feedback.db").exists() and not pathlib.Path("README.md.feedback.db").exists()


def hostile(rng):
    """Bytes that are nearly a request: pictures that are cut, changed or not there, forms and JSON that are broken."""
    picture = png(rng.randrange(99), size=(rng.randrange(1, 60), rng.randrange(1, 60)), channels=rng.choice((1, 3)))
    if rng.random() < 0.3:
        buffer, kind = io.BytesIO(), rng.choice(("JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"))
        Image.open(io.BytesIO(picture)).convert("RGB").save(buffer, kind)
        picture = buffer.getvalue()
    changed = bytearray(picture)
    for _ in range(rng.randrange(0, 20)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    image = rng.choice(
        (bytes(changed), picture[: rng.randrange(len(picture))], rng.randbytes(300), b"", claiming(20_000, 20_000))
    )
    boundary = rng.choice(("a", "--", "x" * 300, ""))
    name = rng.choice(("a", "../../x", "\0"))
    form = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    bodies = {
        "image/png": image,
        "application/octet-stream": image,
        "application/json": rng.choice(
            (
                json.dumps({"image": base64_of(image)}).encode(),
                b'{"images": {}}',
                b'{"image": null}',
                b"null",
                b"\xff",
                image,
            )
        ),
        f"multipart/form-data; boundary={boundary}": form.encode() + image + f"\r\n--{boundary}--".encode(),
        "multipart/form-data; boundary=": form.encode(),
        rng.choice(("", "\u00e9/x", "a" * 5000)): image,
    }
    kind = rng.choice(list(bodies))
    return kind, bodies[kind]


def resident(pid):
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_two_thousand_hostile_uploads(served):
    rng = random.Random(0)
    before, seen = resident(served.process.pid), set()
    for i in range(2000):
        kind, body = hostile(rng)
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        route = rng.choice(("/v1/predict",) * 8 + ("/v1/feedback",))
        if i % 50 == 0:  # no HTTP at all, or half of a request
            with socket.create_connection(("127.0.0.1", served.port)) as raw:
                raw.sendall(rng.choice((body[:100], b"POST /v1/predict HTTP/1.1\r\nContent-Length: 99\r\n\r\nx")))
            continue
        connection.request("POST", route, body=body, headers={"Content-Type": kind.encode("utf-8")})
        response = connection.getresponse()
        said = response.read()
        seen.add(response.status)
        assert response.status in STATUSES, (kind, body[:200], said)
        assert b"Traceback" not in said and b"/root" not in said and b"site-packages" not in said
        connection.close()
    assert {200, 400, 415, 422} <= seen and 500 not in seen, seen
    assert resident(served.process.pid) - before < 200 * 2**20
    assert served.predict(("a.png", png())).status_code == 200
