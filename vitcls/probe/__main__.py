"""Fit a classical classifier to features of a network or of the images, and write the report.

vitcls probe --features=pixels|hog|color|WORKDIR|WEIGHTS --classifier=linear|knn|svm|centroid --config=FILE
    --workdir=DIR [--shots=1,5,10,25] [--config.a.b=value ...]
"""

import argparse
import sys

from vitcls import cli, config_file
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.metrics import METRICS
from vitcls.probe.classifiers import CLASSIFIERS
from vitcls.probe.run import probe, with_features
from vitcls.training import facts, places


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    places.check(flags.workdir)
    cli.start_jax()
    results = probe(flags.config, flags.workdir, data_dir=flags.data_dir)
    for row in results["few_shot"]:
        mean, low, high = (METRICS["accuracy"].show(row[key]) for key in ("accuracy", "low", "high"))
        print(f"{row['shots']} of each class: accuracy {mean} ({low} to {high})")
    print(facts.headline(results, flags.workdir))


def _parse(argv: list[str]) -> argparse.Namespace:
    rest, overrides = config_file.split_overrides(argv)
    parser = cli.Parser(prog=cli.program("probe"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="the data, and the model of WEIGHTS")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the report is to live")
    parser.add_argument(
        "--features", required=True, metavar="WHAT", help="pixels, hog, color, a run's workdir or a file of weights"
    )
    parser.add_argument("--classifier", required=True, metavar="NAME", help=", ".join(CLASSIFIERS))
    parser.add_argument("--shots", default="", metavar="1,5,10", help="images of each class, for few-shot accuracies")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where the data are now, if they have moved")
    cli.add_import_argument(parser)
    flags = parser.parse_args(rest)
    if flags.classifier not in CLASSIFIERS:
        raise errors.unknown("--classifier", flags.classifier, CLASSIFIERS)
    flags.config = with_features(config_file.load(flags.config, overrides), flags.features)
    flags.config.probe.classifier = flags.classifier
    flags.config.probe.shots = _shots(flags.shots)
    return flags


def _shots(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise UserError(f"--shots={text} is no list of numbers, such as 1,5,10") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
