"""What all commands share: `vitcls VERB ...` is `python -m vitcls.VERB ...`, and every command ends in the same ways.

Exit codes: 0 done; 1 failure; 2 bad config, flags or input (one line on stderr); 143 stopped by SIGTERM after saving.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable

from vitcls.core import cluster, errors, terminal
from vitcls.core.cache import cache_dir
from vitcls.core.errors import RunError, Stopped, UserError

VERBS = {
    "train": "vitcls.main",
    "evaluate": "vitcls.evaluate",
    "predict": "vitcls.predict",
    "prepare": "vitcls.prepare",
    "models": "vitcls.models.__main__",
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that the caller prints."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command on its arguments (sys.argv[1:]) and returns its exit code."""
    terminal.print_anything()
    quiet_libraries()
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except BrokenPipeError:  # as of `| head`: nobody reads on
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what is left is flushed there at the end)
        return 0
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {one_line(error)}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


def one_line(error: Exception) -> str:
    """The message of an error, whatever values it quotes, as one line."""
    return " ".join(str(error).split())


def quiet_libraries() -> None:
    """Sends the words of vitcls to stderr, one plain line each, and only the complaints of the libraries."""
    terminal.quiet_tensorflow()
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("vitcls")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is now, not to what it was when logging was set up."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value) -> None:
        pass


def start_jax(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, if any, and turns on the persistent compilation cache.

    The processes are those of the flags, else of the environment (see `cluster.find`).
    """
    import jax

    found = cluster.find(coordinator, num_processes, process_id)
    if found is not None:
        logging.getLogger("vitcls").info("several processes: %s", found.found)
        terminal.chatter_to_stderr()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs that overlap could wait for each other
        try:
            jax.distributed.initialize(
                found.coordinator,
                found.num_processes,
                found.process_id,
                list(found.local_device_ids) if found.local_device_ids else None,
                # JAX's own detection would take one device of the host.
                cluster_detection_method="deactivate" if found.coordinator else None,
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the processes of the run did not find each other ({found.found}): {error}") from None
    use_cache()


def use_cache() -> None:
    """Turns on the persistent compilation cache."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


def main() -> int:
    """The installed script `vitcls`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vitcls {{{','.join(VERBS)}}} ...\n\nvitcls VERB --help tells more of each.")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"error: {errors.unknown('verb', verb, VERBS)}", file=sys.stderr)
        return 2
    return run(importlib.import_module(VERBS[verb]).main, rest)
