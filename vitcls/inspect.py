"""What the data are, and what is wrong with them: balance, blank images, duplicates, leakage, probable label errors.

vitcls inspect --config=FILE[:PRESET] | --data_dir=FOLDER|FILE.npz | --workdir=RUN  --out=DIR
    [--features=pixels|hog|color|WORKDIR|WEIGHTS|none] [--folds=5] [--config.dataset.KEY=VALUE ...]

Writes DIR (of a run, by default, RUN/inspect): tables, pictures and one page. Nothing is changed in the data.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vitcls import cli, config_file, data
from vitcls import config as configs
from vitcls.core import buckets, sharding
from vitcls.core.errors import UserError
from vitcls.data import duplicates
from vitcls.data.duplicates import Look, Pairs
from vitcls.data.sources.folder import FileImages
from vitcls.metrics.label_errors import LabelErrors, confident_learning
from vitcls.metrics.promises import proportion
from vitcls.probe import features
from vitcls.probe.classifiers import Examples
from vitcls.probe.cross_validation import cross_validated
from vitcls.probe.run import with_features
from vitcls.report import findings
from vitcls.report.findings import Plot, Table, Text, interval
from vitcls.report.part import Part
from vitcls.report.write import check_out
from vitcls.training import initial, places, run_dir

PART = "inspect"  # of a run's workdir
FILES = ("metrics.json", "index.html", "classes.csv", "duplicates.csv", "label_errors.csv", "skipped.csv")
FILES += ("classes.png", "contact_sheet.png", "duplicates.png", "label_errors.png")
NO_LABELS = "none"  # --features: no search for label errors
_FOLDER_SIZE = 64  # pixels to which photos of a folder are resized, where nothing else is said
_MOST_BY_FEATURES = 200_000  # images, of which all are compared with all
_SHOWN = 24  # pictures of a kind
_LISTED = 100_000  # lines of duplicates.csv
_MANY = 0.1  # pairs nearly equal for each image, which are too many for copies
_JUDGES = 0.8  # of the labels, on which a classifier that doubts others should agree


class Images(NamedTuple):
    """All images of a data set in one row: its splits one after the other."""

    dataset: data.Dataset
    names: tuple[str, ...]  # of the splits
    starts: np.ndarray  # int64 [S + 1], where each begins and the last ends
    labels: np.ndarray  # int32 [N]
    look: Look

    def split_of(self, index: int) -> tuple[str, int]:
        """The split of an image, and its place there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.names[number], int(index - self.starts[number])

    def file(self, index: int) -> str:
        """The file of an image below the root of the data; '' where it is none."""
        split, place = self.split_of(index)
        images = getattr(self.dataset, split).images
        return os.fsdecode(images.names[place]) if isinstance(images, FileImages) else ""

    def label(self, index: int) -> str:
        return self.dataset.class_names[self.labels[index]]

    def picture(self, index: int) -> np.ndarray:
        """uint8 [H, W, C]."""
        split, place = self.split_of(index)
        return data.read_image(getattr(self.dataset, split), place, self.dataset.image_shape)


class Found(NamedTuple):
    """What was found among the images."""

    first: np.ndarray  # int64 [N]: the first image that is equal to each
    blank: np.ndarray  # bool [N]
    pairs: Pairs  # equal ones, of correlation 1, and then those that are nearly so
    errors: LabelErrors | None
    probabilities: np.ndarray | None  # float32 [N, K], by cross-validation
    features: str


def inspect(config: configs.ConfigDict, out: pathlib.Path, *, data_dir: str = "", folds: int = 5) -> dict[str, Any]:
    """Looks at the data of a config, writes the directory `out` and returns its metrics.json.

    `config.probe.features` and `config.init.weights` say by what labels are judged, as `with_features` sets them.
    Raises UserError, before anything is written, where the data or the features cannot be used, or `out` holds anything
    but an earlier inspection: it would be replaced.
    """
    config = configs.resolve(config)
    configs.validate(config)
    out = out.absolute()
    check_out(out, FILES, "an inspection")
    place = run_dir.data_dir(None, config, data_dir)
    dataset, originals = data.load_with_originals(config.dataset, data_dir=place)
    with Part(out) as made:
        compute = None
        if config.probe.features != NO_LABELS:
            _check_folds(dataset, folds)
            compute = _features(config, dataset)
        images = _all_images(dataset, originals)
        rows = np.concatenate([compute(getattr(dataset, name)) for name in images.names]) if compute else None
        found = _find(images, rows, folds, config.probe.features)
        metrics = _metrics(images, found, folds)
        _write(made, images, found, metrics)
    return metrics


