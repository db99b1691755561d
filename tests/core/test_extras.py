"""What needs a package that is not installed says in one line which extra brings it."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from vitcls.core import extras
from vitcls.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_a_missing_package_is_one_line():
    line = r"^the work needs another package: pip install 'vitcls\[tune\]'$"
    with pytest.raises(UserError, match=line), extras.needed("the work", "tune"):
        import vitcls_has_no_such_module  # noqa: F401


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError), extras.needed("the work", "tune"):
        raise KeyError("another")


def test_the_line_is_written_once_and_names_extras_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "vitcls").rglob("*.py")}
    named = {name for text in sources.values() for name in re.findall(r'extras\.needed\([^)]*?"(\w+)"\)', text)}
    assert {"onnx", "serve", "tflite", "tune"} <= named <= set(project)
    assert [path.name for path, text in sources.items() if "pip install 'vitcls[" in text] == ["extras.py"]


COMMANDS = [
    ("fastapi", "serve", ["--workdir=none"], "vitcls serve"),
    ("sqlalchemy", "feedback", ["list", "--database=sqlite:///none.db"], "the database of feedback"),
    ("sqlalchemy", "replay", ["0123", "--database=sqlite:///none.db"], "vitcls replay"),
]


@pytest.mark.parametrize(("package", "command", "arguments", "what"), COMMANDS)
def test_commands_end_with_that_line(package, command, arguments, what, tmp_path):
    module, line = f"vitcls.{command}", f"{what} needs another package: pip install 'vitcls[serve]'"
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[1:] = {arguments!r}; "
    code += f"runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == f"error: {line}\n" and not list(tmp_path.iterdir())
