"""Evaluate a workdir: predictions -> metrics -> report.

vitcls evaluate --workdir=DIR [--split=test] [--checkpoint=last|best|STEP] [--data_dir=DIR] [--calibrated]

--calibrated takes the probabilities that `vitcls calibrate` has made of them.
"""

import os
import sys

from vitcls import cli
from vitcls.training import calibration, facts, places
from vitcls.training.evaluator import write_report
from vitcls.training.opened import open_with_data

SPLITS = ("test", "validation", "train")


def evaluate(
    path: os.PathLike | str,
    *,
    split: str = "test",
    checkpoint: str = "",
    data_dir: str = "",
    calibrated: bool = False,
) -> dict:
    """Evaluates a trained workdir as its config says and writes its report again; returns the metrics.

    Raises UserError where there is no such workdir, split, checkpoint or calibration, or the data are not what they
    were.
    """
    opened = open_with_data(path, splits=(split,), checkpoint=checkpoint, data_dir=data_dir)
    report = write_report(
        opened.trained.path,
        opened.trained.config,
        opened.trained.info,
        opened.dataset,
        opened.evaluator,
        opened.model,
        opened.variables,
        split=split,
        step=opened.step,
        scale=calibration.read_for(opened.trained.path, opened.step).scaling if calibrated else None,
    )
    if report:
        places.publish(path, opened.trained.path, "report")
    return report


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("evaluate"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--data_dir", default="", help="where the data are now, if they have moved")
    parser.add_argument("--calibrated", action="store_true", help="as vitcls calibrate has made them")
    flags = parser.parse_args(argv)
    cli.start_jax()
    results = evaluate(
        flags.workdir,
        split=flags.split,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
        calibrated=flags.calibrated,
    )
    if results:
        print(facts.headline(results, flags.workdir))


if __name__ == "__main__":
    sys.exit(cli.run(main))
