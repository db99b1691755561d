"""Which run is served for a workdir, forth and back."""

import json
import shutil

import pytest

from vitcls.core.errors import UserError
from vitcls.serve.promotion import current, promote, rollback


@pytest.fixture
def runs(trained, tmp_path):
    """Three workdirs of runs, by symbolic links to what is large."""
    made = [tmp_path / name for name in ("first", "second", "third")]
    for path in made:
        path.mkdir()
        for name in ("config.json", "dataset.json"):
            shutil.copy(trained / name, path)
    return made


def test_forth_and_back(runs):
    first, second, third = runs
    assert current(first) == first
    promote(first, second)
    promote(first, second)  # once is enough
    promote(first, third)
    assert current(first) == third and current(second) == second
    assert rollback(first) == second
    assert rollback(first) == first == current(first)
    with pytest.raises(UserError, match="nothing to go back to"):
        rollback(first)
    history = json.loads((first / "served.json").read_text())["history"]
    assert [entry["event"] for entry in history] == [
        "promoted ../second",
        "promoted ../third",
        "withdrew ../third",
        "withdrew ../second",
    ]


def test_runs_may_move_together(runs, tmp_path):
    promote(runs[0], runs[1])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in runs[:2]:
        shutil.move(path, moved)
    assert current(moved / "first") == moved / "second"
    shutil.rmtree(moved / "second")
    with pytest.raises(UserError, match="is not there"):
        current(moved / "first")
    assert rollback(moved / "first") == moved / "first"


def test_what_cannot_be_served_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        promote(runs[0], tmp_path / "nothing")
    info = json.loads((runs[1] / "dataset.json").read_text())
    (runs[1] / "dataset.json").write_text(json.dumps(info | {"class_names": ["a", "b", "c"]}))
    with pytest.raises(UserError, match="other classes"):
        promote(runs[0], runs[1])
    assert not (runs[0] / "served.json").exists()
    (runs[0] / "served.json").write_text('{"served": "x", "history": []}')
    with pytest.raises(UserError, match="cannot be used"):
        current(runs[0])