def _features(config: configs.ConfigDict, dataset: data.Dataset) -> Callable[[data.Split], np.ndarray]:
    """split -> features float32 [N, D], as the config's probe has them; raises UserError where it cannot."""
    config, start = initial.with_preprocessing(config, initial.look(config, None), dataset.image_shape[-1])
    info, partition = data.describe(dataset, config.dataset), sharding.all_devices("data")
    extractor = features.make_extractor(config, info, start, partition)
    shape, batch_size = dataset.image_shape, config.batch_size
    return lambda split: features.features_of(extractor, split, shape, partition, batch_size).rows


def _check_folds(dataset: data.Dataset, folds: int) -> None:
    counts = sum(
        np.bincount(getattr(dataset, name).labels, minlength=dataset.num_classes) for name in dataset.num_examples
    )
    if counts.min() < folds:
        name = dataset.class_names[int(counts.argmin())]
        raise UserError(
            f"class '{name}' has {counts.min()} images, too few for {folds} folds; give fewer --folds, or "
            f"--features={NO_LABELS} to look for no label errors"
        )


def _all_images(dataset: data.Dataset, originals: dict[str, data.Split]) -> Images:
    names = tuple(dataset.num_examples)
    splits = [originals[name] for name in names]
    looks = [duplicates.look(split, dataset.image_shape[-1]) for split in splits]
    starts = np.cumsum([0, *(len(split.labels) for split in splits)])
    labels = np.concatenate([split.labels for split in splits])
    return Images(dataset, names, starts, labels, Look(*(np.concatenate(part) for part in zip(*looks, strict=True))))


def _find(images: Images, rows: np.ndarray | None, folds: int, kind: str) -> Found:
    first = duplicates.exact_groups(images.look.digests)
    blank = duplicates.blank(images.look.thumbnails)
    once = np.flatnonzero((first == np.arange(len(first))) & ~blank)
    pairs = [duplicates.near_pairs(images.look.thumbnails[once])]
    if kind == "network" and len(once) <= _MOST_BY_FEATURES:
        pairs.append(duplicates.near_pairs_by_features(rows[once], images.look.thumbnails[once]))
    both = _with_equal(first, once, duplicates.merged(pairs))
    if rows is None:
        return Found(first, blank, both, None, None, kind)
    probabilities = cross_validated(Examples(rows, images.labels), folds)
    return Found(first, blank, both, confident_learning(images.labels, probabilities), probabilities, kind)


def _with_equal(first: np.ndarray, once: np.ndarray, near: Pairs) -> Pairs:
    """Equal images, by the first of each, and then near pairs among the images `once`, which are no more than alike."""
    again = np.flatnonzero(first != np.arange(len(first)))
    below_one = np.minimum(near.correlation, np.nextafter(np.float32(1), np.float32(0)))
    return Pairs(
        np.r_[first[again], once[near.first]],
        np.r_[again, once[near.second]],
        np.r_[np.ones(len(again), np.float32), below_one],
    )


def _metrics(images: Images, found: Found, folds: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "dataset": images.dataset.name,
        "num_examples": len(images.labels),
        "classes": images.dataset.num_classes,
        "skipped_files": len(images.dataset.skipped),
        "splits": {name: _split(images, found, name) for name in images.names},
        "duplicates": _duplicates(images, found),
    }
    if found.errors is not None:
        doubted = np.zeros(len(images.labels), bool)
        doubted[found.errors.indices] = True
        metrics["label_errors"] = {
            "found": len(found.errors.indices),
            "share": proportion(doubted),
            "by_split": {name: int(doubted[_rows(images, name)].sum()) for name in images.names},
            "features": found.features,
            "folds": folds,
            "accuracy": proportion(found.probabilities.argmax(axis=1) == images.labels),
        }
    return metrics


def _rows(images: Images, name: str) -> slice:
    number = images.names.index(name)
    return slice(int(images.starts[number]), int(images.starts[number + 1]))


