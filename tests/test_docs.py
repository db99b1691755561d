"""What the pages show is run as they show it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(code, directory, *, optimized=False):
    """Runs a program in a process of its own, beside the configs; `optimized` by XLA if it trains for a while."""
    (directory / "configs").symlink_to(ROOT / "configs")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" or not optimized}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.by_turns
@pytest.mark.parametrize("page", ["api.md", "extending.md"])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    assert max(block.count("\n") for block in blocks) < 40
    run("\n".join(blocks), tmp_path)


@pytest.mark.by_turns
def test_the_tutorial_runs(tmp_path):
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and not any(cell.get("outputs") for cell in notebook["cells"])
    run("\n".join(cells), tmp_path, optimized=True)
