"""Workdirs in a bucket of a real server: kills, outages, several processes, and what a bucket cannot do."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image

from tests import bucket
from tests.conftest import make_tiny_config
from vitcls import cli, evaluate, predict, status
from vitcls.core import buckets
from vitcls.core.errors import RunError, UserError
from vitcls.train import train_and_evaluate
from vitcls.training import build, checkpoint, places, run_dir
from vitcls.training.metrics_log import read_history

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytestmark = pytest.mark.usefixtures("no_pictures")
# A run that is killed when it has begun to send its second checkpoint.
KILLED = """
import json, os, signal, sys
import vitcls.config as configs
from vitcls import train_and_evaluate
from vitcls.training import places

places._PERIOD = 0.05
send = places.Bucket._send

def send_until(self, name, **options):
    if name.startswith("checkpoints/8/") and name.endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, name, **options)

places.Bucket._send = send_until
train_and_evaluate(configs.from_json(sys.stdin.read()), sys.argv[1])
"""


@pytest.fixture(scope="module")
def server():
    process, url = bucket.start_server()
    os.environ["STORAGE_EMULATOR_HOST"] = url
    yield bucket.files()
    del os.environ["STORAGE_EMULATOR_HOST"]
    process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Looks at the files more often, and copies them where the test sees what is left."""
    monkeypatch.setattr(places, "_PERIOD", 0.05)
    monkeypatch.setattr(places, "_SETTLE", 0.01)
    monkeypatch.setattr(places, "cache_dir", lambda: tmp_path)


def variables(path, step):
    opened = run_dir.open_workdir(path)
    return opened.restore(build.make_model(opened.config, opened.info), str(step))[1]


def without_timings(events):
    return [
        {k: v for k, v in event.items() if k not in ("train/seconds", "train/images_per_second")} for event in events
    ]


@pytest.fixture(scope="module")
def finished(server):
    """A run that was killed -9 while its second checkpoint went up, and went on elsewhere to its end."""
    config, url = make_tiny_config(), "gs://runs/killed/run"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, url],
        input=json.dumps(config.to_dict()),
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        text=True,
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    there = server.find("runs/killed/run")
    torn = [name for name in there if "/checkpoints/8/" in name]
    assert torn and not any(name.endswith("/8/manifest.json") for name in torn)
    train_and_evaluate(config, url)
    return url


def test_a_run_killed_in_the_middle_of_an_upload_ends_bit_equal_elsewhere(finished, trained, server):
    jax.tree.map(np.testing.assert_array_equal, variables(finished, 12), variables(trained, 12))
    copy = places.copied(finished)
    assert without_timings(read_history(copy)) == without_timings(read_history(trained))
    names = {name.removeprefix("runs/killed/run/") for name in server.find("runs/killed/run")}
    assert {"config.json", "dataset.json", "metrics.jsonl", "report/metrics.json", "report/index.html"} <= names
    assert not any(part in name for name in names for part in ("tmp", "lock", ".parts", ".new"))
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {
        str(step) for step in checkpoint.steps(trained / "checkpoints")
    }
    assert checkpoint.damage(copy / "checkpoints" / "12") is None


def test_every_command_reads_a_bucket(finished, server, tmp_path, capsys):
    before = server.cat_file("runs/killed/run/report/metrics.json")
    results = evaluate.evaluate(finished, split="validation")
    after = json.loads(server.cat_file("runs/killed/run/report/metrics.json"))
    assert after["split"] == "validation" and after["accuracy"] == results["accuracy"]
    assert json.loads(before)["split"] == "test"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert cli.run(predict.main, [f"--workdir={finished}", "--json", str(tmp_path / "a.png")]) == 0
    assert len(json.loads(capsys.readouterr().out)["top"]) == 3


def test_a_run_that_is_alive_is_left_alone(finished, tiny_config, server):
    before = server.find("runs/killed/run")
    with places.opened(finished) as place, place.hold() as lock:
        lock.check()
        with pytest.raises(UserError, match=r"gs://runs/killed/run is in use by process \d+ on .*; wait for it"):
            train_and_evaluate(tiny_config, finished)
    assert server.find("runs/killed/run") == before


