"""Train a run on with what users corrected, and serve the result if it is better.

    vitcls retrain --workdir=DIR --feedback=URL --out=DIR2 [--weight=10] [--total='200 steps'] [--config.a.b=value ...]
    vitcls retrain --workdir=DIR --rollback

Starts from the weights that are served for DIR, on its training data and four fifths of the images with feedback, each
`weight` times an epoch. DIR2 is a run as any other; the same command goes on where it was. It is promoted, so that the
server of DIR takes it up, where it is not worse on the test split and better on the other fifth.
"""

import argparse
import json
import logging
import pathlib
import shutil
import sys

from vitcls import cli, config_file
from vitcls import config as configs
from vitcls.calibrate import calibrate
from vitcls.core import buckets, cluster
from vitcls.core.errors import UserError
from vitcls.data.corrections import RECORD
from vitcls.feedback.store import open_store
from vitcls.retrain import verdict
from vitcls.retrain.collect import collect
from vitcls.serve import promotion
from vitcls.train import train_and_evaluate
from vitcls.training import build, run_dir
from vitcls.training.files import CALIBRATION_FILE, CONFIG_FILE, CORRECTIONS, UNKNOWN_FILE
from vitcls.unknown import PART as UNKNOWN
from vitcls.unknown import unknown

_SHARE = 10  # a tenth of the steps that the run itself took
_WEIGHT = 10
_RATE = 0.1  # of its learning rate
_logger = logging.getLogger("vitcls")


def main(argv: list[str]) -> None:
    flags, overrides = _parse(argv)
    workdir = pathlib.Path(flags.workdir)
    if flags.rollback:
        print(f"{promotion.rollback(workdir)} is served for {workdir} again")
        return
    if cluster.find(None, None, None):
        raise UserError("vitcls retrain is for one process, which uses all devices of its machine")
    cli.use_cache()
    config = retrained(workdir, flags, overrides)
    out = pathlib.Path(flags.out)
    train_and_evaluate(config, out, data_dir=flags.data_dir)
    measure_again(pathlib.Path(config.init.weights), out, flags.data_dir)
    found = verdict.judge(pathlib.Path(config.init.weights), out, data_dir=flags.data_dir)
    found.write(out)
    if found.promoted:
        _check_is_served(workdir, pathlib.Path(config.init.weights), out)  # another may have been promoted meanwhile
        promotion.promote(workdir, out)
    print(found.words())


def measure_again(champion: pathlib.Path, out: pathlib.Path, data_dir: str) -> None:
    """Calibrates the new run, and finds its threshold of what is unknown, where the old one had that.

    By a temperature, which changes no answer: the validation split may have the errors that users have corrected, and
    other methods would learn them.
    """
    for has, measure in (
        (CALIBRATION_FILE, lambda: calibrate(out, method="temperature", data_dir=data_dir)),
        (UNKNOWN_FILE, lambda: _find_threshold(champion, out, data_dir)),
    ):
        if (champion / has).exists():
            try:
                measure()
            except UserError as error:
                _logger.warning("%s is served without a %s of its own: %s", out, has, error)


def _find_threshold(champion: pathlib.Path, out: pathlib.Path, data_dir: str) -> None:
    """By the same score and the same strangers."""
    try:
        found = json.loads((champion / UNKNOWN / "metrics.json").read_text(encoding="utf-8"))
        strangers = [of.get("place", name) for name, of in found["sets"].items()]
        score, ood_data_dir = found["score"], found.get("ood_data_dir", "")  # older runs have the names alone
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{champion / UNKNOWN / 'metrics.json'} cannot be used ({error})") from None
    unknown(out, strangers, score=score, data_dir=data_dir, ood_data_dir=ood_data_dir)


