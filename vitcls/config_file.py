"""Config files: Python modules with `get_config()` or `get_config(preset)`, and the command line's changes to it."""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vitcls import config as configs
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.core.registry import defaults
from vitcls.tasks import TASKS

_MODULE = "vitcls.config_file:"  # and the path: the module of a config file
_RETURNS = {"get_config": "the config", "get_table": "a table of runs", "get_space": "what is searched"}
NAMES = ("model.name", "task.name")  # they decide which keys their block has, so they come first


def load(file: os.PathLike | str, overrides: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> ConfigDict:
    """Returns the config of 'PATH' or 'PATH:PRESET' with other values for some keys.

    Args:
      overrides: (key, value) pairs or a dict, such as {'optimizer.learning_rate': 1e-3}; see `override`.

    Raises UserError, one line, for whatever is wrong with the file or an override.
    """
    config, path = call(file, "get_config"), _parts(file)[0]
    if not isinstance(config, ConfigDict) or not isinstance(config.get("model"), ConfigDict) or "dataset" not in config:
        raise UserError(f"get_config() of {path} does not return what `default_config(model_name)` made")
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    for key, text in sorted(pairs, key=lambda pair: pair[0] not in NAMES):
        override(config, key, text if text is None else str(text))
    return config


def call(file: os.PathLike | str, function: str) -> Any:
    """What `function()` or `function(preset)` of the Python file 'PATH' or 'PATH:PRESET' returns.

    Raises UserError, one line, for whatever is wrong with the file.
    """
    path, preset = _parts(file)
    if not os.path.isfile(path):
        what = (
            "is a directory; name a file in it" if os.path.isdir(path) else "is not there; see the directory configs/"
        )
        raise UserError(f"the config file '{path}' {what}")
    with _in_words(path):
        return _returned(execute(path), path, preset, function)


def execute(path: str) -> types.ModuleType:
    """Runs a config file and returns its module; raises UserError, one line, for whatever is wrong with it."""
    name = f"{_MODULE}{path}"
    loader = importlib.machinery.SourceFileLoader(name, path)  # whatever the file's name ends in
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # where dataclasses look for their module
    with _in_words(path):
        loader.exec_module(module)
    return module


def executed() -> list[str]:
    """The config files that this process has run; they, and what they import, may have registered parts."""
    return [name.removeprefix(_MODULE) for name in sys.modules if name.startswith(_MODULE)]


@contextlib.contextmanager
def _in_words(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a config file can do
        raise UserError(_words(error, path)) from None


def _parts(file: os.PathLike | str) -> tuple[str, str]:
    """The path and the preset, or ''; both may have colons in them."""
    text = os.fspath(file)
    ends = [i for i, character in enumerate(text) if character == ":"]
    end = next((i for i in [len(text), *ends] if os.path.isfile(text[:i])), ends[0] if ends else len(text))
    return text[:end], text[end + 1 :]


def _returned(module: types.ModuleType, path: str, preset: str, function: str) -> Any:
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function}(), which returns {_RETURNS[function]}")
    parameters = list(inspect.signature(getattr(module, function)).parameters.values())
    takes_preset = len(parameters) > 0
    if not preset and takes_preset and parameters[0].default is inspect.Parameter.empty:
        raise UserError(f"{path} needs a preset: {path}:PRESET")
    if preset and not takes_preset:
        raise UserError(f"{path} has no presets, so it takes no ':{preset}'")
    return getattr(module, function)(*([preset] if preset else []))


def _words(error: BaseException, path: str) -> str:
    """What a config file raised, in one line, with the line of the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    place = f"{path}, line {lines[-1]}," if lines else path
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError) and "does not exist and cannot be added" in text:
        key = text.split('"')[1]
        hint = f"; did you mean '{text.split('Did you mean ')[1].split(chr(34))[1]}'?" if "Did you mean" in text else ""
        if tasks := _tasks_with(key):
            hint = f"; it belongs to the task '{tasks[0]}': use default_config(model_name, '{tasks[0]}')"
        return f"{place} sets '{key}', which is no key there{hint}"
    wrong = re.match(r"Could not override field '(\w+)'.*?\. (.*) is of original type .* casted to type (.*)", text)
    if isinstance(error, TypeError) and wrong:
        key, value, kind = wrong.groups()
        kind = kind.rpartition("'")[0].rpartition("'")[2].rpartition(".")[2]
        given = re.search(r"original type <class '(?:\w+\.)*(\w+)'>", text)[1]
        return f"{place} sets '{key}' to {value} ({given}); it must be {_KINDS.get(kind, kind)}"
    if isinstance(error, SystemExit):
        return f"{place} ends the program (SystemExit: {text}); a config file returns its config from get_config()"
    return f"{place} cannot be loaded: {type(error).__name__}: {text}"


_KINDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple": "a tuple",
    "ConfigDict": "a block of keys",
}


def _tasks_with(key: str) -> list[str]:
    """The objectives that have a key of `config.task`."""
    return [name for name, entry in TASKS.items() if key in defaults(entry)]


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """The arguments that are no overrides, and the overrides as (key, text); None for one without a value."""
    rest, overrides = [], []
    arguments = iter([*argv, None])
    argument = next(arguments)
    while argument is not None:
        following = next(arguments)
        if not argument.startswith("--config."):
            rest.append(argument)
        elif "=" in argument or following is None or following.startswith("--"):
            key, equals, text = argument.removeprefix("--config.").partition("=")
            overrides.append((key, text if equals else None))
        else:
            overrides.append((argument.removeprefix("--config."), following))
            following = next(arguments)
        argument = following
    return rest, overrides


def override(config: ConfigDict, key: str, text: str | None) -> None:
    """Sets `key` to what `text` says by the type of its value; a new name changes the keys of its block.

    None is for a key without a value, which means True.

    Raises UserError for a key that is not there and a text of another type.
    """
    *blocks, name = key.split(".")
    node: Any = config
    for block in blocks:
        node = node.get(block) if isinstance(node, ConfigDict) else None
    if blocks == ["task"] and name not in node and (tasks := _tasks_with(name)):
        raise UserError(f"--config.{key} is a key of another objective; add --config.task.name={tasks[0]}")
    if not isinstance(node, ConfigDict) or name not in node:
        if blocks and isinstance(node, ConfigDict):
            raise errors.unknown(f"key of config.{'.'.join(blocks)}", name, node)
        keys = configs.flatten(config.to_dict())
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        raise errors.unknown("config key", key, keys if near else config)
    value = parse(text, node.get_type(name), key)
    if key in NAMES and value != node[name]:
        block = blocks[0]
        model, task = (value, "classify") if block == "model" else (config.model.name, value)
        with config.unlocked():
            config[block] = configs.default_config(model, task)[block]
        return
    node[name] = value


def parse(text: str | None, kind: type, key: str) -> Any:
    """The value that `text` says, of type `kind`; raises UserError, naming `key`."""
    if text is None and kind is not bool:
        raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
    if kind is str:
        return text
    if kind is bool:
        text = "true" if text is None else text
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--config.{key}={text} is impossible; it must be True or False")
        return text.lower() in ("true", "1")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--config.{key}={text} is not {what}") from None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if kind is tuple or kind is ConfigDict:
            raise UserError(f"--config.{key}={text} is not {_example(kind, key)}") from None
        return text
    if kind is ConfigDict or (kind is tuple and not isinstance(value, tuple | list)):
        raise UserError(f"--config.{key}={text} is not {_example(kind, key)}")
    return tuple(value) if isinstance(value, list) and kind is tuple else value


def _example(kind: type, key: str) -> str:
    return (
        "a tuple, such as '(1, 2)'"
        if kind is tuple
        else f"a value for a block of keys; name one, as --config.{key}.name="
    )
