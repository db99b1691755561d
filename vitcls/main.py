"""Train, evaluate and report; started again on the same workdir it resumes.

vitcls train --config=configs/vit_digits.py --workdir=DIR [--config.a.b=value ...] [--dry_run]
    [--profile_steps=FIRST:LAST] [--data_dir=DIR]
"""

import argparse
import sys

from vitcls import cli, config_file
from vitcls import config as configs
from vitcls.core.errors import UserError
from vitcls.core.sharding import STRATEGIES
from vitcls.tasks import TASKS
from vitcls.train import train_and_evaluate
from vitcls.training import cpu_devices, facts, places
from vitcls.training.profiling import parse_steps

_KEYS = (  # that are used the most
    ("model.name=NAME", "another model, with its own keys; vitcls models lists them"),
    ("task.name=NAME", f"another training objective: {', '.join(TASKS)}"),
    ("dataset.data_dir=DIR", "where the data are"),
    ("batch_size=N", "examples per update, over all devices"),
    ("total='N epochs'", "the length of the run; durations are steps, epochs, examples or %"),
    ("optimizer.learning_rate=X", "the highest learning rate"),
    ("partition.strategy=NAME", f"one of {', '.join(STRATEGIES)}"),
    ("seed=N", "of initial weights, order and augmentation"),
    ("KEY=VALUE", "any other; vitcls/config.py has them all"),
)


def make_parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  --config.{key:<26} {what}" for key, what in _KEYS)
    parser = cli.Parser(
        prog=cli.program("train"),
        description=__doc__.splitlines()[0],
        epilog=f"keys of the config:\n{keys}",
    )
    parser.add_argument("--config", metavar="FILE[:PRESET]", help="the config file, and after a colon its preset")
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives: config, metrics, checkpoints, report")
    parser.add_argument("--data_dir", metavar="DIR", default="", help="where the data are now, if they have moved")
    parser.add_argument("--dry_run", action="store_true", help="check everything up to the first step by shapes alone")
    parser.add_argument("--profile_steps", metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile")
    cli.add_process_arguments(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags and loads the config; raises UserError with one line for whatever is wrong."""
    rest, overrides = config_file.split_overrides(argv)
    flags = make_parser().parse_args(rest)
    if not flags.config:
        raise UserError("--config=FILE is missing, such as --config=configs/vit_digits.py")
    flags.config = config_file.load(flags.config, overrides)
    return flags


def main(argv: list[str]) -> None:
    flags = parse(argv)
    if not flags.workdir and not flags.dry_run:
        raise UserError("--workdir=DIR is missing: where the run is to live")
    places.check(flags.workdir or "")
    profile_steps = parse_steps(flags.profile_steps)
    config = configs.resolve(flags.config)
    configs.validate(config)
    processes = (flags.coordinator, flags.num_processes, flags.process_id)
    cli.start_jax(*processes, cpu_devices=cpu_devices.choose(config))
    results = train_and_evaluate(
        config,
        flags.workdir or "",
        dry_run=flags.dry_run,
        profile_steps=profile_steps,
        data_dir=flags.data_dir,
    )
    if results:
        print(facts.headline(results, flags.workdir))


if __name__ == "__main__":
    sys.exit(cli.run(main))