def retrained(workdir: pathlib.Path, flags: argparse.Namespace, overrides: list) -> configs.ConfigDict:
    """The config of the new run, whose corrections are written; that of the run in flags.out where it has begun."""
    out = pathlib.Path(flags.out)
    if (out / CONFIG_FILE).exists():
        begun = run_dir.open_workdir(out).config
        if not begun.dataset.corrections or not begun.init.weights:
            raise UserError(f"--out={out} holds a run that retrain has not begun; name another directory")
        champion = run_dir.open_workdir(begun.init.weights)
        _check_is_served(workdir, champion.path, out)
        config = _config(champion, out, flags, overrides)
        _logger.info("goes on with the feedback that it began with; what has come since is for another --out")
        return config
    champion = run_dir.open_workdir(promotion.current(workdir))
    config = _config(champion, out, flags, overrides)
    if (out / CORRECTIONS / RECORD).exists():  # of a start that did not come to training
        shutil.rmtree(out / CORRECTIONS)
    _collect(flags.feedback, champion, config.dataset.data_dir, out / CORRECTIONS)
    return config


def _check_is_served(workdir: pathlib.Path, champion: pathlib.Path, out: pathlib.Path) -> None:
    """Raises UserError where a run is served by now that `out` is not compared with, or `out` was withdrawn."""
    try:
        served = promotion.current(workdir)
    except UserError:  # that run is gone, and any is better
        return
    if served.resolve() not in (champion.resolve(), out.resolve()):
        raise UserError(
            f"{served} is served for {workdir} by now, and --out={out} began from {champion}; name another --out"
        )
    if served.resolve() != out.resolve() and promotion.was_withdrawn(workdir, out):
        raise UserError(f"--out={out} was promoted for {workdir} and withdrawn; name another --out")


def _config(champion: run_dir.Workdir, out: pathlib.Path, flags: argparse.Namespace, overrides: list):
    """That of the champion, from its weights on: a tenth of its steps, at a tenth of its rate, along a cosine.

    A champion that is a retrained run itself has such a schedule.
    """
    config = champion.config.copy_and_resolve_references()
    if not config.dataset.corrections:
        config.total = f"{max(1, build.make_plan(config, champion.info).total // _SHARE)} steps"
        config.optimizer.learning_rate *= _RATE
        config.schedule.update(name="cosine", warmup="5%")
        config.early_stopping.patience = 0
        config.dataset.correction_weight = _WEIGHT
    config.total = flags.total or config.total
    config.init.update(weights=str(champion.path), head="keep")
    config.dataset.corrections = str(out / CORRECTIONS)
    if flags.weight is not None:
        config.dataset.correction_weight = flags.weight
    config.dataset.data_dir = run_dir.data_dir(champion.path, config, flags.data_dir)
    for key, text in overrides:
        config_file.override(config, key, text)
    config = configs.resolve(config)
    configs.validate(config)  # before the corrections are written
    return config


def _collect(url: str, champion: run_dir.Workdir, place: str, root: pathlib.Path) -> None:
    store = open_store(url, create=False)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        record = collect(store, champion, place, root)
    except OSError as error:
        raise UserError(f"--out={root.parent} cannot be made: {error.strerror or error}") from None
    finally:
        store.close()
    counts, replaced = record["images"], sum(map(len, record["replaced"].values()))
    _logger.info(
        "feedback: %s images train, %s are held out, %s images of the data are replaced",
        f"{counts['train']:,}",
        f"{counts['held_out']:,}",
        f"{replaced:,}",
    )
    for why, images in record["left_out"].items():
        if images:
            _logger.warning("left out (%s): %s", why, ", ".join(images))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list]:
    rest, overrides = config_file.split_overrides(argv)
    parser = cli.Parser(prog=cli.program("retrain"), description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run that is served")
    parser.add_argument("--feedback", metavar="URL", help="sqlite:///PATH or postgresql://USER@HOST/DATABASE")
    parser.add_argument("--out", metavar="DIR2", help="where the new run lives")
    parser.add_argument("--weight", type=int, metavar="N", help="times that a correction is in an epoch; default: 10")
    parser.add_argument("--total", default="", metavar="DURATION", help="as config.total; default: 10%% of the run's")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where the data are now, if they have moved")
    parser.add_argument("--rollback", action="store_true", help="serve what was served before the last promotion")
    cli.add_import_argument(parser)
    flags = parser.parse_args(rest)
    if not flags.rollback and not (flags.feedback and flags.out):
        raise UserError("--feedback=URL and --out=DIR2 are needed, or --rollback; see --help")
    for name in ("workdir", "out"):
        buckets.check_local(getattr(flags, name) or "", f"--{name}")
    return flags, overrides


if __name__ == "__main__":
    sys.exit(cli.run(main))
