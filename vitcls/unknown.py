"""Does a run know when it does not know? Test images against images of something else.

vitcls unknown --workdir=DIR --ood=DATASET|FOLDER|FILE.npz... [--score=auto|msp|energy|mahalanobis|knn]
    [--checkpoint=last|best|STEP] [--data_dir=DIR] [--ood_data_dir=DIR]

Writes DIR/unknown with the figures of four scores, and keeps the best one's threshold in DIR/unknown.json: `vitcls
predict` then says which images are unlike anything seen.
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls import cli, data, predict
from vitcls.core import buckets
from vitcls.core.errors import UserError
from vitcls.data.images import LUMA
from vitcls.data.sources.folder import FileImages
from vitcls.metrics.promises import proportion
from vitcls.metrics.unknown import FEWEST, SCORES, auroc, separation, threshold
from vitcls.report import findings
from vitcls.report.findings import Plot, Table, Text, ends, ends_of, interval
from vitcls.report.part import Part
from vitcls.training import novelty, places, run_dir
from vitcls.training.files import UNKNOWN_ARRAYS, UNKNOWN_FILE
from vitcls.training.novelty import Novelty
from vitcls.training.opened import Opened, open_with_data

KEPT = 0.95  # of the validation images are known
PART = "unknown"  # of the workdir
_MOST = 10_000  # images of each set
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_LABELS = {
    "auroc": "AUROC",
    "fpr95": "FPR at 95 % TPR",
    "aupr_known": "AUPR, known",
    "aupr_unknown": "AUPR, unknown",
}


def unknown(
    path: os.PathLike | str,
    ood: Sequence[str],
    *,
    score: str = "auto",
    checkpoint: str = "",
    data_dir: str = "",
    ood_data_dir: str = "",
) -> dict[str, Any]:
    """Measures all scores, keeps one in the workdir, writes unknown/ and returns its metrics.json.

    With 'auto' the score is chosen on one half of the unknown images, and every figure is of the other half. Raises
    UserError, before anything is written, where a workdir or images are not there.
    """
    opened = open_with_data(path, splits=("train", "validation", "test"), checkpoint=checkpoint, data_dir=data_dir)
    own_place = run_dir.data_dir(opened.trained.path, opened.trained.config, data_dir)
    strangers = {name: _strangers(opened, name, ood_data_dir, own_place) for name in ood}
    for name, split in strangers.items():
        if len(split.labels) < 2:
            raise UserError(f"--ood={name} has one image, which cannot both choose the score and measure it; give more")
    where = opened.trained.path
    with Part(where / PART) as made:
        fitted = _fit(opened)
        names = list(SCORES)
        known = _scores(opened, fitted, opened.dataset.test)
        held = _scores(opened, fitted, opened.dataset.validation)
        others = {name: _scores(opened, fitted, split) for name, split in strangers.items()}
        halves = {
            name: np.random.default_rng(0).permutation(len(split.labels)) % 2 == 0 for name, split in strangers.items()
        }
        first = {s: np.mean([auroc(known[s], others[o][s][halves[o]]) for o in others]) for s in names}
        chosen = max(first, key=first.get) if score == "auto" else score
        limit = threshold(held[chosen], KEPT)
        metrics = {
            "dataset": opened.trained.info.name,
            "checkpoint_step": opened.step,
            "num_examples": len(opened.dataset.test.labels),
            "score": chosen,
            "threshold": limit,
            "kept_on_test": proportion(known[chosen] >= limit),
            "ood_data_dir": place if buckets.is_url(place := ood_data_dir) else place and os.path.abspath(place),
            "sets": {
                o: {
                    "place": _place(o),
                    "num_examples": int((~halves[o]).sum()),
                    "found": proportion(others[o][chosen][~halves[o]] < limit),
                    "scores": {s: separation(known[s], others[o][s][~halves[o]]) for s in names},
                }
                for o in others
            },
        }
        pooled = {s: (known[s], np.concatenate([others[o][s][~halves[o]] for o in others])) for s in names}
        _write(made, metrics, pooled)
        novelty.write(where, Novelty(opened.step, chosen, fitted[chosen], limit, KEPT))
    for part in (PART, UNKNOWN_ARRAYS, UNKNOWN_FILE):
        places.publish(path, where, part)
    return metrics


def _fit(opened: Opened) -> dict[str, Any]:
    train = opened.dataset.train
    rows = np.sort(np.random.default_rng(0).permutation(len(train.labels))[: 2 * _MOST])
    split = train.take(rows)
    outputs = opened.outputs(split)
    return {name: kind.fit(outputs, split.labels) for name, kind in SCORES.items()}


def _scores(opened: Opened, fitted: dict[str, Any], split: data.Split | None) -> dict[str, np.ndarray]:
    if split is None:
        raise UserError("the threshold needs validation images; set config.dataset.validation above 0")
    outputs = opened.outputs(split)
    return {name: score(outputs) for name, score in fitted.items()}


def _strangers(opened: Opened, name: str, data_dir: str, own_place: str) -> data.Split:
    """Images of something else, as the model sees images; the labels are not looked at.

    `own_place` is where the data of the run are now.
    """
    own, is_folder = opened.trained.config.dataset, os.path.isdir(name)
    if is_folder or name.endswith(".npz"):
        is_own = bool(own_place) and os.path.realpath(name) == os.path.realpath(own_place)
    else:
        is_own = name == own.name and (name not in ("folder", "npz") or data_dir in ("", own_place))
    files = []
    if is_folder and not is_own:
        files = sorted(p for p in pathlib.Path(name).rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        own_files = _own_files(opened)
        is_own = any(os.path.realpath(file) in own_files for file in files)
    if is_own:
        raise UserError(f"--ood={name} is what the run was trained on; give images of something else")
    if is_folder:
        if not files:
            raise UserError(f"--ood={name} has no images")
        chosen = np.random.default_rng(0).permutation(len(files))[:_MOST]
        images = predict.read_all([files[i] for i in np.sort(chosen)], opened.trained)
        return data.Split(images, np.zeros(len(images), np.int32))
    return _take(_test_of(opened, name, data_dir), opened.trained.info.image_shape)


def _own_files(opened: Opened) -> frozenset[str]:
    """The files of a run on a folder, by their whole paths."""
    splits = (opened.files.train, opened.files.validation, opened.files.test)
    images = [split.images for split in splits if split is not None and isinstance(split.images, FileImages)]
    return frozenset(
        os.path.join(os.path.realpath(each.root), os.fsdecode(name)) for each in images for name in each.names
    )


def _place(name: str) -> str:
    """What `--ood` would be in another directory: a folder or a file by its whole path, a data set by its name."""
    return os.path.abspath(name) if name.endswith(".npz") or pathlib.Path(name).is_dir() else name


def _test_of(opened: Opened, name: str, data_dir: str) -> data.Split:
    """The test split of a data set by its name, or of an npz file."""
    config = opened.trained.config.dataset.copy_and_resolve_references()
    in_file, place = name.endswith(".npz"), os.path.abspath(name)
    if not in_file and (os.sep in name or os.path.exists(name)):
        raise UserError(f"--ood={name} is neither a folder of images, nor an .npz file, nor the name of a data set")
    config.update(name="npz" if in_file else name, data_dir=place if in_file else data_dir)
    config.update(fraction=1.0, num_folds=0, corrections="")
    with config.ignore_type():  # of a number
        config.image_size = tuple(opened.trained.info.image_shape[:2])
    return data.load(config).test


def _take(split: data.Split, image_shape: tuple[int, int, int]) -> data.Split:
    """Up to 10,000 images uint8 [N, H, W, C] of a split, with as many channels as the model takes."""
    split = split.take(np.sort(np.random.default_rng(0).permutation(len(split.labels))[:_MOST]))
    channels = image_shape[-1]
    images = data.pixels(split, image_shape)
    if images.shape[-1] != channels:
        gray = np.rint(images @ LUMA) if images.shape[-1] == 3 else images[..., 0]
        images = np.repeat(gray[..., None].astype(np.uint8), channels, axis=-1)
    return data.Split(images, split.labels)


def _write(made: Part, metrics: dict[str, Any], pooled: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    def drawn():
        from vitcls.report import unknown_plots

        return unknown_plots.histograms(pooled, metrics["score"], metrics["threshold"])

    scores = [row for found in metrics["sets"].values() for row in found["scores"].values()]
    few = any(row["auroc"]["low"] is None for row in scores)
    findings.write(
        made,
        title=f"What {metrics['dataset']} is not",
        lead=f"{metrics['num_examples']:,} test images against images of something else; step "
        f"{metrics['checkpoint_step']:,}",
        metrics=metrics,
        blocks=[
            Text(
                f"'{metrics['score']}' is kept: from {metrics['threshold']:.6g} on an image is known, which "
                f"{KEPT:.0%} of the validation images are and of the test images "
                f"{interval(metrics['kept_on_test'], '{:.2%}')}."
            ),
            *(_table(i, name, metrics["sets"]) for i, name in enumerate(metrics["sets"])),
            *([Text(f"AUROC and AUPR of fewer than {FEWEST} images have no intervals.")] if few else []),
            Plot("scores", "Scores", "Known and unknown images by each score.", drawn),
        ],
    )


def _table(place: int, name: str, sets: dict[str, Any]) -> Table:
    """Of the set at a place: called by the last part of its path, unless two are called so."""
    found, stems = sets[name], [pathlib.Path(each).stem for each in sets]
    alone = len(set(stems)) == len(stems)
    shown, file = (pathlib.Path(name).name, stems[place]) if alone else (name, f"{stems[place]}_{place + 1}")
    rows = [
        [score, *(interval(figures[key], "{:.2%}") for key in _LABELS)] for score, figures in found["scores"].items()
    ]
    title = f"{shown}: {interval(found['found'], '{:.1%}')} of {found['num_examples']:,} images are called unknown"
    values = [["score", *ends_of(*_LABELS)]]
    values += [[s, *ends(*(found["scores"][s][key] for key in _LABELS))] for s in SCORES]
    return Table(title, ["Score", *_LABELS.values()], rows, f"scores_{file}", values)


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("unknown"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument(
        "--ood", action="append", required=True, metavar="SET", help="a data set, a folder of images, or an npz file"
    )
    parser.add_argument("--score", choices=("auto", *SCORES), default="auto", help="default: the best of all")
    parser.add_argument("--data_dir", default="", help="where the data of the run are now, if they have moved")
    parser.add_argument("--ood_data_dir", default="", metavar="DIR", help="where the data sets of --ood are")
    flags = parser.parse_args(argv)
    cli.start_jax()
    metrics = unknown(
        flags.workdir,
        flags.ood,
        score=flags.score,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
        ood_data_dir=flags.ood_data_dir,
    )
    for name, found in metrics["sets"].items():
        best = found["scores"][metrics["score"]]
        kept = interval(metrics["kept_on_test"], "{:.1%}")
        print(
            f"{name}: {metrics['score']} AUROC {interval(best['auroc'], '{:.2%}')}, FPR at 95 % TPR "
            f"{interval(best['fpr95'], '{:.2%}')}; {interval(found['found'], '{:.1%}')} of {found['num_examples']:,} "
            f"images are called unknown, and {kept} of the test images known"
        )
    print(f"report: {os.path.join(flags.workdir, PART, 'index.html')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
