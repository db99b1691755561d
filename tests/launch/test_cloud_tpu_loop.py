"""launch/cloud_tpu/run.sh against a cloud that fails: what it keeps, starts again, deletes and leaves alone.

gcloud and the cloud are the stand-in `fake_gcloud.sh`; the shells, files, processes and signals are real.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = ["--name=c100", "--project=project-1", "--zone=us-east5-b"]
TRAIN = ["--", "vitcls", "train", "--config=x.py", "--workdir=gs://bucket/c100", "--config.x='$HOME'", "--y=5  epochs"]
SAID = "worker 0: <train> <--config=x.py> <--workdir=gs://bucket/c100> <--config.x='$HOME'> <--y=5  epochs>\n"
# What the workers install, by programs that need no network, and what then trains: until its exit code is told.
PROGRAMS = {
    "python3": 'mkdir -p ~/.local/bin && cp "$CLOUD/programs/uv" ~/.local/bin/uv',
    "uv": """
case $1 in
  venv) mkdir -p env/bin ;;
  pip)
    echo install >>"$CLOUD/installs"
    [ ! -e "$CLOUD/no-index" ] && [ -e vitcls/pyproject.toml ] && cp "$CLOUD/programs/vitcls" env/bin
    ;;
esac""",
    "vitcls": r"""
worker=${HOME##*/}
echo "$worker" >>"$CLOUD/starts"
printf "worker $worker:" && printf ' <%s>' "$@" && echo
until [ -e "$CLOUD/end-$worker" ]; do sleep 0.05; done
code=$(cat "$CLOUD/end-$worker") && rm "$CLOUD/end-$worker"
echo "worker $worker ends" && exit "$code" """,
}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A small checkout of git with the launcher in it."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch" / "cloud_tpu", root / "launch" / "cloud_tpu")
    (root / "pyproject.toml").touch()
    commit(root)
    return root


def commit(root):
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "init", "--quiet", root], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=x"], check=True)


@dataclasses.dataclass
class Cloud:
    """The folder of the stand-in (see there), and the launcher."""

    path: pathlib.Path
    checkout: pathlib.Path
    launched: list = dataclasses.field(default_factory=list)

    def launch(self, action, *flags, silence=60, patience=60):
        """A launcher that looks ten times a second."""
        environment = os.environ | {
            "CLOUD": str(self.path),
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.path / "tmp"),
            "VITCLS_SECONDS_BETWEEN_LOOKS": "0.1",
            "VITCLS_SECONDS_OF_SILENCE": str(silence),
            "VITCLS_SECONDS_OF_PATIENCE": str(patience),
        }
        command = [self.checkout / "launch" / "cloud_tpu" / "run.sh", action, *HERE, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.launched.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return self.launched[-1]

    def run(self, *flags, train=TRAIN, **seconds):
        return self.launch("run", "--slice=v6e-16", "--spot", *flags, *train, **seconds)

    def write(self, name, text=""):
        """In one step, as a launcher may be reading."""
        (self.path / ".part").write_text(str(text))
        (self.path / ".part").rename(self.path / name)

    def remove(self, name):
        (self.path / name).unlink()

    def lines(self, name):
        file = self.path / name
        return file.read_text().split() if file.exists() else []

    def end(self, *codes):
        """The exit codes of the workers' trainings."""
        for worker, code in enumerate(codes):
            self.write(f"end-{worker}", code)

    def looks(self, verb="describe"):
        return self.lines("calls").count(verb)

    def wait_until(self, condition, *, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.lines("calls"), self.lines("state"), self.lines("starts"))
            time.sleep(0.02)

    def wait_for_starts(self, count):
        """Returns when the workers have started `count` trainings in all."""
        self.wait_until(lambda: len(self.lines("starts")) >= count)

    def wait_for_looks(self, count, verb="describe"):
        """Returns when gcloud was called for `verb` `count` times more."""
        until = self.looks(verb) + count
        self.wait_until(lambda: self.looks(verb) >= until)

    def kill(self, worker):
        """Kills what trains on a worker, and its shell, as the end of the machine does."""
        session = self.path / "workers" / str(worker) / "vitcls-run" / "session"
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["pkill", "-KILL", "--session", session.read_text().strip()])

    def alive(self):
        """How many workers train."""
        locks = (self.path / "workers").glob("*/vitcls-run/lock")
        return sum(subprocess.run(["flock", "--nonblock", lock, "true"]).returncode for lock in locks)


@pytest.fixture
def cloud(tmp_path, checkout):
    for name in ("bin", "tmp", "programs"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "gcloud").symlink_to(ROOT / "tests" / "launch" / "fake_gcloud.sh")
    for name, text in PROGRAMS.items():
        (tmp_path / "programs" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "programs" / name).chmod(0o755)
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    for launched in cloud.launched:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)
        launched.communicate()
    for worker in (0, 1):
        cloud.kill(worker)


