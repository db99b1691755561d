"""A receipt is enough to compute an answer again, to the bit, or to say what is another."""

import contextlib
import hashlib
import json
import shutil

import numpy as np
import pytest
import requests

from tests.serve.running import png, server
from vitcls import calibrate, cli, replay
from vitcls.core.errors import UserError
from vitcls.feedback.store import open_store
from vitcls.serve import databases, receipts


def again(capsys, *arguments):
    capsys.readouterr()
    code = cli.run(replay.main, [str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


@pytest.fixture
def answered(trained, tmp_path):
    """A workdir, a file, and the id of the answer to it, alone and among others."""
    workdir, file = shutil.copytree(trained, tmp_path / "run"), tmp_path / "a.png"
    file.write_bytes(png(5))
    with server(f"--workdir={workdir}") as running:
        (one,) = running.predict(("a.png", png(5))).json()["predictions"]
        several = running.predict(*[(f"{i}.png", png(i)) for i in range(3, 8)]).json()["predictions"]
        assert several[2]["id"] == one["id"]
        requests.post(f"{running.url}/v1/feedback", json={"id": several[0]["id"], "right": True})
        assert running.stop()[0] == 0
    return workdir, file, one["id"], several[0]["id"]


@pytest.mark.by_turns
def test_an_answer_is_computed_again(answered, capsys):
    """In each of the batches that it was in; by the file, or the image of feedback; by a database or what is known."""
    workdir, file, id, corrected = answered
    code, said = again(capsys, id, f"--workdir={workdir}", f"--image={file}")
    lines = said.splitlines()
    assert code == 0 and all(f"{id}: the same 3 outputs to the bit, in a batch of" in line for line in lines)
    assert any("in a batch of 1:" in line for line in lines)  # and in that which it shared, whose size is a race
    assert again(capsys, id, f"--database=sqlite:///{workdir}/feedback.db", f"--image={file}")[0] == 0
    assert again(capsys, id, f"--image={file}")[0] == 0
    assert again(capsys, corrected)[0] == 0
    damaged = file.with_name("other") / "feedback.db"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no database")
    databases.remember(databases.url(damaged))  # as the newest, which no longer hides the others
    assert again(capsys, id, f"--image={file}")[0] == 0
    code, said = again(capsys, "1" * 32)
    assert code == 2 and "passed over: " in said and "other/feedback.db" in said
    damaged.unlink()
    other = file.with_name("b.png")
    other.write_bytes(png(6))
    for arguments, words in (
        ([id, f"--workdir={workdir}"], "only images of feedback are kept; give the file with --image=FILE"),
        ([id, f"--workdir={workdir}", f"--image={other}"], "is not the file of this answer"),
        ([id, f"--workdir={file.parent}"], "has no feedback.db; serve it, or give --database=URL"),
        (["0" * 32, f"--workdir={workdir}"], "no answer has the id 000"),
        ([id, "--database=sqlite:///nowhere.db"], "there is no database nowhere.db"),
    ):
        code, said = again(capsys, *arguments)
        assert code == 2 and words in said, said


def test_databases_that_were_served_are_known_once(tmp_path, monkeypatch):
    """Of files alone: the address of another may have a password."""
    monkeypatch.setenv("VITCLS_CACHE_DIR", str(tmp_path / "cache"))
    files = [tmp_path / name for name in ("a.db", "b.db", "gone.db")]
    for file in files:
        file.touch()
    for database in (*map(databases.url, files), databases.url(files[0]), "postgresql://me:word@db/x", "sqlite://"):
        databases.remember(database)
    files[2].unlink()
    assert databases.known() == [databases.url(file) for file in (files[1], files[0])]
    assert "word" not in (tmp_path / "cache" / "databases.txt").read_text()


def test_a_run_that_has_moved_or_is_no_more(answered, capsys):
    workdir, file, id, _ = answered
    moved = workdir.rename(workdir.with_name("moved"))
    assert again(capsys, id, f"--workdir={moved}", f"--image={file}")[0] == 0
    code, said = again(capsys, id, f"--database=sqlite:///{moved}/feedback.db", f"--image={file}")
    assert code == 1 and "the weights that answered are no more" in said
    shutil.rmtree(moved / "checkpoints" / "12")
    code, said = again(capsys, id, f"--workdir={moved}", f"--image={file}")
    assert code == 1 and "the weights that answered are no more: checkpoint '12' is not there" in said


def test_what_is_forgotten_has_no_receipt(answered, capsys):
    workdir, file, id, corrected = answered
    store = open_store(f"sqlite:///{workdir}/feedback.db")
    (row,) = store.rows()
    assert row.answer == corrected and store.forget_client(row.client) == 1
    code, said = again(capsys, corrected, f"--workdir={workdir}")
    assert code == 2 and f"no answer has the id {corrected}" in said
    assert again(capsys, id, f"--workdir={workdir}", f"--image={file}")[0] == 0  # of others it is still there
    assert store.forget_image(hashlib.sha256(file.read_bytes()).hexdigest()) == 0
    assert again(capsys, id, f"--workdir={workdir}", f"--image={file}")[0] == 2
    store.close()


@pytest.mark.by_turns
def test_what_has_changed_is_said(answered, capsys):
    workdir, file, id, _ = answered
    assert cli.run(calibrate.main, [f"--workdir={workdir}"]) == 0
    code, said = again(capsys, id, f"--workdir={workdir}", f"--image={file}")
    assert code == 0 and "preprocessing, calibration or threshold are others" in said  # the logits are the same
    info = json.loads((workdir / "dataset.json").read_text())
    (workdir / "dataset.json").write_text(json.dumps(info | {"mean": [0.1] * 3}))
    code, said = again(capsys, id, f"--workdir={workdir}", f"--image={file}")
    assert code == 1 and "differ by up to" in said and "preprocessing, calibration or threshold are others" in said


def test_figures_are_those_of_the_checkpoint(trained, tmp_path):
    """Not of another one, of which the report or the calibration is."""
    from vitcls.serve import model

    workdir = shutil.copytree(trained, tmp_path / "run")
    assert cli.run(calibrate.main, [f"--workdir={workdir}"]) == 0
    last, earlier = model.of_workdir(workdir).about, model.of_workdir(workdir, "8").about
    assert last["test"]["num_examples"] == 24 and last["calibrated"]
    assert earlier["checkpoint"]["step"] == 8 and earlier["test"] == {} and not earlier["calibrated"]
    for damaged in ('{"checkpoint_step": 12, "acc', "[]"):
        (workdir / "report" / "metrics.json").write_text(damaged)
        with pytest.raises(UserError, match=r"metrics.json cannot be read .*; run vitcls evaluate again"):
            model.of_workdir(workdir)


def test_the_newest_receipts_are_kept_by_when_they_were_given_last(tmp_path):
    receipt = receipts.Receipt("", 1, "cpu", 0.0, "m", "{}", "run", 1, "f" * 64, b"", "class 0", 0.5)
    with contextlib.closing(open_store(f"sqlite:///{tmp_path}/f.db")) as store:
        kept = receipts.Receipts(store, most=10)
        for time, id in enumerate([*"abcdefghij", "a", "k"]):
            kept.add(receipt._replace(id=id, answered_at=float(time), step=time))
            kept.flush()
        assert [one.step for one in kept.find("a")] == [10]
        assert not kept.find("b") and kept.find("k")


def test_a_batch_does_not_change_the_bits_of_its_images(trained):
    """What is beside an image in a batch of one size is of no matter, which is what makes a receipt enough."""
    from vitcls.serve import model

    served = model.of_workdir(trained)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    together = served.answer(images, 8).outputs
    for i in range(8):
        np.testing.assert_array_equal(served.answer(images[i : i + 1], 8).outputs[0], together[i])
