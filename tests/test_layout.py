"""The house keeps its floors: imports go down, never up, never in a circle, and the core stays light."""

import ast
import functools
import pathlib
import subprocess

import pytest

from vitcls.cli import VERBS

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = tuple(verb.module.split(".")[1] for verb in VERBS.values() if verb.module.count(".") == 1)
ROOMS = ("export", "feedback", "models", "probe", "experiment", "serve", "tune", "worth")  # with a door, `__main__`
# From the ground up. A module may import those of its own floor and below.
FLOORS = (
    ("core",),
    ("attacks", "attribution", "data", "models", "optim", "metrics"),
    ("report",),
    ("tasks",),
    ("config", "config_file"),
    ("training",),
    ("cli",),
    ("train",),
    ("jobs", "ledger", "probe"),
    tuple(name for name in COMMANDS if name not in ROOMS),
    ("experiment", "export", "feedback", "tune"),
    ("serve", "worth"),
    ("replay", "retrain"),
    ("api",),
    ("__init__",),
)
# Rooms of a floor that do not know each other.
APART = ({"attacks", "attribution", "data", "models", "optim", "metrics"}, {"experiment", "export", "feedback", "tune"})
HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn", "skimage", "clu", "huggingface_hub")
HEAVY += ("tensorboardX",)  # which imports the clients of two clouds
HEAVY_ALLOWED = {
    "orbax": ("training/checkpoint.py",),
    "matplotlib": tuple(
        f"report/{name}.py"
        for name in (
            "attack_plots",
            "calibration_plots",
            "comparison_plots",
            "data_plots",
            "fonts",
            "group_plots",
            "learning_curves",
            "plots",
            "robustness_plots",
            "search_plots",
            "table_plots",
            "unknown_plots",
        )
    ),
    "clu": (),
    "sklearn": (),
    "skimage": (),
    "huggingface_hub": (),
    "tensorboardX": (),
    "tensorflow": (),
    "tensorflow_datasets": (),
}


def sources():
    return sorted((ROOT / "vitcls").rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path, *, top_level=False):
    """The modules that a file imports; with `top_level` only when it is imported itself."""
    return tuple(_imports(parsed(path), top_level))


def _imports(tree, top_level):
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                is_module = (ROOT / f"{whole.replace('.', '/')}.py").exists() or (
                    ROOT / whole.replace(".", "/")
                ).is_dir()
                yield whole if is_module else node.module


def room(module):
    """The folder or file below the root."""
    return module.split(".")[1] if "." in module else "__init__"


def floor(module):
    """The door of a room is a command, even if the room stands below."""
    names = {room(module)} | ({"main"} if module.endswith(".__main__") else set())
    found = [i for i, rooms in enumerate(FLOORS) if names & set(rooms)]
    assert found, f"{module} is neither in a room of FLOORS nor a command of vitcls.cli.VERBS"
    return found[-1]


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_down(path):
    here = module_of(path)
    for there in imports(path):
        if there == "vitcls" or not there.startswith("vitcls."):
            continue
        assert floor(there) <= floor(here), f"{here} imports {there}, which stands above it"
        for rooms in APART:
            apart = {room(here), room(there)} <= rooms and room(here) != room(there)
            assert not apart, f"{here} imports {there}; what both need belongs in the core"


def test_there_is_no_circle():
    graph = {
        module_of(path): {there for there in imports(path, top_level=True) if there.startswith("vitcls.")}
        for path in sources()
    }
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' -> '.join([*open_[open_.index(module) :], module])}"
        if module in done or module not in graph:
            return
        open_.append(module)
        for there in graph[module]:
            if there != module:
                visit(there)
        open_.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_where_they_are_used(library):
    found = [
        path.relative_to(ROOT / "vitcls").as_posix()
        for path in sources()
        if any(name.split(".")[0] == library for name in imports(path, top_level=True))
    ]
    assert sorted(found) == sorted(HEAVY_ALLOWED[library])


@pytest.mark.parametrize("folder", ["models", "tasks", "metrics", "optim", "core"])
def test_what_a_config_names_does_not_know_configs(folder):
    """No file of these reads a config or the command line, but for the doors, which are commands."""
    for path in (ROOT / "vitcls" / folder).rglob("*.py"):
        assert path.name == "__main__.py" or "vitcls.config" not in set(imports(path)), path


def test_functions_are_short():
    """Median under 9 lines, 99 % under 60, none over 90."""
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] < 9
    assert lengths[int(len(lengths) * 0.99)] < 60
    assert lengths[-1] <= 90


def test_nothing_lies_about_at_the_top():
    """As profiles and results do that were meant to stay on one machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone of the repository")
    folders = {".ci", "benchmarks", "configs", "docs", "launch", "tests", "vitcls"}
    files = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
    assert {path.partition("/")[0] for path in listed.stdout.splitlines()} == folders | files
