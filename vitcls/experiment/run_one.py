"""Trains one run of a table in a process of its own, whose end is that run's alone: reads the config from stdin.

python -m vitcls.experiment.run_one WORKDIR
"""

import sys

from vitcls import cli
from vitcls import config as configs
from vitcls.train import train_and_evaluate


def main(argv: list[str]) -> None:
    (workdir,) = argv
    config = configs.from_json(sys.stdin.read())
    cli.start_jax()
    train_and_evaluate(config, workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main))
