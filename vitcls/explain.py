"""Show where a run looks in an image, and whether that is true.

vitcls explain --workdir=DIR [FILE...] [--method=gradcam,gradcam++,rollout,attention,integrated_gradients,smoothgrad,
    occlusion,feature_maps] [--classes=N] [--images=N] [--checkpoint=last|best|STEP] [--data_dir=DIR]
vitcls explain --table

Maps of the files, or of test images, for the most probable classes. Each is compared with random maps that are as
smooth, and is greyed out where it is no better. DIR/explain has the overlays, the figures and a page.
"""

import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcls import cli, data, models, predict
from vitcls.attribution import evidence
from vitcls.attribution.evidence import Evidence
from vitcls.attribution.explainer import DEFAULT, METHODS, TOLERANCE, Explainer, Heat
from vitcls.attribution.network import make_network
from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress
from vitcls.metrics.promises import proportion
from vitcls.metrics.resampling import estimate
from vitcls.models.variables import variable_shapes
from vitcls.report import findings, overlays
from vitcls.report.findings import Picture, Table, Text, ends, ends_of, interval
from vitcls.report.overlays import Drawn
from vitcls.report.part import Part
from vitcls.training import places
from vitcls.training.opened import Opened, open_with_data

PART = "explain"  # of the workdir
_SAMPLE = 512  # test images from which those that are shown and those of the tests are drawn
_RANDOMISED = 16  # images of the randomisation test
_MOSAICS = 64  # at most, of twice as many
_STAYS = 0.5  # a rank correlation, or the opposite, that a map of a network without its weights should not have


class Shown(NamedTuple):
    """The images that are explained."""

    names: list[str]
    pixels: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray | None  # int [N]; None of files


class Overlay(NamedTuple):
    """A map of one image for one class."""

    image: int
    method: str
    label: int
    heat: np.ndarray  # float32 [H, W]
    evidence: Evidence


def explain(
    path: os.PathLike | str,
    files: Sequence[pathlib.Path] = (),
    *,
    methods: Sequence[str] = (),
    classes: int = 2,
    images: int = 16,
    checkpoint: str = "",
    data_dir: str = "",
) -> dict[str, Any]:
    """Explains and checks; writes explain/ in the workdir and returns its metrics.json.

    Raises UserError, before anything is written, for what is not there or a method that the model cannot do.
    """
    opened = open_with_data(path, splits=("test",), checkpoint=checkpoint, data_dir=data_dir)
    where = opened.trained.path
    with Part(where / PART) as made:
        explainer = opened.explainer
        methods = explainer.choose(methods)
        given = _of_files(opened, files) if files else None
        sample = _sample(opened)
        tested = _right_and_wrong(explainer, sample, images)
        shown = given or tested
        probabilities = explainer.probabilities(_floats(shown.pixels))
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :classes].astype(np.int32)
        found, drawn = {}, []
        for method in show_progress(methods, len(methods), "methods"):
            heats = [explainer.maps(method, _floats(shown.pixels), column) for column in top.T]
            drawn += _overlays(explainer, method, shown, top, heats)
            first = [one.evidence for one in drawn if one.method == method and one.label == top[one.image, 0]]
            found[method] = _figures(explainer, method, first, heats) | _tests(explainer, method, sample, tested)
        metrics = {
            "dataset": opened.trained.info.name,
            "model": opened.trained.config.model.name,
            "checkpoint_step": opened.step,
            "num_examples": len(shown.names),
            "methods": found,
            "overlays": [_row(one, shown, probabilities, opened.trained.info.class_names) for one in drawn],
            "chance": {"pointing": 0.25, "better": evidence.LEVEL},
            "units": _UNITS,
        }
        _write(made, metrics, shown, drawn)
    places.publish(path, where, PART)
    return metrics


_UNITS = {
    "deletion": "area under the probability of the class while the map's places are removed, 0 to 1; low is good",
    "insertion": "the same while they are put into an empty image; high is good",
    "better": "fraction of the images, with the most probable class, whose map beats its random maps (p <= 0.05)",
    "pointing": "fraction of mosaics of four images, of which the network sees one, where the map is highest there",
    "pointing_mass": "mean share of a map in that tile",
    "randomisation": "mean Spearman correlation with the map of the network with weights dealt anew from the top down",
    "completeness": "|sum of the map - difference of logits| / |difference|, of the worst map",
}


