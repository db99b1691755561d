"""vitcls: train, measure and ship image classifiers in JAX/Flax.

import vitcls

    run = vitcls.open_run("runs/digits")
    run.predict(images)                       # or paths of files -> probabilities [N, K]
    model = vitcls.create_model("improved_vit_small", num_classes=10)
    vitcls.train_and_evaluate(vitcls.load_config("configs/vit_digits.py"), "runs/digits")

docs/api.md has the rest. Nothing is imported before it is used.
"""

import importlib
import os
import re
import signal
import sys

__version__ = "0.1.0"
_HOMES = {
    "Run": "vitcls.api",
    "create_model": "vitcls.api",
    "default_config": "vitcls.config",
    "list_models": "vitcls.api",
    "load_config": "vitcls.config_file:load",
    "open_run": "vitcls.api",
    "train_and_evaluate": "vitcls.train",
}
__all__ = ["Run", "create_model", "default_config", "list_models", "load_config", "open_run", "train_and_evaluate"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'vitcls' has no attribute '{name}'; it has {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _end(kind, error, trace) -> None:
    """In place of sys.excepthook: Ctrl-C while modules are imported is no error, as it is none later (cli.run).

    What JAX does not understand in the environment is bad input; it says so when it is imported.
    """
    if kind is KeyboardInterrupt:
        os.write(2, b"interrupted\n")
        os._exit(130)
    if kind is ValueError and (found := re.search(r"for (?:JAX flag|environment) '?(\w+)", str(error))):
        name = found[1].upper()
        os.write(2, f"error: the environment variable {name}={os.environ.get(name)} is impossible; unset it\n".encode())
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


def _pass_over(unraisable) -> None:
    """In place of sys.unraisablehook: once a save has failed, each of TensorStore's threads says that of its own."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if sys.argv and (sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "vitcls"):  # a command begins
    sys.excepthook = _end
    sys.unraisablehook = _pass_over
    if os.getpid() == 1:  # of a container, where a signal without a handler is none
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
