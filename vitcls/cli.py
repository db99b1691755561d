"""What all commands share: `vitcls COMMAND ...` is `python -m MODULE ...`, and every command ends in the same ways.

Exit codes: 0 done; 1 failure; 2 bad config, flags or input (one line on stderr); 130 Ctrl-C; 143 stopped by SIGTERM
after saving, or removing what was half done.
"""

import argparse
import contextlib
import difflib
import errno
import gc
import importlib
import importlib.util
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import vitcls
from vitcls.core import cluster, errors, meeting, peers, terminal
from vitcls.core.cache import cache_dir
from vitcls.core.errors import RunError, Stopped, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk says


class Verb(NamedTuple):
    """A command: `vitcls VERB` is `python -m MODULE`."""

    module: str
    group: str  # its purpose
    help: str


VERBS = {
    "train": Verb("vitcls.main", "train", "train a config, or go on with its run, and write the report"),
    "evaluate": Verb("vitcls.evaluate", "compare", "evaluate a run on a split and write its report again"),
    "compare": Verb("vitcls.compare", "compare", "test which of several runs is better, and show where they differ"),
    "experiment": Verb("vitcls.experiment", "compare", "run a table of configs and seeds, and say which differ"),
    "probe": Verb("vitcls.probe", "compare", "fit a classical classifier to features of a network or of the images"),
    "worth": Verb("vitcls.worth", "compare", "what published weights are worth on your own images, and what to do"),
    "tune": Verb("vitcls.tune", "train", "search config keys by the validation split, and write the best config"),
    "calibrate": Verb(
        "vitcls.calibrate", "trust", "make a run's probabilities honest, and promise what answers are worth"
    ),
    "unknown": Verb(
        "vitcls.unknown", "trust", "measure whether a run knows what it has not seen, and keep a threshold"
    ),
    "robustness": Verb(
        "vitcls.robustness", "trust", "measure what breaks a run: corruptions, occlusion, shifts, rotations, JPEG"
    ),
    "attack": Verb("vitcls.attack", "trust", "measure accuracy on images that are changed to be misclassified"),
    "explain": Verb("vitcls.explain", "trust", "show where a run looks, and whether that is true"),
    "predict": Verb("vitcls.predict", "use", "label image files with a run"),
    "export": Verb("vitcls.export", "use", "write a run as one file that needs no vitcls, checked before it is kept"),
    "serve": Verb("vitcls.serve", "use", "answer over HTTP, with a page, feedback and metrics"),
    "replay": Verb("vitcls.replay", "use", "compute again what a served run has answered, to the bit"),
    "feedback": Verb("vitcls.feedback", "use", "list, export or forget what users said of answers"),
    "retrain": Verb("vitcls.retrain", "use", "train a run on with corrections, and serve it if that is better"),
    "prepare": Verb("vitcls.prepare", "data", "download and prepare a data set of TensorFlow Datasets"),
    "inspect": Verb(
        "vitcls.inspect", "data", "say what a data set is: balance, duplicates, leakage, probable label errors"
    ),
    "adopt": Verb("vitcls.adopt", "train", "say what a file of published weights is, and how it wants its images"),
    "status": Verb("vitcls.status", "train", "one line for each run: step, loss, accuracy, speed, alive or not"),
    "models": Verb("vitcls.models", "help", "the table of models: parameters, FLOPs, memory, paper"),
}