def ended(launched, *, seconds=30):
    """(exit code, stdout, stderr) of a launcher."""
    out, err = launched.communicate(timeout=seconds)
    return launched.returncode, out, err


def test_all_goes_well(cloud):
    """Asked for, installed, trained, shown, deleted: each once; and nothing is left here."""
    run = cloud.run()
    cloud.wait_for_starts(2)
    cloud.wait_for_looks(3)
    cloud.end(0, 0)
    code, out, err = ended(run)
    assert (code, out) == (0, SAID + "worker 0 ends\n"), err
    assert sorted(cloud.lines("starts")) == ["0", "1"]
    assert [cloud.looks(verb) for verb in ("create", "scp", "delete")] == [1, 1, 1]
    assert not (cloud.path / "state").exists() and list((cloud.path / "tmp").iterdir()) == []


def test_a_training_outlives_ssh_that_is_away(cloud):
    run = cloud.run("--restarts=0")
    cloud.wait_for_starts(2)
    cloud.write("away", "0\n1\n")
    cloud.wait_for_looks(8)
    assert cloud.alive() == 2
    cloud.remove("away")
    cloud.end(0, 0)
    code, out, err = ended(run)
    assert (code, out) == (0, SAID + "worker 0 ends\n"), err
    assert sorted(cloud.lines("starts")) == ["0", "1"] and cloud.looks("delete") == 1
    assert "Connection timed out" in err


@pytest.mark.parametrize(("fault", "text"), [("away", "1\n"), ("fail-describe", "1000")])
def test_a_silence_without_end_leaves_the_slice_alone(cloud, fault, text):
    run = cloud.run(silence=1)
    cloud.wait_for_starts(2)
    cloud.write(fault, text)
    code, _, err = ended(run)
    assert code == 1 and cloud.looks("delete") == 0 and cloud.alive() == 2
    last = err.splitlines()[-1]
    assert "has failed for 1 s" in last and "run.sh logs --name=c100 --project=project-1 --zone=us-east5-b'" in last
    assert "run.sh delete --name=c100 --project=project-1 --zone=us-east5-b'" in last


@pytest.mark.parametrize("fault", ["fail-scp", "no-index"])
def test_what_was_not_installed_is_installed_again(cloud, fault):
    cloud.write(fault, "2")
    run = cloud.run("--restarts=0")
    if fault == "no-index":
        cloud.wait_until(lambda: cloud.looks("scp") >= 2)
        cloud.remove(fault)
    cloud.wait_for_starts(2)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert code == 0 and sorted(cloud.lines("starts")) == ["0", "1"], err
    assert cloud.looks("create") == 1 and cloud.looks("scp") >= 2


def test_a_slice_whose_state_is_not_known_is_kept(cloud):
    """A silence counts from its own beginning."""
    run = cloud.run("--restarts=0", silence=1)
    cloud.wait_for_starts(2)
    for _ in range(2):
        cloud.write("fail-describe", "1")
        cloud.wait_for_looks(3)
        time.sleep(1.1)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert (code, cloud.looks("delete"), cloud.looks("create")) == (0, 1, 1), err
    assert sorted(cloud.lines("starts")) == ["0", "1"] and err.count("UNAVAILABLE") == 2


def test_the_queue_may_last_for_ever_but_not_a_silence_in_it(cloud):
    cloud.write("first", "WAITING_FOR_RESOURCES")
    run = cloud.run(silence=1)
    cloud.wait_until(lambda: cloud.looks() > 1)
    time.sleep(1.5)
    assert run.poll() is None
    cloud.write("fail-describe", "1000")
    code, _, err = ended(run)
    assert code == 1 and cloud.looks("delete") == 0 and "has failed for 1 s" in err
    assert err.count("c100 is WAITING_FOR_RESOURCES") == 1


def test_after_a_preemption_another_slice_goes_on(cloud):
    run = cloud.run("--restarts=1")
    cloud.wait_for_starts(2)
    cloud.wait_for_looks(2)
    cloud.write("state", "SUSPENDED")
    cloud.wait_for_starts(4)
    cloud.wait_for_looks(2)
    cloud.end(0, 0)
    code, out, err = ended(run)
    assert (code, out) == (0, SAID + SAID + "worker 0 ends\n") and "starting again (1 of 1)" in err
    assert [cloud.looks(verb) for verb in ("create", "scp", "delete")] == [2, 2, 2]


