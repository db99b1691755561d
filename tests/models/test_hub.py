"""Weights by name, against a server on this machine that answers as the Hugging Face Hub does."""

import hashlib
import http.server
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest

from tests.models.test_weight_files import safetensors
from vitcls import adopt, cli
from vitcls.core.cache import cache_dir
from vitcls.core.errors import UserError
from vitcls.models import create
from vitcls.models.variables import variable_shapes
from vitcls.models.weights import hub
from vitcls.models.weights.to_torch import to_torch

pytest.importorskip("huggingface_hub")
NAME = "timm/lenet_of_tests.v1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one file; `said` is the SHA-256 that it claims, `asked` what was asked of it."""

    content = b""
    said = ""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append((self.command, self.path))
        known = self.path.split("?")[0] in (f"/{NAME}/resolve/{revision}/{hub.FILE}" for revision in ("main", COMMIT))
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.server.said}"')
        self.send_header("Content-Length", str(len(self.server.content) if known else 0))
        self.end_headers()
        return known

    def do_GET(self):
        if self.do_HEAD():
            self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A file as torchvision would write a ResNet."""
    rng = np.random.default_rng(0)
    model = create("resnet18", 7)
    shapes = variable_shapes(model, (64, 64, 3))
    variables = {
        kind: _map(lambda leaf: rng.random(leaf.shape, np.float32), shapes[kind]) for kind in ("params", "batch_stats")
    }
    path = tmp_path_factory.mktemp("hub") / "resnet.safetensors"
    return pathlib.Path(safetensors(path, to_torch("resnet18", variables))).read_bytes()


def _map(function, tree):
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


@pytest.fixture
def server(content, monkeypatch):
    found = Hub()
    found.content, found.said = content, hashlib.sha256(content).hexdigest()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.shutdown()
    found.server_close()
    shutil.rmtree(cache_dir() / "hub", ignore_errors=True)


def test_a_name_is_fetched_once_and_checked(server, content):
    path = hub.located(NAME)
    assert pathlib.Path(path).read_bytes() == content and str(cache_dir()) in path
    count = len(server.asked)
    assert hub.located(NAME) == path and len(server.asked) == count
    assert any(path.startswith(f"/{NAME}/resolve/{COMMIT}/") for kind, path in server.asked if kind == "GET")


@pytest.mark.by_turns
def test_adopt_takes_a_name(server, capsys):
    assert cli.run(adopt.main, [NAME]) == 0
    assert "resnet18" in capsys.readouterr().out


def test_what_is_not_what_the_hub_says_is_refused_and_not_kept(server):
    server.said = "0" * 64
    with pytest.raises(UserError, match="was changed on its way"):
        hub.located(NAME)
    server.said = "abc"
    with pytest.raises(UserError, match="does not say which SHA-256"):
        hub.located(NAME)
    assert not [path for path in (cache_dir() / "hub").rglob("*") if path.is_file()]


def test_a_file_that_has_changed_in_the_cache_is_refused(server):
    with open(hub.located(NAME), "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"delete .* to fetch it again"):
        hub.located(NAME)


def test_no_such_model_and_no_network_say_which_file_to_put_where(server, capsys):
    assert cli.run(adopt.main, ["timm/none.v1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timm/none.v1 could not be fetched" in line and "/timm/none.v1/resolve/main/model.safetensors" in line
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    assert cli.run(adopt.main, [NAME]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be fetched" in line and "download http://127.0.0.1:9/" in line


def test_files_and_directories_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    assert hub.is_name("timm/resnet50.a1_in1k")
    (tmp_path / "timm" / "resnet50.a1_in1k").write_bytes(b"")
    assert not hub.is_name("timm/resnet50.a1_in1k")
    for other in ("timm/a/b", "google/vit", "timm/", "timm/../x", "resnet50", "/timm/resnet50"):
        assert not hub.is_name(other)
