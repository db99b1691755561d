"""Workdirs in a bucket of a real server: what is in it, and what a bucket cannot do."""

import json
import os
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image

from tests import bucket
from tests.conftest import make_tiny_config
from vitcls import api, cli, compare, evaluate, predict, status
from vitcls.core import buckets
from vitcls.core.errors import RunError, UserError
from vitcls.train import train_and_evaluate
from vitcls.training import build, checkpoint, places, run_dir
from vitcls.training.metrics_log import read_history

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytestmark = pytest.mark.usefixtures("no_pictures")


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
    train_and_evaluate(make_tiny_config(), "gs://runs/finished/run")
    return "gs://runs/finished/run"


def test_a_run_in_a_bucket_is_that_in_a_directory(finished, trained, server):
    jax.tree.map(np.testing.assert_array_equal, variables(finished, 12), variables(trained, 12))
    copy = places.copied(finished)
    assert without_timings(read_history(copy)) == without_timings(read_history(trained))
    names = {name.removeprefix("runs/finished/run/") for name in server.find("runs/finished/run")}
    assert {"config.json", "dataset.json", "metrics.jsonl", "report/metrics.json", "report/index.html"} <= names
    assert not any(part in name for name in names for part in ("tmp", "lock", ".parts", ".new"))
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {
        str(step) for step in checkpoint.steps(trained / "checkpoints")
    }
    assert checkpoint.damage(copy / "checkpoints" / "12") is None


def test_every_command_reads_a_bucket(finished, server, tmp_path, capsys):
    before = server.cat_file("runs/finished/run/report/metrics.json")
    results = evaluate.evaluate(finished, split="validation")
    after = json.loads(server.cat_file("runs/finished/run/report/metrics.json"))
    assert after["split"] == "validation" and after["accuracy"] == results["accuracy"]
    assert json.loads(before)["split"] == "test"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert cli.run(predict.main, [f"--workdir={finished}", "--json", str(tmp_path / "a.png")]) == 0
    assert len(json.loads(capsys.readouterr().out)["top"]) == 3


def test_a_run_that_is_alive_is_left_alone(finished, tiny_config, server):
    before = server.find("runs/finished/run")
    with places.opened(finished) as place, place.hold() as lock:
        lock.check()
        with pytest.raises(UserError, match=r"gs://runs/finished/run is in use by process \d+ on .*; wait for it"):
            train_and_evaluate(tiny_config, finished)
    assert server.find("runs/finished/run") == before


def test_copies_of_killed_processes_are_removed(finished, tmp_path):
    """And those of living ones are not, nor what a bucket lacks for good."""
    script = "import sys; from vitcls.training import places\n"
    script += "with places.opened(sys.argv[1]) as place: print(place.path.name, flush=True); sys.stdin.read()"
    command, pipes = [sys.executable, "-c", script, finished], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"VITCLS_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed, living = (subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2))
    names = [process.stdout.readline().strip() for process in (killed, living)]
    (tmp_path / "workdirs" / "kept").mkdir()
    killed.kill()
    killed.wait()
    with places.opened(finished) as place:
        there = {path.name for path in (tmp_path / "workdirs").iterdir() if path.is_dir()}
    living.communicate("", timeout=60)
    killed.communicate()
    assert there == {names[1], place.path.name, "kept"} and names[0] not in there
    assert [path.name for path in (tmp_path / "workdirs").iterdir()] == ["kept"]


