"""Preparing a set: the failures for real, in processes whose only way to the network is a port that leads nowhere."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from vitcls import cli
from vitcls.core.errors import UserError
from vitcls.data.sources.tfds import find_builder
from vitcls.prepare import _nothing_half_done, main, prepare

ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment_behind(proxy: socket.socket) -> dict[str, str]:
    """The environment of a process whose only way to the network is this port."""
    proxy.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "ftp", "all")]
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return environment | dict.fromkeys(names, address) | dict.fromkeys(map(str.upper, names), address)


@pytest.fixture
def offline():
    """The environment of a process whose connections are refused."""
    with socket.socket() as proxy:
        yield environment_behind(proxy)


@pytest.fixture
def stalled():
    """The environment of a process whose connections are taken and never answered."""
    with socket.socket() as proxy:
        environment = environment_behind(proxy)
        proxy.listen()
        yield environment


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT reaches what is started here, also where this process ignores it (as a shell's background jobs do)."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler ends with exec, ignoring does not
    yield
    signal.signal(signal.SIGINT, previous)


def start(*arguments, environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "vitcls.prepare", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tree(root: pathlib.Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def used_directory(tmp_path):
    """A data directory with things in it: another set, an archive of this one, and another program's download."""
    for name in ("mnist/3.0.1/data", "downloads/cifar10/whole.tar.gz", "downloads/mnist/x.tmp.0/part", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.by_turns
def test_a_failed_download_is_one_line_and_leaves_everything_as_it_was(offline, used_directory):
    before = tree(used_directory)
    existing = start("cifar10", f"--data_dir={used_directory}", environment=offline)
    fresh = start("cifar10", f"--data_dir={used_directory / 'new' / 'deep'}", environment=offline)
    for process in (existing, fresh):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors.startswith("failed: 'cifar10' could not be prepared in ") and errors.count("\n") == 1
        assert "needs the network" in errors and "Traceback" not in errors
    assert tree(used_directory) == before


@pytest.mark.by_turns
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_download_leaves_everything_as_it_was(stalled, used_directory, number, code):
    before = tree(used_directory)
    process = start("cifar10", f"--data_dir={used_directory}", environment=stalled)
    deadline = time.monotonic() + 60
    while not list(used_directory.glob("downloads/cifar10/*.tmp.*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "stopped; nothing half done was left\n")
    assert tree(used_directory) == before


def test_what_is_whole_or_was_there_is_kept(tmp_path):
    folders = [tmp_path / "data" / "cifar10", tmp_path / "data" / "downloads" / "cifar10"]

    def write(folder: pathlib.Path, name: str):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    write(folders[1], "before.tmp.0/part")
    with pytest.raises(KeyError), _nothing_half_done(folders):
        write(folders[0], "incomplete.X_3.0.2/shard")
        write(folders[0], ".config/metadata.json")
        write(folders[1], "whole.tar.gz")
        write(folders[1], "other.zip.tmp.1/part")
        write(folders[1], "extracted/incomplete.2_other/file")
        write(tmp_path / "data", "mnist/incomplete.Y_3.0.1/shard")  # of another process
        raise KeyError
    kept = {str(path.relative_to(tmp_path / "data")) for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {
        "downloads/cifar10/before.tmp.0/part",
        "downloads/cifar10/whole.tar.gz",
        "mnist/incomplete.Y_3.0.1/shard",
    }
    assert not folders[0].exists() and not (folders[1] / "extracted").exists()


@pytest.mark.by_turns
def test_what_must_be_fetched_by_hand_is_said(offline, tmp_path):
    process = start("imagenet2012", f"--data_dir={tmp_path}", environment=offline)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert f"{tmp_path / 'downloads' / 'manual'}" in errors
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_prepared(capsys, tmp_path):
    def said(*arguments):
        assert cli.run(main, list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert "'cifar1000' is not known; did you mean 'cifar100'?" in said("cifar1000", f"--data_dir={tmp_path}")
    assert "'huggingface:x/y' has a namespace" in said("huggingface:x/y", f"--data_dir={tmp_path}")
    assert "needs no preparation" in said("digits")
    assert "required: NAME" in said()
    assert "flag '--nothing' is not known" in said("cifar10", "--nothing")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_in_the_way_is_named_and_kept(tmp_path, capsys):
    place = pathlib.Path(find_builder("cifar10", str(tmp_path)).data_dir)
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    assert cli.run(main, ["cifar10", f"--data_dir={tmp_path}"]) == 1
    assert f"{place} is there, but holds no prepared data set" in capsys.readouterr().err
    assert (place / "mine.txt").read_text() == "mine"


PREPARE_MNIST = """
import sys, tensorflow_datasets as tfds, numpy as np
builder = tfds.builder("mnist", data_dir=sys.argv[1])
builder._split_generators = lambda *_: {"train": [(0, {"image": np.zeros((28, 28, 1), np.uint8), "label": 0})]}
builder.download_and_prepare()
"""


@pytest.mark.by_turns
def test_a_prepared_set_is_left_alone(tmp_path, capsys):
    subprocess.run([sys.executable, "-c", PREPARE_MNIST, tmp_path], check=True, capture_output=True)
    before = tree(tmp_path)
    assert cli.run(main, ["mnist", f"--data_dir={tmp_path}"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("mnist was already prepared in ") and captured.err == ""
    assert tree(tmp_path) == before
    with pytest.raises(UserError):
        prepare("npz")
