"""Names that are not UTF-8, in a locale that knows ASCII alone, end no command and are shown in print."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vitcls.core import terminal

SCRIPT = """
import os, sys
from vitcls import cli, evaluate, predict, train, config as configs

def main(argv):
    config = configs.from_json(open(argv[0]).read())
    train.train_and_evaluate(config, argv[1])
    evaluate.main([f"--workdir={argv[1]}"])
    assert cli.run(predict.main, [f"--workdir={argv[1]}", argv[2]]) == 0
    assert cli.run(predict.main, [f"--workdir={argv[1]}", "--json", argv[2]]) == 0
    assert cli.run(predict.main, [f"--workdir={argv[1]}", argv[3]]) == 2

sys.exit(cli.run(main))
"""


def test_a_name_is_printable_and_keeps_what_utf8_can_hold():
    name = os.fsdecode(b"caf\xe9") + " 猫 \ud800"
    assert terminal.printable(name) == r"caf\xe9 猫 \ud800"


def test_output_escapes_what_its_encoding_lacks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    terminal.print_anything()
    print(os.fsdecode(b"caf\xe9") + " 猫", flush=True)
    assert written.getvalue() == rb"caf\xe9 \u732b" + b"\n"


@pytest.fixture
def photos(tmp_path):
    """A folder set with a class directory, a skipped file and its own name in Latin-1."""
    root = os.path.join(os.fsencode(tmp_path), b"photos\xe9")
    rng = np.random.default_rng(0)
    try:
        for name in (b"caf\xe9", b"dog"):
            os.makedirs(os.path.join(root, name))
            for i in range(12):
                picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                with open(os.path.join(root, name, b"\xe9%d.png" % i), "wb") as file:
                    picture.save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open(os.path.join(root, b"dog", b"bad\xff.txt"), "wb") as file:
        file.write(b"not an image")
    return root


@pytest.mark.by_turns
def test_names_that_are_not_utf8_go_through_every_command(photos, tiny_config, tmp_path):
    from vitcls import config as configs

    tiny_config.dataset.update(name="folder", data_dir=os.fsdecode(photos), image_size=8)
    tiny_config.update(total="2 steps", batch_size=4)
    (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(tiny_config)), encoding="ascii")
    work, picture = tmp_path / "run", os.path.join(photos, b"caf\xe9", b"\xe90.png")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "config.json", work, picture, os.path.join(photos, b"no\xff.png")],
        env={name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode("ascii", "replace")
    out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert "InitializeLog" not in err and "oneDNN" not in err
    assert json.loads((work / "dataset.json").read_bytes())["class_names"] == [os.fsdecode(b"caf\xe9"), "dog"]
    page = (work / "report" / "index.html").read_text(encoding="utf-8")
    assert r"caf\xe9" in page and r"dog/bad\xff.txt: is not an image" in page
    (row,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert row["file"] == os.fsdecode(picture)
    assert {top["class"] for top in row["top"]} == {os.fsdecode(b"caf\xe9"), "dog"}
    assert r"photos\xe9/caf\xe9/\xe90.png" in out
    assert r"photos\xe9: 17 train" in err
    assert r"no\xff.png: No such file" in err
