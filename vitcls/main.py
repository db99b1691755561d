"""Train, evaluate and report; started again on the same workdir it resumes.

python -m vitcls.main --config=configs/vit_digits.py --workdir=DIR [--config.a.b=value ...] [--dry_run]
    [--profile_steps=FIRST:LAST] [--data_dir=DIR]
"""

import os
import re
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags

from vitcls import cli
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.train import train_and_evaluate
from vitcls.training import facts, run_dir
from vitcls.training.profiling import parse_steps


def define_flags() -> flags.FlagValues:
    """Fresh flags of the command, so that it can run more than once in a process."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Path of the config, and after a colon its preset.", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "Where the run lives: config, metrics, checkpoints, report.", flag_values=values
    )
    flags.DEFINE_string(
        "data_dir", "", "Where the data of a run are now, if they have moved since it began.", flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "Check everything up to the first step by shapes alone.", flag_values=values)
    flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST; writes a trace of these steps to WORKDIR/profile.", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes take part.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def help_text(values: flags.FlagValues) -> str:
    """The usage and every flag with its help."""
    lines = [__doc__.strip(), ""]
    for name in values:
        flag = values[name]
        if name == flag.name:  # and not its short form
            form = f"-{flag.short_name}, " * bool(flag.short_name) + f"--{name}" + "=VALUE" * (not flag.boolean)
            lines.append(f"  {form:<22} {flag.help}")
    lines.append(f"  {'--config.KEY=VALUE':<22} Another value for a key of the config; vitcls/config.py has all keys.")
    return "\n".join(lines)


def parse(argv: list[str]) -> flags.FlagValues:
    """Parses the flags and loads the config; raises UserError with one line for whatever is wrong."""
    arguments = sys.argv
    try:
        return _parse(argv)
    finally:
        sys.argv = arguments  # as the command was started, for the report


def _parse(argv: list[str]) -> flags.FlagValues:
    values = define_flags()
    overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
    others = [argument for argument in argv if argument not in overrides]
    path = next((text.partition("=")[2] for text in others if text.lstrip("-").startswith("config=")), "")
    if any(text.lstrip("-") == "config=" for text in others):
        raise UserError("--config= names no file; give one, such as --config=configs/vit_digits.py")
    if path and not os.path.isfile(path.partition(":")[0]):
        raise UserError(f"the config file '{path.partition(':')[0]}' is not there; see the directory configs/")
    try:
        sys.argv = [sys.argv[0], *others]
        values(sys.argv)  # config_flags reads overrides from sys.argv
        if not (values.help or values.config):
            raise UserError("--config=FILE is missing, such as --config=configs/vit_digits.py")
        for override in overrides:
            _check_override(values.config, override, argv)
        values = define_flags()
        sys.argv = [sys.argv[0], *argv]
        rest = values(sys.argv)[1:]
    except flags.Error as error:
        raise UserError(_in_one_line(str(error), path)) from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a config file can do
        raise UserError(_of_config_file(error, path)) from None
    if rest:
        raise UserError(f"'{rest[0]}' belongs to no flag; flags are --NAME=VALUE, see --help")
    return values


def _of_config_file(error: BaseException, path: str) -> str:
    """What a config file raised, in one line, with the line of the file."""
    file = path.partition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
    place = f"{file}, line {lines[-1]}," if lines else file
    text = " ".join(str(error).split())
    if unknown := re.search(r'Key "(.+?)" does not exist and cannot be added', text):
        hint = re.search(r'Did you mean "(.+?)"', text)
        return f"{place} sets '{unknown[1]}', which is no key there" + (f"; did you mean '{hint[1]}'?" if hint else "")
    if isinstance(error, SystemExit):
        return f"{place} ends the program (SystemExit: {text}); a config file returns its config from get_config()"
    return f"{place} cannot be loaded: {type(error).__name__}: {text}"


_NO_NUMBER = {
    "invalid literal for int() with base 10": "is not a whole number",
    "could not convert string to float": "is not a number",
}


def _in_one_line(message: str, path: str) -> str:
    """What the flags complain of; of a config file that raised, its line and the error without the traceback."""
    config_file, _, preset = path.partition(":")
    if preset and "get_config() takes 0 positional arguments but 1 was given" in message:
        return f"{config_file} has no presets, so it takes no ':{preset}'"
    if "Traceback (most recent call last)" in message:
        numbers = re.findall(rf'File "[^"]*{re.escape(os.path.basename(config_file))}", line (\d+)', message)
        error = re.split(r"\n +.*\n(?! )", message)[-1]  # what comes after the last line that is indented
        place = f"{config_file}, line {numbers[-1]}," if numbers else config_file
        ours = f"{UserError.__module__}.{UserError.__qualname__}: "  # says enough by itself
        message = error.removeprefix(ours) if error.startswith(ours) else f"{place} cannot be loaded: {error}"
    for complaint, words in _NO_NUMBER.items():
        message = re.sub(rf"^flag (.*): {re.escape(complaint)}.*", rf"\1 {words}", message)
    return " ".join(message.split())


def _check_override(config: ConfigDict, override: str, argv: list[str]) -> None:
    """Raises UserError for a key that is not there, and for one without a value, which would take the next flag."""
    name, equals, _ = override.lstrip("-").partition("=")
    key = name.removeprefix("config.")
    node = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            raise errors.unknown("config key", key, _keys(config))
        node = node[part]
    following = [*argv, "--"][argv.index(override) + 1]
    if not equals and not isinstance(node, bool) and following.startswith("--"):
        raise UserError(f"--{name} has no value; write --{name}=VALUE")


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        value = config.get_ref(key).get() if config.get_type(key) is not ConfigDict else config[key]
        names += _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names


def main(argv: list[str]) -> None:
    values = parse(argv)
    if values.help:
        print(help_text(values))
        return
    if not values.workdir and not values.dry_run:
        raise UserError("--workdir=DIR is missing: where the run is to live")
    run_dir.local(values.workdir or "")
    profile_steps = parse_steps(values.profile_steps)
    cli.start_jax(values.coordinator, values.num_processes, values.process_id)
    results = train_and_evaluate(
        values.config,
        values.workdir or "",
        dry_run=values.dry_run,
        profile_steps=profile_steps,
        data_dir=values.data_dir,
    )
    if results:
        print(facts.headline(results, values.workdir))


if __name__ == "__main__":
    sys.exit(cli.run(main))
