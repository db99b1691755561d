"""Evaluate a workdir: predictions -> metrics -> report.

vitcls evaluate --workdir=DIR [--split=test] [--checkpoint=last|best|STEP] [--data_dir=DIR] [--calibrated]
    [--groups=FILE.csv|coarse]

--calibrated takes the probabilities that `vitcls calibrate` has made of them. --groups says whom the run fails: the CSV
file has the columns file (or index) and group, for each image of the split; coarse are the 20 classes of CIFAR-100.
"""

import os
import sys

from vitcls import cli
from vitcls.core.errors import UserError
from vitcls.metrics.groups import by_group
from vitcls.report import findings, group_page
from vitcls.report.part import Part
from vitcls.training import calibration, facts, places, run_dir
from vitcls.training.evaluator import write_report
from vitcls.training.opened import open_with_data
from vitcls.training.predictions import read_predictions

GROUPS = "groups"  # what --groups writes in the workdir
SPLITS = ("test", "validation", "train")


def evaluate(
    path: os.PathLike | str,
    *,
    split: str = "test",
    checkpoint: str = "",
    data_dir: str = "",
    calibrated: bool = False,
    groups: str = "",
) -> dict:
    """Evaluates a trained workdir as its config says and writes its report again; returns the metrics.

    With `groups`, a CSV file or 'coarse', it writes groups/ as well. Raises UserError where there is no such workdir,
    split, checkpoint or calibration, the data are not what they were, or the groups are not of them.
    """
    opened = open_with_data(path, splits=(split,), checkpoint=checkpoint, data_dir=data_dir)
    if opened.trained.config.probe.features:
        raise UserError(f"{path} holds a probe, whose report is that of `vitcls probe`, which makes it anew")
    grouping = opened.groups(groups, split) if groups else None
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
    if report and grouping:
        _write_groups(opened.trained, grouping)
        places.publish(path, opened.trained.path, GROUPS)
    if report:
        places.publish(path, opened.trained.path, "report")
    return report


def _write_groups(trained: run_dir.Workdir, grouping: list[str]) -> None:
    """Of the predictions that the report keeps."""
    kept = read_predictions(trained)
    found = by_group(kept.labels, kept.probabilities(), grouping)
    report = {key: kept.report[key] for key in ("dataset", "split", "checkpoint_step", "num_examples")}
    with Part(trained.path / GROUPS) as made:
        findings.write(
            made,
            title=f"Groups of {report['dataset']}",
            lead=f"{report['num_examples']:,} images of the {report['split']} split in {len(found['groups'])} groups; "
            f"step {report['checkpoint_step']:,}",
            metrics=report | found,
            blocks=group_page.blocks(found, trained.info.class_names),
        )


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("evaluate"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--data_dir", default="", help="where the data are now, if they have moved")
    parser.add_argument("--calibrated", action="store_true", help="as vitcls calibrate has made them")
    cli.add_groups_argument(parser)
    flags = parser.parse_args(argv)
    cli.start_jax()
    results = evaluate(
        flags.workdir,
        split=flags.split,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
        calibrated=flags.calibrated,
        groups=flags.groups,
    )
    if results:
        print(facts.headline(results, flags.workdir))
    if results and flags.groups:
        print(f"groups: {os.path.join(flags.workdir, GROUPS, 'index.html')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