def test_a_slice_that_is_lost_too_often_is_deleted(cloud):
    cloud.write("first", "FAILED")
    code, _, err = ended(cloud.run("--restarts=2"))
    assert code == 1 and "not finished after 2 restarts" in err
    assert cloud.looks("create") == cloud.looks("delete") == 3 and not (cloud.path / "state").exists()


def test_the_same_command_takes_up_what_runs_and_what_has_ended(cloud):
    """As after the night of a laptop; it shows the log from its beginning, and counts on."""
    first = cloud.run("--restarts=2")
    cloud.wait_for_starts(2)
    cloud.end(143, 143)
    cloud.wait_for_starts(4)
    os.killpg(first.pid, signal.SIGKILL)
    second = cloud.run("--restarts=2")
    cloud.wait_for_looks(3)
    os.killpg(second.pid, signal.SIGKILL)
    cloud.end(143, 143)
    cloud.wait_until(lambda: cloud.alive() == 0)
    third = cloud.run("--restarts=2")
    cloud.wait_for_starts(6)
    cloud.end(0, 3)
    code, out, err = ended(third)
    assert (code, out) == (3, 3 * (SAID + "worker 0 ends\n")) and "(2 of 2)" in err and "(1 of 2)" not in err
    assert [cloud.looks(verb) for verb in ("create", "scp", "delete")] == [1, 1, 1]
    assert sorted(cloud.lines("starts")) == [*"000111"]


def test_a_slice_with_another_command_is_not_taken_up(cloud):
    first = cloud.run()
    cloud.wait_for_starts(2)
    os.killpg(first.pid, signal.SIGKILL)
    code, _, err = ended(cloud.run(train=[*TRAIN[:-1], "--y=6  epochs"]))
    assert code == 2 and "error: c100 trains by another command; take another --name" in err
    assert cloud.alive() == 2 and cloud.looks("delete") == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_launcher_alone(cloud, sent):
    run = cloud.run()
    cloud.wait_for_starts(2)
    cloud.wait_for_looks(1)
    os.kill(run.pid, sent)
    code, _, err = ended(run, seconds=5)
    last = err.splitlines()[-1]
    assert code == 128 + sent and "ended by" in last and "goes on" in last and "delete --name=c100" in last
    assert cloud.alive() == 2 and cloud.looks("delete") == 0
    assert list((cloud.path / "tmp").iterdir()) == []
    logs = cloud.launch("logs")
    assert logs.stdout.readline() == SAID
    assert ended(cloud.launch("delete")) == (0, "", "run.sh: c100 is deleted\n")
    assert not (cloud.path / "state").exists()


@pytest.mark.parametrize(
    ("codes", "expected", "restarts"),
    [((0, 1), 1, 0), ((2, 1), 2, 0), ((1, 137), 0, 1), ((2, 137), 2, 0), ((2, 3), 2, 0), ((143, 0), 143, 0)],
)
def test_the_worst_exit_code_decides(cloud, codes, expected, restarts):
    """As in launch/local.sh: 2 before all others; 128 and more starts all again on the same slice, less comes again."""
    run = cloud.run(f"--restarts={restarts}")
    cloud.wait_for_starts(2)
    cloud.end(*codes)
    if restarts:
        cloud.wait_for_starts(4)
        cloud.end(0, 0)
    code, out, err = ended(run)
    assert code == expected and out == (SAID + "worker 0 ends\n") * (1 + restarts), err
    assert sorted(cloud.lines("starts")) == sorted(["0", "1"] * (1 + restarts))
    assert [cloud.looks(verb) for verb in ("create", "scp", "delete")] == [1, 1, 1]


def test_a_worker_that_outlives_a_dead_one_is_ended(cloud):
    run = cloud.run(patience=1)
    cloud.wait_for_starts(2)
    cloud.kill(1)
    cloud.wait_for_starts(4)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert code == 0 and "the others have not ended in 1 s" in err and "ended with exit code 137" in err
    assert sorted(cloud.lines("starts")) == ["0", "0", "1", "1"]


def test_a_start_that_missed_a_worker_is_made_up_for(cloud):
    """The one that trains is not started again."""
    cloud.write("away", "1 train\n")
    run = cloud.run("--restarts=0")
    cloud.wait_for_starts(1)
    cloud.wait_for_looks(2)
    cloud.remove("away")
    cloud.wait_for_starts(2)
    cloud.wait_for_looks(2)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert code == 0 and cloud.lines("starts") == ["0", "1"], err


def test_a_slice_that_somebody_deletes_is_not_asked_for_again(cloud):
    run = cloud.run()
    cloud.wait_for_starts(2)
    assert ended(cloud.launch("delete"))[0] == 0
    code, _, err = ended(run)
    assert code == 1 and "somebody has deleted c100" in err and cloud.looks("create") == 1