def _of_files(opened: Opened, files: Sequence[pathlib.Path]) -> Shown:
    names = [file.name for file in files]
    names = [name if names.count(name) == 1 else str(file) for name, file in zip(names, files, strict=True)]
    return Shown(names, predict.read_all(list(files), opened.trained), None)


def _sample(opened: Opened) -> Shown:
    """Some test images, the same each time."""
    split, info = opened.dataset.test, opened.trained.info
    chosen = np.random.default_rng(0).permutation(len(split.labels))[:_SAMPLE]
    some = split.take(chosen)
    return Shown([f"test image {i}" for i in chosen], data.pixels(some, info.image_shape), some.labels)


def _right_and_wrong(explainer: Explainer, sample: Shown, count: int) -> Shown:
    """Half of the images that were recognised and half of those that were not, as far as there are any."""
    is_right = explainer.probabilities(_floats(sample.pixels)).argmax(axis=1) == sample.labels
    right, wrong = np.flatnonzero(is_right), np.flatnonzero(~is_right)
    wrong = wrong[: max(count // 2, count - len(right))]
    chosen = np.concatenate([right[: count - len(wrong)], wrong])
    return Shown([sample.names[i] for i in chosen], sample.pixels[chosen], sample.labels[chosen])


def _floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 255


def _overlays(
    explainer: Explainer, method: str, shown: Shown, top: np.ndarray, heats: Sequence[Heat]
) -> Iterable[Overlay]:
    for labels, heat in zip(top.T, heats, strict=True):
        for i, one in enumerate(explainer.evidence(_floats(shown.pixels), labels, heat.maps)):
            yield Overlay(i, method, int(labels[i]), heat.maps[i], one)


def _figures(explainer: Explainer, method: str, found: Sequence[Evidence], heats: Sequence[Heat]) -> dict[str, Any]:
    """What the maps of the most probable classes come to, against their random maps."""
    errors = [heat.completeness_error for heat in heats if heat.completeness_error is not None]
    gains = {
        "deletion_gain": [one.random_deletion.mean() - one.deletion for one in found],
        "insertion_gain": [one.insertion - one.random_insertion.mean() for one in found],
    }
    return {
        "deletion": mean_and_interval([one.deletion for one in found]),
        "insertion": mean_and_interval([one.insertion for one in found]),
        **{name: mean_and_interval(values) for name, values in gains.items()},
        "better": proportion(np.array([one.better_than_random for one in found])),
        "completeness": {"value": float(np.max(errors)), "kept": bool(np.max(errors) <= TOLERANCE)} if errors else None,
    }


def mean_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    """value, low and high of the mean of values [N]; None without any."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    return estimate({"values": np.asarray(values)}, lambda means: means["values"])


def _tests(explainer: Explainer, method: str, sample: Shown, tested: Shown) -> dict[str, Any]:
    """The randomisation test and the pointing game, on test images."""
    images, labels = _floats(tested.pixels[:_RANDOMISED]), tested.labels[:_RANDOMISED].astype(np.int32)
    maps = explainer.maps(method, images, labels).maps
    correlations = explainer.randomisation(method, images, labels, maps)
    stages = {stage: mean_and_interval(values) for stage, values in correlations.items()}
    last = stages[evidence.STAGES[-1]]
    hits, shares = _pointing(explainer, method, sample)
    return {
        "randomisation": stages,
        "depends_on_weights": _depends(last),
        "pointing": proportion(np.array(hits, bool)),
        "pointing_mass": mean_and_interval(shares),
    }


def _depends(correlation: dict[str, float | None]) -> bool | None:
    """Whether maps change with the weights, and are not merely turned round; None where one image says it."""
    if correlation["low"] is None:
        return None
    return max(map(abs, correlation.values())) < _STAYS


def _pointing(explainer: Explainer, method: str, sample: Shown) -> tuple[list[bool], list[float]]:
    """Of mosaics in which the network sees the class of a tile: without that, a map has nothing to point at."""
    rng = np.random.default_rng(0)
    made = evidence.mosaics(_floats(sample.pixels), sample.labels, 2 * _MOSAICS, rng)
    if not made:
        return [], []
    seen = explainer.probabilities(np.stack([mosaic.image for mosaic in made])).argmax(axis=1)
    pairs = [(one, label) for one, label in zip(made, seen, strict=True) if label in one.classes][:_MOSAICS]
    if not pairs:
        return [], []
    labels = np.array([label for _, label in pairs], np.int32)
    maps = explainer.maps(method, np.stack([one.image for one, _ in pairs]), labels).maps
    places = evidence.tiles(maps.shape[1:])
    tiles = [places[list(one.classes).index(label)] for one, label in pairs]
    found = [evidence.pointed(heat, tile, rng) for heat, tile in zip(maps, tiles, strict=True)]
    return [hit for hit, _ in found], [share for _, share in found]


def _row(one: Overlay, shown: Shown, probabilities: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    return {
        "image": shown.names[one.image],
        "true_class": names[shown.labels[one.image]] if shown.labels is not None else None,
        "method": one.method,
        "class": names[one.label],
        "probability": float(probabilities[one.image, one.label]),
        "deletion": one.evidence.deletion,
        "random_deletion": one.evidence.random("deletion"),
        "insertion": one.evidence.insertion,
        "random_insertion": one.evidence.random("insertion"),
        "p_value": one.evidence.p_value,
        "better_than_random": one.evidence.better_than_random,
        "file": f"overlay-{one.image + 1}-{one.method.replace('+', 'p')}-{one.label}.png",
    }


def _write(made: Part, metrics: dict[str, Any], shown: Shown, drawn: Sequence[Overlay]) -> None:
    rows = metrics["overlays"]
    pairs = list(zip(drawn, rows, strict=True))
    findings.write(
        made,
        title=f"Where {metrics['model']} looks on {metrics['dataset']}",
        lead=f"{len(shown.names):,} images at step {metrics['checkpoint_step']:,}, {len(rows):,} maps",
        metrics=metrics,
        blocks=[
            _methods_table(metrics["methods"]),
            Text(
                "Deletion: the mean probability of the class while the places of the map are removed, highest first "
                "(low is good). Insertion: while they are put into an empty image (high is good). Both against "
                f"{evidence.RANDOM_MAPS} random maps as smooth as the map; a map that does not beat them all in "
                "insertion less deletion (p = 0.05) is grey. Of maps that know nothing, one in twenty is coloured."
            ),
            *(_sheet(i, shown, [pair for pair in pairs if pair[0].image == i]) for i in range(len(shown.names))),
            _overlays_table(rows),
            *(_alone(shown, one, row) for one, row in pairs),
        ],
    )


def _methods_table(methods: dict[str, Any]) -> Table:
    head = ["Method", "Removes more than random", "Restores more than random", "Maps better than random"]
    head += ["Points at the class (chance 25 %)", *(f"Correlation without weights: {s}" for s in evidence.STAGES)]
    head += ["Complete within"]
    keys = ("deletion_gain", "insertion_gain", "better", "pointing")
    rows = [
        [
            name,
            *(interval(found[key], "{:.1%}") for key in keys),
            *(interval(found["randomisation"][stage], "{:.2f}") for stage in evidence.STAGES[:-1]),
            _correlation(found),
            _completeness(found),
        ]
        for name, found in methods.items()
    ]
    shown, stages = (*keys, "pointing_mass"), evidence.STAGES
    columns = ends_of(*shown, *(f"randomised_{stage.replace(' ', '_')}" for stage in stages))
    values = [
        [name, *ends(*(found[key] for key in shown), *(found["randomisation"][stage] for stage in stages))]
        for name, found in methods.items()
    ]
    return Table("Which methods are true here", head, rows, "methods", [["method", *columns], *values])


def _correlation(found: dict[str, Any]) -> str:
    """With the maps of the network without any of its weights, and the verdict."""
    correlation = found["randomisation"]["all"]
    said = interval(correlation, "{:.2f}")
    if found["depends_on_weights"] is not False:
        return said
    return f"{said}, FAILS: {'alike' if correlation['value'] > 0 else 'opposite'}"


def _completeness(found: dict[str, Any]) -> str:
    """The error of the worst map of integrated gradients; '' of other methods."""
    complete = found["completeness"]
    return f"{complete['value']:.2%}{'' if complete['kept'] else ', NOT KEPT'}" if complete else ""


def _sheet(i: int, shown: Shown, pairs: Sequence[tuple[Overlay, dict]]) -> Picture:
    """All maps of an image: a row for each class, a column for each method."""
    labels = dict.fromkeys(one.label for one, _ in pairs)
    rows = []
    for label in labels:
        row = [(one, figures) for one, figures in pairs if one.label == label]
        said = f"{row[0][1]['class']}, {row[0][1]['probability']:.1%}"
        rows.append((said, [Drawn(one.heat, _lines(figures), figures["better_than_random"]) for one, figures in row]))
    true = pairs[0][1]["true_class"]
    title = shown.names[i] + (f", truly {true}" if true else "")
    caption = f"{title}. Below each map the areas of deletion and insertion, and those of random maps."
    return Picture(f"explained-{i + 1}", title, caption, overlays.sheet(shown.pixels[i], title, rows))


def _alone(shown: Shown, one: Overlay, row: dict[str, Any]) -> Picture:
    drawn = Drawn(one.heat, _lines(row), row["better_than_random"])
    title = f"{row['class']}, {row['probability']:.1%}"
    picture = overlays.beside(shown.pixels[one.image], title, drawn)
    return Picture(row["file"].removesuffix(".png"), title, "", picture, shown=False)


def _lines(row: dict[str, Any]) -> list[str]:
    return [
        row["method"],
        *(f"{kind} {row[kind]:.2f}, random {interval(row[f'random_{kind}'], '{:.2f}')}" for kind in _KINDS),
        f"p = {row['p_value']:.2f}" + ("" if row["better_than_random"] else f": {overlays.WORD}"),
    ]


_KINDS = ("deletion", "insertion")


def _overlays_table(rows: Sequence[dict[str, Any]]) -> Table:
    head = ["Image", "Method", "Class", "Deletion", "of random maps", "Insertion", "of random maps", "p"]
    cells = [
        [
            row["image"],
            row["method"],
            f"{row['class']}, {row['probability']:.1%}",
            *(text for kind in _KINDS for text in (f"{row[kind]:.3f}", interval(row[f"random_{kind}"], "{:.3f}"))),
            f"{row['p_value']:.2f}",
        ]
        for row in rows
    ]
    plain = ("image", "true_class", "method", "class", "probability", "p_value", "better_than_random", "file")
    beside = [f"random_{kind}" for kind in _KINDS]
    values = [[*plain, *_KINDS, *ends_of(*beside)]]
    values += [[*(row[key] for key in (*plain, *_KINDS)), *ends(*(row[key] for key in beside))] for row in rows]
    return Table("All maps", head, cells, "overlays", values)


def table() -> str:
    """Markdown: which family of models can do which methods, each by its first model at its native size."""
    families: dict[str, list[str]] = {}
    for name in models.names():
        families.setdefault(models.preset(name).module.__name__, []).append(name)
    lines = [f"| models | {' | '.join(METHODS)} |", "| --- |" + " --- |" * len(METHODS)]
    for names in families.values():
        preset = models.preset(names[0])
        model = models.create(names[0], preset.num_classes)
        network = make_network(model, lambda images: images, (0.0,) * preset.image_shape[2])
        explainer = Explainer(network, variable_shapes(model, preset.image_shape), preset.image_shape)
        marks = ("yes" if method in explainer.methods else "" for method in METHODS)
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        lines.append(f"| {shown} | {' | '.join(marks)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if argv == ["--table"]:
        print(table())
        return
    parser = cli.Parser(prog=cli.program("explain"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument(
        "--method",
        default="",
        metavar="M,M",
        help=f"of {', '.join(METHODS)}; default: those that it can of {', '.join(DEFAULT)}",
    )
    parser.add_argument("--classes", type=int, default=2, metavar="N", help="the N most probable; default: 2")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="test images, without files; default: 16")
    parser.add_argument("--data_dir", default="", help="where the data of the run are now, if they have moved")
    parser.add_argument("--table", action="store_true", help="alone: which models can do which methods")
    parser.add_argument(
        "files",
        nargs="*",
        type=pathlib.Path,
        metavar="FILE",
        help="images, or a directory of them; default: of the test split",
    )
    flags = parser.parse_args(argv)
    if flags.table:
        raise UserError("--table is of all models, and takes no other flags")
    for name in ("classes", "images"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)} must be 1 or more")
    cli.start_jax()
    metrics = explain(
        flags.workdir,
        predict.files_of(flags.files),
        methods=[name for name in flags.method.split(",") if name],
        classes=flags.classes,
        images=flags.images,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
    )
    print("\n".join(_said(name, found) for name, found in metrics["methods"].items()))
    print(f"report: {os.path.join(flags.workdir, PART, 'index.html')}")


def _said(name: str, found: dict[str, Any]) -> str:
    """What a method came to, in a line."""
    complete = _completeness(found)
    return (
        f"{name}: better than random in {interval(found['better'], '{:.0%}')} of the images, points at the class in "
        f"{interval(found['pointing'], '{:.0%}')} (chance 25 %), correlation without the weights "
        f"{_correlation(found)}{f', complete within {complete}' if complete else ''}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