def _split(images: Images, found: Found, name: str) -> dict[str, Any]:
    rows = _rows(images, name)
    names, labels, sizes = images.dataset.class_names, images.labels[rows], images.look.sizes[rows]
    mean, std = data.mean_and_std(getattr(images.dataset, name), images.dataset.image_shape)
    counts = np.bincount(labels, minlength=len(names))
    area = sizes.prod(axis=1)
    return {
        "num_examples": len(labels),
        "distinct": len(np.unique(found.first[rows])),
        "blank": int(found.blank[rows].sum()),
        "per_class": {name: int(count) for name, count in zip(names, counts, strict=True)},
        "smallest_image": sizes[area.argmin()].tolist(),
        "largest_image": sizes[area.argmax()].tolist(),
        "mean": np.round(mean, 4).tolist(),
        "std": np.round(std, 4).tolist(),
    }


def _duplicates(images: Images, found: Found) -> dict[str, Any]:
    pairs = found.pairs
    numbers = np.searchsorted(images.starts, np.stack([pairs.first, pairs.second]), side="right") - 1
    exact = pairs.correlation == 1
    between = {}
    for i, one in enumerate(images.names):
        for j in range(i, len(images.names)):
            both = (numbers[0] == i) & (numbers[1] == j)
            between[one if i == j else f"{one} and {images.names[j]}"] = {
                "exact": int((both & exact).sum()),
                "near": int((both & ~exact).sum()),
            }
    differ = images.labels[pairs.first] != images.labels[pairs.second]
    result = {"pairs": between, "with_different_labels": int(differ.sum())}
    if "test" in images.names:
        result["test_equal_in_training"] = proportion(_leaked(images, found, exact))
        result["test_seen_in_training"] = proportion(_leaked(images, found, np.ones(len(exact), bool)))
    return result


def _leaked(images: Images, found: Found, which: np.ndarray) -> np.ndarray:
    """Which test images have a twin in another split, by these of the pairs: bool [T]."""
    rows, pairs = _rows(images, "test"), Pairs(*(part[which] for part in found.pairs))
    elsewhere = np.ones(len(images.labels), bool)
    elsewhere[rows] = False
    twin = np.zeros(len(images.labels), bool)
    for one, other in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        twin[one[elsewhere[other]]] = True
    twin |= twin[found.first]  # whoever is equal to one that has a twin
    return twin[rows]


def _write(made: Part, images: Images, found: Found, metrics: dict[str, Any]) -> None:
    from vitcls.report import data_plots as plots

    pairs = found.pairs
    counts = {name: split["per_class"] for name, split in metrics["splits"].items()}
    blocks = [
        *(Text(line) for line in _lines(metrics)),
        _split_table(metrics),
        Plot("classes", "Classes", "Images of each class.", lambda: plots.class_counts(counts)),
        Plot("contact_sheet", "Images", "Some of each class.", lambda: plots.contact_sheet(_by_class(images))),
        _pair_table(images, pairs, metrics),
        Plot(
            "duplicates",
            "Duplicates",
            "Pairs that are equal or nearly so: those with different labels first, then those between splits.",
            lambda: plots.pairs(_pictures(images, pairs)),
        ),
    ]
    if found.errors is not None:
        blocks += [
            _error_table(images, found),
            Plot(
                "label_errors",
                "Probable label errors",
                "The surest: the label, and what the image rather is.",
                lambda: plots.labelled(_doubted(images, found)),
            ),
        ]
    if images.dataset.skipped:
        rows = [[skipped.path, skipped.reason] for skipped in images.dataset.skipped]
        blocks.append(Table("Files that cannot be used", ["File", "Why"], rows, "skipped"))
    findings.write(
        made,
        title=f"The data: {metrics['dataset']}",
        lead=f"{metrics['num_examples']:,} images, {metrics['classes']:,} classes",
        metrics=metrics,
        blocks=blocks,
    )