def test_a_bucket_of_s3(tiny_config, trained, monkeypatch, capsys):
    """Kept by moto's server, which knows of exclusive creation as S3 does."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    kept = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    kept.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*kept.get_host_and_port()))
    try:
        files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("runs")
        train_and_evaluate(tiny_config, "s3://runs/a/run")
        jax.tree.map(np.testing.assert_array_equal, variables("s3://runs/a/run", 12), variables(trained, 12))
        assert files.exists("runs/a/run/report/index.html") and not files.exists("runs/a/run/lock.json")
        lock = places._LockObject(files, "runs/b", "s3://runs/b")
        monkeypatch.setattr(lock, "read", lambda: None)  # both have looked before either has written
        files.pipe_file("runs/b/lock.json", b"the other's")
        assert not lock.create("ours")
        assert files.cat_file("runs/b/lock.json") == b"the other's"
        assert cli.run(status.main, ["s3://nowhere/run"]) == 2
        assert "the bucket s3://nowhere is not there" in capsys.readouterr().err
    finally:
        kept.stop()


def test_its_state_is_seen_from_afar(finished, server, capsys):
    def look():
        assert cli.run(status.main, [finished, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    seen = look()
    assert (seen["workdir"], seen["step"], seen["checkpoint_step"]) == (finished, 12, 12)
    assert seen["state"] == "finished"
    with places.opened(finished, arrays=False) as place:
        assert not any("tree" in path.parts for path in place.path.rglob("*"))
        with places.opened(finished) as held, held.hold():
            place.refresh()
            assert look()["state"] == "alive"
            assert (place.path / "lock.json").exists()
        place.refresh()
        assert not (place.path / "lock.json").exists()


@pytest.mark.slow  # gcsfs tries for half a minute
def test_a_server_that_dies_ends_no_watch_and_hides_no_other_run(monkeypatch, tmp_path, capsys):
    process, url = bucket.start_server()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    fsspec.filesystem("gs").clear_instance_cache()
    bucket.files().pipe_file("runs/a/config.json", b"{}")
    (tmp_path / "config.json").write_text("{}")
    with contextlib.ExitStack() as held:
        looking = status._Looking([str(tmp_path), "gs://runs/a"], held)
        assert [run["state"] for run in looking.look()] == ["begun", "begun"] and not looking.wrong
        process.kill()
        process.communicate()
        assert [run["workdir"] for run in looking.look()] == [str(tmp_path), "gs://runs/a"]
        assert [str(error)[:34] for error in looking.wrong] == ["gs://runs/a cannot be reached (Can"]
    fsspec.filesystem("gs").clear_instance_cache()
    assert cli.run(status.main, ["gs://runs/a", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.count("begun") == 1
    assert err.startswith("error: the bucket gs://runs is out of reach: ") and err.count("\n") == 1


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_bucket_that_is_out_of_reach_does_not_stop_a_run(comes_back, tmp_path, server, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vitcls")
    monkeypatch.setattr(places, "_PATIENCE", 0.5)
    reachable = threading.Event()
    send = places.Bucket._send

    def send_if_reachable(self, name, **options):
        if not reachable.is_set():
            raise OSError("no route to host")
        send(self, name, **options)

    monkeypatch.setattr(places.Bucket, "_send", send_if_reachable)

    def run():
        with places.opened(f"gs://runs/away/{comes_back}") as place, place.hold():
            (place.path / "config.json").write_text("{}")
            deadline = time.monotonic() + 10
            while "cannot be reached" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            if comes_back:
                reachable.set()

    if comes_back:
        run()
        assert "is reached again after 0 s" in caplog.text
        assert server.cat_file("runs/away/True/config.json") == b"{}"
    else:
        with pytest.raises(RunError, match=r"could not be reached for 0 s; what it lacks is in (\S+)") as error:
            run()
        assert (tmp_path / "workdirs" / os.path.basename(str(error.value).split()[-1]) / "config.json").exists()
    assert caplog.text.count("cannot be reached (no route to host); the run goes on and tries again") == 1


def test_a_checkpoint_that_is_cut_off_on_the_way_is_not_taken_for_one(finished, monkeypatch):
    files = buckets.file_system(finished, "--workdir")  # fsspec keeps one for all
    fetch = files.get_file

    def cut(remote, local):
        fetch(remote, local)
        if "/tree/d/" in remote:
            os.truncate(local, 10)

    monkeypatch.setattr(files, "get_file", cut)
    with pytest.raises(RunError, match=r"gs://runs/killed/run/checkpoints/\d+/tree/d/\w+ cannot be read as a whole"):
        places.copied(finished)


def test_the_manifest_of_an_older_checkpoint_goes_up_first():
    manifests = [f"checkpoints/{step}/manifest.json" for step in (8, 12, 100)]
    files = ["metrics.jsonl", "checkpoints/8/tree/d/0", "checkpoints/12/tree/d/0", *manifests]
    assert sorted(set(files), key=places._order) == files


@pytest.mark.filterwarnings("ignore:Sending a large body")  # of aiohttp, about gcsfs's way
def test_files_arrive_as_they_are(server, tmp_path):
    """Whatever they end in: of a carriage return, a server of MIME messages makes a line break."""
    contents = [bytes(range(256)) * 3 + end for end in (b"", b"\r", b"\n", b"\r\n", b"\n--==0==", b"\r\r")]
    contents += [b"", b"\r", b"\r" * 6 * 2**20]
    for i, content in enumerate(contents):
        path = tmp_path / "run" / "checkpoints" / "4" / f"{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (path.parent / "manifest.json").write_bytes(b"{}")
    places.publish("gs://runs/bytes", tmp_path / "run", "checkpoints")
    copy = places.copied("gs://runs/bytes") / "checkpoints" / "4"
    assert [(copy / f"{i}").read_bytes() for i in range(len(contents))] == contents


def test_events_go_up_in_parts_and_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_PART_BYTES", 20)
    path, bucket_, parts = tmp_path / "metrics.jsonl", {}, places._Parts()
    sizes = []

    def send(**options):
        for name, data in parts.next(path, **options):
            bucket_[name] = data
            sizes.append(len(data))
        for name in parts.superseded():
            del bucket_[name]

    def read():
        places._Parts().read(bucket_, tmp_path / "back")
        return (tmp_path / "back" / "metrics.jsonl").read_text()

    (tmp_path / "back").mkdir()
    with open(path, "w") as file:
        for i in range(20):
            file.write(f'{{"step": {i}}}\n')
            file.flush()
            send(whole=False)
            assert read() == path.read_text()
        file.write('{"st')  # a line that is not whole yet
        file.flush()
        send(whole=False)
    assert read() == "".join(f'{{"step": {i}}}\n' for i in range(20))
    assert max(sizes) < 40 and len(bucket_) > 5  # nothing is sent again and again
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 0}\n')
    os.replace(replaced, path)
    send(whole=False)
    assert set(bucket_) == {"metrics.jsonl"} and read() == '{"step": 0}\n'
    send(whole=True)
    assert read() == '{"step": 0}\n'


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://nowhere/run", "the bucket gs://nowhere is not there; create it, or use another --workdir"),
        ("gs://runs", "give a directory, gs://BUCKET/DIR or s3://BUCKET/DIR"),
        ("gs:/runs/run", "give a directory, gs://BUCKET/DIR or s3://BUCKET/DIR"),
        ("file:///tmp/run", "give a directory, gs://BUCKET/DIR or s3://BUCKET/DIR"),
        ("gs://runs/empty", "gs://runs/empty is not the workdir of a run"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(url, words, server, capsys):
    assert cli.run(evaluate.main, [f"--workdir={url}"]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