def test_a_bucket_of_s3(tiny_config, trained, monkeypatch, capsys):
    """Kept by moto's server, which knows of exclusive creation as S3 does."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it knows its server from the start
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
        check_patterns(files, "s3", capsys)
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


def test_errors_and_results_name_what_the_user_has_typed(finished, server, trained, tiny_config, tmp_path, capsys):
    """And never the copy, of which nobody knows."""
    other, image = "gs://runs/named/run-seed1", tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    for run in (finished, trained):  # other tests may have evaluated it on other images
        evaluate.evaluate(run)
    for name in server.find("runs/finished/run"):
        server.pipe_file(name.replace("finished/run", "named/run-seed1"), server.cat_file(name))
    config = json.loads((trained / "config.json").read_text()) | {"seed": 1}
    server.pipe_file("runs/named/run-seed1/config.json", json.dumps(config).encode())
    server.pipe_file("runs/named/run-seed1/checkpoints/12/record/metadata", b"damaged")

    def error_of(command, *arguments):
        assert cli.run(command, [*map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "workdirs") not in said
        return said.splitlines()[-1]

    same = "are the same training, with seed 0; give one of them"
    assert error_of(compare.main, finished, trained) == f"error: {finished} and {trained} {same}"
    assert error_of(predict.main, f"--workdir={finished}", "--coverage=0.9", image) == (
        f"error: {finished} has no calibration.json; run vitcls calibrate --workdir={finished} first"
    )
    tiny_config.seed = 1
    with pytest.raises(UserError, match=f"^{finished} holds a run with another config.json: seed was 0, is 1"):
        train_and_evaluate(tiny_config, finished)
    tiny_config.seed, tiny_config.total = 0, "16 steps"
    with pytest.raises(UserError, match=f"which may begin with its weights: --config.init.weights={finished} "):
        train_and_evaluate(tiny_config, finished)
    result = compare.compare([finished, other])
    assert [run["workdir"] for run in result["runs"]] == [finished, other]
    assert [group["name"] for group in result["groups"]] == ["run"]
    assert cli.run(predict.main, [f"--workdir={other}", "--checkpoint=last", str(image)]) == 0
    assert f"checkpoint {other}/checkpoints/12 is passed over" in capsys.readouterr().err
    server.rm_file("runs/named/run-seed1/report/predictions.npz")
    assert error_of(compare.main, finished, other).startswith(f"error: {other} has no report/predictions.npz; ")
    assert repr(api.open_run(other)).startswith(f"Run('{other}': ")


def check_patterns(files, scheme, capsys):
    """Of a bucket that no other test puts runs there."""
    for name in ("many/k2", "many/k10", "many/k1", "many/more/k3"):
        files.pipe_file(f"runs/{name}/config.json", b'{"total": "1 epochs"}')
    files.pipe_file("runs/many/notes/text.txt", b"no run")
    for pattern, names in (("many/*", "k1 k10 k2"), ("many/k1*/", "k1 k10"), ("many/*/k3", "more/k3")):
        urls = [f"{scheme}://runs/many/{name}" for name in names.split()]
        assert cli.run(status.main, [f"{scheme}://runs/{pattern}", urls[0]]) == 0  # each once
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == urls
    assert cli.run(status.main, [f"{scheme}://runs/none/*", f"{scheme}://runs/many/k1"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == (
        f"error: {scheme}://runs/none/* is the workdir of no run: no folder that matches it has a config.json\n"
    )


def test_a_pattern_means_all_runs_that_match_it(server, capsys):
    check_patterns(server, "gs", capsys)


def test_a_checkpoint_that_is_cut_off_on_the_way_is_not_taken_for_one(finished, monkeypatch):
    files = buckets.file_system(finished, "--workdir")  # fsspec keeps one for all
    fetch = files.get_file

    def cut(remote, local, **options):
        fetch(remote, local, **options)
        if "/tree/d/" in remote:
            os.truncate(local, 10)

    monkeypatch.setattr(files, "get_file", cut)
    with pytest.raises(RunError, match=r"gs://runs/finished/run/checkpoints/\d+/tree/d/\w+ cannot be read as a whole"):
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
        for name in parts.superseded:
            del bucket_[name]
        parts.superseded = []

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
    path.write_text(path.read_text()[:-4] + '{"step": 20}\n')
    bucket_ |= dict(parts.next(path, whole=True))  # a kill -9 before the parts are removed
    assert read() == path.read_text()
    assert sorted(parts.superseded) == sorted(bucket_.keys() - {"metrics.jsonl"})
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
