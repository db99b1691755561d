"""Training runs in processes of their own."""

import sys
import time

from vitcls import jobs


def test_a_process_that_ends_at_once_is_reported_as_any_other(monkeypatch, tmp_path):
    """Before it could be given its config."""
    monkeypatch.setattr(sys, "executable", "/bin/false")

    class Config:
        def to_dict(self):
            time.sleep(0.3)  # it has ended by now
            return {"batch_size": 8}

    with jobs.Jobs(workers=1) as running:
        running.start("a", tmp_path / "a", Config())
        running.running["a"][1].wait()
        (ended,) = running.ended()
    assert (ended.name, ended.code, ended.last_line) == ("a", 1, "") and running.free