def _lines(metrics: dict[str, Any]) -> list[str]:
    """What it came to."""
    lines = []
    for name, split in metrics["splits"].items():
        counts = split["per_class"].values()
        lines.append(
            f"{name}: {split['num_examples']:,} images, {split['distinct']:,} of them distinct; {min(counts):,} to "
            f"{max(counts):,} of a class; {split['blank']:,} show nothing"
        )
    found = metrics["duplicates"]
    exact, near = (sum(row[kind] for row in found["pairs"].values()) for kind in ("exact", "near"))
    lines.append(
        f"duplicates: {exact:,} equal, {near:,} pairs nearly so; {found['with_different_labels']:,} of them have "
        "different labels"
    )
    if "test_seen_in_training" in found:
        lines.append(
            f"test images that another split has too: {interval(found['test_equal_in_training'], '{:.2%}')}; with "
            f"those that look nearly equal: {interval(found['test_seen_in_training'], '{:.2%}')}"
        )
    if near > _MANY * sum(split["num_examples"] for split in metrics["splits"].values()):
        lines.append(
            "so many pairs that look nearly equal are rather images of one kind, as digits are, than copies: see "
            "duplicates.png"
        )
    if "label_errors" in metrics:
        errors = metrics["label_errors"]
        lines.append(
            f"probable label errors: {errors['found']:,}, {interval(errors['share'], '{:.2%}')} of the images; a "
            f"classifier of {errors['features']} features agrees with {errors['accuracy']['value']:.1%} of the labels"
        )
        if errors["accuracy"]["value"] < _JUDGES:
            lines.append(
                f"{errors['features']} features tell these classes apart too seldom to judge labels: most doubts are "
                "rather mistakes of that classifier; --features of a run or of published weights find fewer and surer"
            )
    if metrics["skipped_files"]:
        lines.append(f"files that cannot be used: {metrics['skipped_files']:,}, see skipped.csv")
    return lines


def _split_table(metrics: dict[str, Any]) -> Table:
    head = ["Split", "Images", "Distinct", "Blank", "Smallest, height x width", "Largest"]
    head += ["Mean of channels, 0 to 1", "Deviation of channels"]
    rows = [
        [
            name,
            *(f"{split[key]:,}" for key in ("num_examples", "distinct", "blank")),
            *("x".join(map(str, split[key])) for key in ("smallest_image", "largest_image")),
            *(", ".join(f"{value:.3f}" for value in split[key]) for key in ("mean", "std")),
        ]
        for name, split in metrics["splits"].items()
    ]
    values = [["split", "class", "images"]]
    values += [[s, name, n] for s, split in metrics["splits"].items() for name, n in split["per_class"].items()]
    return Table("Splits", head, rows, "classes", values)


def _pair_table(images: Images, pairs: Pairs, metrics: dict[str, Any]) -> Table:
    rows = [[name, f"{row['exact']:,}", f"{row['near']:,}"] for name, row in metrics["duplicates"]["pairs"].items()]
    values = [["kind", "correlation", *(f"{key}_{n}" for n in (1, 2) for key in ("split", "index", "file", "label"))]]
    for first, second, correlation in zip(*(part[:_LISTED].tolist() for part in pairs), strict=True):
        kind = "exact" if correlation == 1 else "near"
        ends = (cell for i in (first, second) for cell in (*images.split_of(i), images.file(i), images.label(i)))
        values.append([kind, f"{correlation:.4f}", *ends])
    return Table("Duplicates", ["In", "Equal", "Nearly equal"], rows, "duplicates", values)


def _error_table(images: Images, found: Found) -> Table:
    names = images.dataset.class_names
    joint = found.errors.joint.copy()
    np.fill_diagonal(joint, 0)
    order = np.argsort(-joint, axis=None, kind="stable")[:_SHOWN]
    rows = [
        [names[i], names[j], f"{joint[i, j]:,}"]
        for i, j in zip(*np.unravel_index(order, joint.shape), strict=True)
        if joint[i, j]
    ]
    values = [["split", "index", "file", "label", "suggested", "probability_label", "probability_suggested"]]
    for index, suggested in zip(found.errors.indices.tolist(), found.errors.suggested.tolist(), strict=True):
        chances = (f"{found.probabilities[index, k]:.4f}" for k in (images.labels[index], suggested))
        values.append([*images.split_of(index), images.file(index), images.label(index), names[suggested], *chances])
    return Table("Labels that are doubted most often", ["Label", "Rather", "Images"], rows, "label_errors", values)


def _by_class(images: Images) -> dict[str, list[np.ndarray]]:
    """Some training images of up to 20 classes."""
    rng, labels = np.random.default_rng(0), images.labels[_rows(images, "train")]
    chosen = np.sort(rng.permutation(images.dataset.num_classes)[:20])
    sheet = {}
    for k in chosen.tolist():
        sheet[images.dataset.class_names[k]] = [
            images.picture(int(i)) for i in rng.permutation(np.flatnonzero(labels == k))[:10]
        ]
    return sheet


