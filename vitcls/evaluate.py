"""Evaluate a workdir: predictions -> metrics -> report.

vitcls evaluate --workdir=DIR [--split=test] [--checkpoint=last|best|STEP] [--data_dir=DIR]
"""

import os
import sys

from vitcls import cli, data
from vitcls.core import sharding
from vitcls.core.errors import UserError
from vitcls.training import build, facts, places, run_dir
from vitcls.training.evaluator import make_evaluator, write_report

SPLITS = ("test", "validation", "train")


def evaluate(path: os.PathLike | str, *, split: str = "test", checkpoint: str = "", data_dir: str = "") -> dict:
    """Evaluates a trained workdir as its config says and writes its report again; returns the metrics.

    Raises UserError where there is no such workdir, split or checkpoint, or the data are not what they were.
    """
    trained = run_dir.open_workdir(path)
    config = trained.config
    model = build.make_model(config, trained.info)
    step, variables = trained.restore(model, checkpoint or config.report.checkpoint)
    place = run_dir.data_dir(trained.path, config, data_dir)
    dataset = data.load(config.dataset, data_dir=place, max_value=trained.info.max_value)
    now = _kind_of(dataset.class_names, dataset.image_shape, dataset.num_examples)
    then = _kind_of(trained.info.class_names, trained.info.image_shape, trained.info.num_examples)
    if now != then:
        raise UserError(
            f"the data of '{config.dataset.name}' are not those of the training: {now[1]} now, {then[1]} then; "
            "give the original with --data_dir"
        )
    remembers = build.make_task(config, trained.info).remember is not None
    if data.choose_pipeline(dataset, config.dataset) == "resident":
        dataset = data.decode(dataset, (split, "train") if remembers else (split,))
    partition = sharding.all_devices("data")
    evaluator = make_evaluator(config, model, trained.info, dataset, partition)
    report = write_report(
        trained.path,
        config,
        trained.info,
        dataset,
        evaluator,
        model,
        partition.replicate(variables),
        split=split,
        step=step,
    )
    if report:
        places.publish(path, trained.path, "report")
    return report


def _kind_of(names: tuple[str, ...], shape: tuple[int, ...], num_examples: dict[str, int]) -> tuple[tuple, str]:
    """What must not change between training and evaluation: the names of the classes, and the rest in words."""
    counts = ", ".join(f"{count:,} {split}" for split, count in num_examples.items())
    return names, f"{len(names)} classes of {'x'.join(map(str, shape))}, {counts} images"


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("evaluate"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--data_dir", default="", help="where the data are now, if they have moved")
    flags = parser.parse_args(argv)
    cli.start_jax()
    results = evaluate(flags.workdir, split=flags.split, checkpoint=flags.checkpoint, data_dir=flags.data_dir)
    if results:
        print(facts.headline(results, flags.workdir))


if __name__ == "__main__":
    sys.exit(cli.run(main))
