"""A real server of Google Cloud Storage's API on this machine, in a process of its own, with one bucket `runs`."""

import os
import subprocess
import sys

import fsspec

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # as vitcls sets it, before gcsfs is imported
SERVER = """
import sys, threading
from gcp_storage_emulator.server import create_server

server = create_server("localhost", 0, in_memory=True, default_bucket="runs")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()
import os
os._exit(0)
"""


def start_server():
    """The process, which ends with its standard input, and the URL of the server."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


def files():
    """fsspec's view of the server that STORAGE_EMULATOR_HOST names."""
    return fsspec.filesystem("gs", token="anon", use_listings_cache=False, skip_instance_cache=True)