def _pictures(images: Images, pairs: Pairs) -> list[tuple[tuple[np.ndarray, str], ...]]:
    differ = images.labels[pairs.first] != images.labels[pairs.second]
    apart = np.searchsorted(images.starts, pairs.first, side="right") != np.searchsorted(
        images.starts, pairs.second, side="right"
    )
    order = np.lexsort((-pairs.correlation, ~apart, ~differ))[:_SHOWN]
    both = zip(pairs.first[order].tolist(), pairs.second[order].tolist(), strict=True)
    return [tuple((images.picture(i), f"{images.split_of(i)[0]}: {images.label(i)}") for i in pair) for pair in both]


def _doubted(images: Images, found: Found) -> list[tuple[np.ndarray, str]]:
    errors, names = found.errors, images.dataset.class_names
    rows = zip(errors.indices[:_SHOWN].tolist(), errors.suggested[:_SHOWN].tolist(), strict=True)
    return [(images.picture(i), f"{images.label(i)}\n→ {names[k]}") for i, k in rows]


def _config(flags: argparse.Namespace, overrides: list) -> configs.ConfigDict:
    """The config of the data, with what judges the labels."""
    given = [name for name in ("config", "workdir") if getattr(flags, name)]
    if len(given) > 1:
        raise UserError("--config and --workdir both say what the data are; give one")
    if not given and not flags.data_dir:
        raise UserError("give --config=FILE, --data_dir=FOLDER or --workdir=RUN")
    if flags.workdir:
        config = run_dir.open_workdir(flags.workdir).config.copy_and_resolve_references()
    elif flags.config:
        config = config_file.load(flags.config, overrides)
    else:
        config = configs.default_config("lenet5")  # whatever it is: no model is made
        is_file = os.path.isfile(flags.data_dir)
        config.dataset.update(name="npz" if is_file else "folder", data_dir=os.path.abspath(flags.data_dir))
        if not is_file:
            config.dataset.image_size = _FOLDER_SIZE
    # All images, in the splits that they came in.
    config.dataset.update(validation=0.0, num_folds=0, fraction=1.0, corrections="")
    kind = flags.features or flags.workdir or "hog"
    if kind == NO_LABELS:
        config.probe.features = NO_LABELS
        return config
    return with_features(config, kind)


def _check_apart(out: pathlib.Path, root: pathlib.Path) -> None:
    if out.resolve().is_relative_to(root.expanduser().resolve()):
        raise UserError(f"--out={out} is among the data, where its pictures would be images of them; name another")


def main(argv: list[str]) -> None:
    rest, overrides = config_file.split_overrides(argv)
    parser = cli.Parser(prog=cli.program("inspect"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", metavar="FILE[:PRESET]", help="whose data are looked at")
    parser.add_argument(
        "--workdir", default="", metavar="DIR", help="a run, whose data are looked at, also by its eyes"
    )
    parser.add_argument(
        "--data_dir", default="", metavar="DIR", help="a folder of classes, or an npz file; or where the data are now"
    )
    parser.add_argument("--out", default="", metavar="DIR", help="what is written; default: inspect/ in the workdir")
    parser.add_argument(
        "--features", default="", metavar="WHAT", help="pixels, hog, color, a workdir, a file of weights, none"
    )
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="of the cross-validation behind label errors")
    cli.add_import_argument(parser)
    flags = parser.parse_args(rest)
    if flags.folds < 2:
        raise UserError(f"--folds={flags.folds} must be at least 2")
    if overrides and not flags.config:
        raise UserError("--config.KEY=VALUE changes a --config, and none is given")
    if not flags.out and not flags.workdir:
        raise UserError("--out=DIR says where the report is to be written")
    buckets.check_local(flags.out, "--out")
    config = _config(flags, overrides)
    cli.start_jax()
    data_dir = flags.data_dir if flags.config or flags.workdir else ""
    if flags.out and config.dataset.name == "folder":
        _check_apart(pathlib.Path(flags.out).expanduser(), pathlib.Path(data_dir or config.dataset.data_dir))
    if flags.out:
        out = pathlib.Path(flags.out).expanduser()
        metrics = inspect(config, out, data_dir=data_dir, folds=flags.folds)
    else:
        where = run_dir.open_workdir(flags.workdir).path
        out = pathlib.Path(flags.workdir) / PART
        metrics = inspect(config, where / PART, data_dir=data_dir, folds=flags.folds)
        places.publish(flags.workdir, where, PART)
    print("\n".join(_lines(metrics)))
    print(f"report: {os.path.join(out, 'index.html')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