def program(verb: str) -> str:
    """How the command was invoked: 'vitcls VERB', or 'python -m vitcls.VERB'."""
    as_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return f"python -m {VERBS[verb].module}" if as_module else f"vitcls {verb}"


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that the caller prints, and a flag has one name only."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def parse_args(self, args=None, namespace=None):
        try:
            flags, rest = self.parse_known_args(args, namespace)
        except UserError:  # a required flag may be missing because it is misspelt
            self._check_known(sys.argv[1:] if args is None else args)
            raise
        for text in rest:
            if text.startswith("--"):
                raise errors.unknown("flag", text.partition("=")[0], self._flags())
            raise UserError(f"'{text}' belongs to no flag; flags are --NAME=VALUE, see --help")
        return flags

    def _check_known(self, args: Sequence[str]) -> None:
        """Raises UserError for the first flag that resembles a known one."""
        for name in (text.partition("=")[0] for text in args if text.startswith("--")):
            if name not in self._flags() and difflib.get_close_matches(name, self._flags(), n=1, cutoff=0.8):
                raise errors.unknown("flag", name, self._flags())

    def _flags(self) -> set[str]:
        """Of the command and of those inside it, but for what its help does not tell."""
        inner = [action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        told = (action.option_strings for action in self._actions if action.help is not argparse.SUPPRESS)
        known = set().union(*told, *(parser._flags() for parsers in inner for parser in parsers))
        return {flag for flag in known if flag.startswith("--")}

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=118)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all commands on a trained run."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")
    add_import_argument(parser)
    parser.add_argument(
        "--checkpoint", default="", metavar="STEP", help="'last', 'best' or a step; default: config.report.checkpoint"
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of all commands that read the config of a run."""
    parser.add_argument(
        "--import", action="append", type=_import, metavar="MODULE", help="one that registers parts which the run uses"
    )


imported: list[str] = []  # by the flag


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
        imported.append(module)
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"{module} cannot be imported ({error})") from None


def add_groups_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of the commands that look at groups of images."""
    parser.add_argument(
        "--groups", default="", metavar="FILE", help="a CSV file with file (or index) and group; 'coarse' for CIFAR-100"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all commands that run on several processes; the environment says it for most clusters."""
    once = {"action": _Once}
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, for several processes", **once)
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many processes take part", **once)
    parser.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0", **once)


class _Once(argparse.Action):
    """A flag of which the last does not win: two values mean that two launchers have spoken."""

    def __call__(self, parser, namespace, value, option_string=None):
        given = getattr(namespace, self.dest)
        if given not in (None, value):
            raise UserError(f"two of --{self.dest}, {given} and {value}; give one")
        setattr(namespace, self.dest, value)


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command on its arguments (sys.argv[1:]) and returns its exit code."""
    terminal.print_anything()
    quiet_libraries()
    # Tracing makes millions of small objects that stay; Python's default would search them for garbage again and again.
    gc.set_threshold(50_000, 20, 20)
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except SystemExit as exit:  # of --help
        return exit.code or 0
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
    except KeyboardInterrupt as interrupt:  # of commands that leave nothing half done; training saves first
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(exit_code(interrupt))  # in order, Python would end under a compilation that goes on, and crash
    except Exception as error:
        if _watch is None and isinstance(error, OSError) and error.errno in _FULL:
            print(f"failed: {one_line(error)}; make room and run it again", file=sys.stderr)
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (whoever still writes fails as well)
            return 1
        if _watch is None and isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: a name is too long for the disk: {one_line(error)}", file=sys.stderr)
            return 2
        if _watch is None:
            raise
        _watch.wait(error)
        traceback.print_exc()
        peers.end(f"{type(error).__name__}: {one_line(error)}")  # an orderly end would wait for the others


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt with its number, as Ctrl-C raises one without: what is half done is removed."""

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Of a command that a signal has ended, as shells have it."""
    return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def one_line(error: Exception) -> str:
    """The message of an error, whatever values it quotes, as one line."""
    return " ".join(str(error).split())


def quiet_libraries() -> None:
    """Logs vitcls to stderr in plain lines, and silences the libraries below warnings."""
    terminal.quiet_tensorflow()
    handler = _CurrentStderr()
    handler.setFormatter(_Words())
    logger = logging.getLogger("vitcls")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Words(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return errors.said(super().format(record))


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is now, not to what it was when logging was set up."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value) -> None:
        pass


_watch: peers.Watch | None = None  # of the other processes, if there are any


def start_jax(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cpu_devices: int = 1,
) -> None:
    """Joins the other processes, if any, and turns on the persistent compilation cache.

    The processes are those of the flags, else of the environment (see `cluster.find`). A single process makes its CPU
    `cpu_devices` virtual devices, if neither JAX_NUM_CPU_DEVICES nor XLA_FLAGS say how many.
    """
    import jax

    found = cluster.find(coordinator, num_processes, process_id)
    said = jax.config.jax_num_cpu_devices != -1 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if found is None and cpu_devices > 1 and not said:
        with contextlib.suppress(RuntimeError):  # JAX has started, in a notebook or a test
            jax.config.update("jax_num_cpu_devices", cpu_devices)
    if found is not None:
        logging.getLogger("vitcls").info("several processes: %s", found.found)
        terminal.chatter_to_stderr()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs that overlap could wait for each other
        jax.config.update("jax_enable_preemption_service", False)  # swallows a SIGTERM that comes before the training
        if found.coordinator:
            meeting.meet(found)
        try:
            jax.distributed.initialize(
                found.coordinator,
                found.num_processes,
                found.process_id,
                list(found.local_device_ids) if found.local_device_ids else None,
                # JAX's own detection would take one device of the host.
                cluster_detection_method="deactivate" if found.coordinator else None,
                heartbeat_timeout_seconds=peers.HEARTBEAT,
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the processes of the run did not find each other ({found.found}): {error}") from None
        global _watch
        _watch = peers.watch()
    elif platforms := jax.config.jax_platforms:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter of a plugin that is not installed
            reason = one_line(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "it is not there"
            raise UserError(f"JAX_PLATFORMS={platforms} cannot be used: {reason}; set another, or unset it") from None
    use_cache()


def use_cache() -> None:
    """Turns on the persistent compilation cache."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


def main() -> int:
    """The installed script `vitcls`."""
    verb, *rest = sys.argv[1:] or [""]
    if verb == "help" and rest:
        verb, rest = rest[0], ["--help"]
    if verb in VERBS:
        return run(importlib.import_module(_door(VERBS[verb].module)).main, rest)
    return run(_about_commands, [verb])


def _about_commands(arguments: list[str]) -> int:
    """What there is besides the commands; raises UserError for an unknown one."""
    (asked,) = arguments
    if asked == "--version":
        print(f"vitcls {vitcls.__version__}")
    elif asked in ("", "-h", "--help", "help"):
        print(help_text())
    else:
        raise errors.unknown("command", asked, VERBS)
    return 0 if asked else 2


def _door(module: str) -> str:
    """The module that `python -m` runs."""
    spec = importlib.util.find_spec(module)
    return f"{module}.__main__" if spec.submodule_search_locations else module


def help_text() -> str:
    """All commands, by purpose."""
    lines = ["usage: vitcls COMMAND ...   (or --version)", "", "vitcls COMMAND --help tells more of each.", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += [f"{group}:", *(f"  {name:<10} {verb.help}" for name, verb in VERBS.items() if verb.group == group)]
    return "\n".join(lines)
