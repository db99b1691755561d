"""A directory of results has one writer at a time, and what a killed one leaves is in nobody's way."""

import logging
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from vitcls import cli, evaluate
from vitcls.core.errors import UserError
from vitcls.report.part import Part

HOLD = """
import sys, time
from vitcls.report.part import Part
with Part(sys.argv[1]) as made:
    (made.new / "half.png").touch()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is about to write tmp_path/out/report."""
    command = [sys.executable, "-c", HOLD, tmp_path / "out" / "report"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_the_first_loses_nothing(holder, tmp_path):
    with (
        pytest.raises(UserError, match="report is being written by another command; wait for it"),
        Part(tmp_path / "out" / "report"),
    ):
        pass
    assert (tmp_path / "out" / ".report.new" / "half.png").exists()


def test_it_cannot_be_claimed_while_it_is_put_in_place(tmp_path, monkeypatch):
    rename, refused = pathlib.Path.rename, []

    def claimed_before(path, target):
        with pytest.raises(UserError, match="is being written by another"), Part(tmp_path / "report"):
            pass
        refused.append(path.name)
        return rename(path, target)

    with Part(tmp_path / "report") as made:
        monkeypatch.setattr(pathlib.Path, "rename", claimed_before)
        made.replace()
    assert refused == [".report.new"] and not list((tmp_path / "report").iterdir())


def test_who_has_patience_waits_for_the_first_to_end(holder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitcls")
    threading.Timer(1.2, holder.kill).start()
    with Part(tmp_path / "out" / "report", patience=60) as made:
        made.replace()
    assert caplog.messages == [f"waiting for another command that writes {tmp_path}/out/report"]


def test_what_a_killed_one_has_left_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Part(tmp_path / "out" / "report") as made:
        (made.new / "whole.png").touch()
        made.replace()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report"]
    assert [path.name for path in (tmp_path / "out" / "report").iterdir()] == ["whole.png"]


def test_what_was_there_is_back_where_one_was_killed_between_two_moves(tmp_path):
    """Also where the next one fails."""
    old = tmp_path / ".report.old"
    old.mkdir()
    (old / "metrics.json").write_text("{}")
    with pytest.raises(RuntimeError), Part(tmp_path / "report"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert (tmp_path / "report" / "metrics.json").read_text() == "{}"


def test_nothing_is_left_of_work_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Part(tmp_path / "a" / "b" / "report"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_on_entry():
    with pytest.raises(UserError, match="/proc/report cannot be written"), Part("/proc/report"):
        pytest.fail("the work began")


def test_evaluate_is_refused_before_its_work(trained, tmp_path, capsys):
    with Part(trained / "report"):
        assert cli.run(evaluate.main, [f"--workdir={trained}"]) == 2
    said = capsys.readouterr().err
    assert "report is being written by another command" in said and "Traceback" not in said