def test_what_is_refused_at_first_ends_at_once(cloud):
    cloud.write("fail-describe", "1")
    code, out, err = ended(cloud.run())
    assert (code, out, err.count("\n"), cloud.looks("create")) == (2, "", 1, 0) and "UNAVAILABLE" in err
    cloud.write("fail-create", "1")
    code, _, err = ended(cloud.run())
    (line,) = err.splitlines()
    assert (code, cloud.looks("create"), cloud.looks("delete")) == (1, 1, 0) and "UNAVAILABLE" in line


def test_a_slice_that_is_there_though_the_answer_was_lost_is_taken(cloud):
    cloud.write("lost")
    run = cloud.run("--restarts=0")
    cloud.wait_for_starts(2)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert (code, cloud.looks("create"), cloud.looks("delete")) == (0, 1, 1), err


@pytest.mark.parametrize(("missing", "data"), [("bucket", "data"), ("data", "data"), ("other", "BUCKET")])
def test_a_bucket_that_is_not_there_is_refused_before_a_slice_is_asked_for(cloud, missing, data):
    """Be it for the workdir or the data, or a name that none can have."""
    cloud.write("missing", f"gs://{missing}\n")
    code, out, err = ended(cloud.run(train=[*TRAIN, "--config.dataset.data_dir", f"gs://{data}/sets"]))
    bucket = data if missing == "other" else missing
    (line,) = err.splitlines()
    assert (code, out, cloud.looks("create")) == (2, "", 0)
    assert line.startswith(f"error: there is no bucket gs://{bucket}; make it, ") and "--location=us-east5'" in line


def test_a_bucket_that_cannot_be_seen_from_here_is_none_of_our_business(cloud):
    cloud.write("fail-ls", "1")
    run = cloud.run()
    cloud.wait_for_starts(2)
    cloud.end(0, 0)
    code, _, err = ended(run)
    assert (code, cloud.looks("ls")) == (0, 1) and "UNAVAILABLE" not in err


def test_bad_input_of_one_worker_ends_the_others_and_is_told(cloud):
    run = cloud.run()
    cloud.wait_for_starts(2)
    cloud.write("end-1", 2)
    code, _, err = ended(run)
    assert (code, cloud.lines("starts").count("0"), cloud.alive()) == (2, 1, 0)
    assert "ended with exit code 2: worker 1 ends\n" in err and cloud.looks("delete") == 1


@pytest.mark.parametrize("action", ["logs", "delete"])
def test_what_gcloud_refuses_is_one_line(cloud, action):
    code, out, err = ended(cloud.launch(action))
    (line,) = err.splitlines()
    assert (code, out) == (1, "") and line.startswith("run.sh: ERROR: ")


def test_an_order_that_comes_twice_or_too_late_does_no_harm(cloud):
    """The workers' part alone."""
    home = cloud.path / "workers" / "0"
    home.mkdir(parents=True)
    archive = ["git", "-C", cloud.checkout, "archive", "--format=tar.gz", "--prefix=vitcls/", "HEAD"]
    subprocess.run([*archive, f"--output={home / 'vitcls.tar.gz'}"], check=True)
    script = cloud.checkout / "launch" / "cloud_tpu" / "worker.sh"
    path = f"{cloud.path / 'programs'}:/usr/bin:/bin"
    command = {"env": {"HOME": str(home), "CLOUD": str(cloud.path), "PATH": path}, "stdout": subprocess.PIPE}

    def order(*words):
        return subprocess.Popen([script, *words], text=True, **command)

    def state(commit="abc"):
        return order("state", commit).communicate(timeout=10)[0].strip()

    def twice(*words):
        for one in [order(*words), order(*words)]:
            one.communicate(timeout=20)
            assert one.returncode == 0

    assert state() == "absent"
    twice("install", "abc")
    assert cloud.lines("installs") == ["install"] and (state(), state("def")) == ("ready", "absent")
    twice("train", "0", "7", "vitcls")
    cloud.wait_for_starts(1)
    twice("install", "def")  # beside what runs
    assert (state(), state("def"), len(cloud.lines("installs"))) == ("running 0 7", "running 0 7", 1)
    cloud.end(5)
    cloud.wait_until(lambda: state() == "ended 0 7 5 worker 0 ends")
    twice("train", "0", "7", "vitcls")
    assert state() == "ended 0 7 5 worker 0 ends"
    twice("train", "1", "7", "vitcls")
    cloud.wait_for_starts(2)
    twice("train", "0", "7", "vitcls")
    assert state() == "running 1 7"
    twice("stop")
    cloud.wait_until(lambda: state() == "ended 1 7 137")
    assert cloud.lines("starts") == ["0", "0"]
