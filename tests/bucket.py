"""Real servers of the APIs of Google Cloud Storage and S3, in processes of their own, and a proxy before them.

Each has one bucket, `runs`. The proxy catches a request, so that a test can act in the middle of it, and can be away.
"""

import contextlib
import http.client
import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.parse

import fsspec

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # as vitcls sets it, before gcsfs is imported
_SECONDS = 120  # that a test waits for a request
_SERVERS = {
    "gs": """
from gcp_storage_emulator.server import create_server

server = create_server("localhost", port, in_memory=not directory, default_bucket="runs", data_dir=directory)
server.start()
port = server._api._httpd.server_address[1]
""",
    "s3": """
import boto3
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
server.start()
port = server.get_host_and_port()[1]
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="runs")
""",
}
_SERVER = """
import contextlib, os, sys

port, directory = int(sys.argv[1]), sys.argv[2]
with contextlib.redirect_stdout(sys.stderr):
    {start}
print(port, flush=True)
sys.stdin.read()
os._exit(0)
"""


def start_server(scheme="gs", *, port=0, directory=""):
    """The process, which ends with its standard input, and the URL of the server.

    Of gs, what is in the bucket may be kept in a `directory`, and be there when another process is started on it.
    """
    start = textwrap.indent(_SERVERS[scheme], "    ").strip()
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER.format(start=start), str(port), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment("s3", ""),
        text=True,
    )
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


def environment(scheme, url):
    """The variables by which clients find the server at `url`."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": url}
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "nobody")
    return {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"} | keys


def files(scheme="gs", url=None):
    """fsspec's view of the server at `url`, or of that which the environment names."""
    options = {"token": "anon"} if scheme == "gs" else {}
    return fsspec.filesystem(scheme, endpoint_url=url, use_listings_cache=False, skip_instance_cache=True, **options)


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server at `upstream`, whole or not at all, as a store takes them.

    They are told apart as 'METHOD PATH', where the path ends in the name of the object, also of gs, whose clients say
    it once and then send the contents to a URL that was made for them. `answered` counts them.
    """

    daemon_threads = True

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.is_away = False
        self.answered = 0
        self.names = {}  # of gs: the id of an upload -> the name of its object
        self._catch = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def catch(self, pattern, at):
        """Within, requests that match `pattern` stand still, and are cut off at its end; gives what waits for one.

        `at` is when: 'head', before anything of the body is read, 'half' of it, or 'answer', which the server has
        given and the client does not see.
        """
        self._catch = catch = _Catch(re.compile(pattern), at)
        try:
            yield catch.wait
        finally:
            self._catch = None
            catch.over.set()

    @contextlib.contextmanager
    def away(self):
        """Within, requests are cut off."""
        self.is_away = True
        try:
            yield
        finally:
            self.is_away = False

    def stand_still(self, request, at):
        """Raises ConnectionAbortedError, later, where the request is one to catch."""
        catch = self._catch
        if self.is_away:
            raise ConnectionAbortedError
        if catch and catch.at == at and catch.pattern.search(request):
            catch.seen.set()
            catch.over.wait()
            raise ConnectionAbortedError

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that are killed are what these tests are about."""


class _Catch:
    def __init__(self, pattern, at):
        self.pattern, self.at = pattern, at
        self.seen, self.over = threading.Event(), threading.Event()

    def wait(self):
        assert self.seen.wait(_SECONDS), f"no request matched {self.pattern.pattern}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self):
        proxy, request = self.server, self._request()
        proxy.stand_still(request, "head")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2)
        proxy.stand_still(request, "half")
        body += self.rfile.read(length - len(body))
        if len(body) < length:
            raise ConnectionAbortedError
        answer, content = self._ask(body)
        proxy.stand_still(request, "answer")
        upload = _query(answer.headers.get("Location", "")).get("upload_id")
        if upload:
            proxy.names[upload[0]] = json.loads(body)["name"]
        proxy.answered += 1
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.headers.get("Content-Length", len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = pass_on

    def _request(self):
        upload = _query(self.path).get("upload_id")
        path = urllib.parse.unquote(self.path.partition("?")[0])
        return f"{self.command} {path}/{self.server.names[upload[0]] if upload else ''}".rstrip("/")

    def _ask(self, body):
        with contextlib.closing(http.client.HTTPConnection(self.server.upstream, timeout=_SECONDS)) as connection:
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("connection", "expect")}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer, answer.read()

    def log_message(self, *arguments):
        pass


def _query(url):
    return urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
