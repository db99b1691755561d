"""`vitcls feedback` as one calls it, on SQLite."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from vitcls import cli
from vitcls.config import default_config
from vitcls.data.sources import load_source
from vitcls.feedback.__main__ import main
from vitcls.feedback.store import Correction, open_store


def encoded(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


FIRST, SECOND, EVEN, BAD = encoded(10), encoded(20, "JPEG"), encoded(30), b"no image"


@pytest.fixture
def database(tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db"
    store = open_store(url)
    for image, label, client in (
        (FIRST, "cat", "ann"),
        (FIRST, "dog", "bob"),
        (FIRST, "cat", "eve"),
        (SECOND, "dog", "ann"),
        (EVEN, "cat", "ann"),
        (EVEN, "dog", "bob"),
        (BAD, "cat", "eve"),
    ):
        store.add(Correction(image, "an-answer", "m" * 64, "dog", 0.9, label, client))
    store.close()
    return url


def test_list(database, capsys):
    assert cli.run(main, ["list", f"--database={database}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["cat", "dog", "cat", "dog", "cat", "dog", "cat"]
    assert rows[0].keys() == {"image", "answer", "model", "predicted", "probability", "label", "client", "time"}
    assert rows[0]["image"] == sha256(FIRST)
    assert cli.run(main, ["list", f"--database={database}"]) == 0
    text = capsys.readouterr().out
    assert "4 images" in text and "4 corrections, 3 confirmations" in text and "is cat" in text


def test_export_is_a_folder_by_the_majority_of_votes(database, tmp_path, capsys):
    out = tmp_path / "photos"
    assert cli.run(main, ["export", f"--database={database}", f"--out={out}"]) == 0
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}
    assert files == {f"cat/{sha256(FIRST)}.png": FIRST, f"dog/{sha256(SECOND)}.jpg": SECOND}
    said = capsys.readouterr().out
    assert f"even: {sha256(EVEN)}" in said and f"read: {sha256(BAD)}" in said and "2 images" in said
    config = default_config("improved_vit_tiny").dataset
    config.update(name="folder", data_dir=str(out), validation=0.0)
    source = load_source(config)
    assert source.class_names == ("cat", "dog") and len(source.splits["train"].labels) == 2
    assert cli.run(main, ["export", f"--database={database}", f"--out={out}"]) == 2
    assert "new directory" in capsys.readouterr().err


def test_export_fills_the_directory_it_is_in_and_what_a_link_means(database, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.run(main, ["export", f"--database={database}", "--out=."]) == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["cat", "dog"]
    (tmp_path / "link").symlink_to("later")
    assert cli.run(main, ["export", f"--database={database}", f"--out={tmp_path}/link"]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "later" / "cat").is_dir()
    assert cli.run(main, ["export", f"--database={database}", "--out=/dev/null/photos"]) == 2
    assert capsys.readouterr().err == "error: /dev/null/photos cannot be written: Not a directory\n"


def test_forget(database, tmp_path, capsys):
    assert cli.run(main, ["forget", f"--database={database}", "--client=ann"]) == 0
    assert "3 corrections" in capsys.readouterr().out
    assert cli.run(main, ["forget", f"--database={database}", f"--image={sha256(EVEN)}"]) == 0
    store = open_store(database)
    assert {(row.image, row.client) for row in store.rows()} == {
        (sha256(FIRST), "bob"),
        (sha256(FIRST), "eve"),
        (sha256(BAD), "eve"),
    }
    assert store.summary()["images"] == 2
    store.close()
    assert not any(EVEN[20:] in path.read_bytes() for path in tmp_path.glob("feedback.db*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "list|export|forget"),
        (["list"], "--database"),
        (["forget", "--database={url}"], "--image --client"),
        (["forget", "--database={url}", "--image=12"], "no SHA-256"),
        (["list", "--database=mysql://x"], "sqlite:///PATH or postgresql://"),
        (["list", "--database={url}", "--jsn"], "did you mean"),
    ],
)
def test_what_is_wrong_is_one_line(database, arguments, said, capsys):
    assert cli.run(main, [argument.format(url=database) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_label_is_no_path(database, tmp_path, capsys):
    store = open_store(database)
    store.add(Correction(encoded(99), "a", "m", "dog", 0.5, "../../outside", "ann"))
    store.close()
    assert cli.run(main, ["export", f"--database={database}", f"--out={tmp_path}/photos"]) == 2
    assert "cannot be the name of a directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("feedback.db")) == []


def test_a_database_that_is_not_there_is_not_made(tmp_path, capsys):
    for verb in (["list"], ["forget", "--client=ann"], ["export", f"--out={tmp_path}/out"]):
        assert cli.run(main, [*verb, f"--database=sqlite:///{tmp_path}/typo.db"]) == 2
        assert f"there is no database {tmp_path}/typo.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
