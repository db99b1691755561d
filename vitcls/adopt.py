"""Say what a file of published weights is, and with labelled images how its images must be prepared.

    vitcls adopt FILE [--data_dir=LABELLED]

LABELLED has one directory per class, in the order of the classifier's outputs by name. Every known preprocessing is
tried on it; what is printed is the accuracy with each. Exit code 2 where none is better than chance.
"""

import math
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import scipy.optimize
from flax import traverse_util

from vitcls import cli, models
from vitcls.config import default_config
from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.sources import SOURCES
from vitcls.models.variables import variable_shapes
from vitcls.models.weights import hub, load
from vitcls.models.weights.adapt import adapt
from vitcls.models.weights.preprocessing import KNOWN, Preprocessing

_BATCH = 32
_SURE = 1.96  # standard deviations: 95 % to both sides
_BETTER_THAN_CHANCE = 2.0


_OF_PYTORCH: dict[str, dict] = {"inception_v3": {"count_padding": True}, "mobilenet_v2": {"padding": "even"}}


class Adopted(NamedTuple):
    """What a file is."""

    model: str
    given: load.Given
    fields: dict


def identify(file: load.WeightsFile) -> list[Adopted]:
    """The models whose weights a file has, by its names and shapes, usually one; no device work.

    Raises UserError where no model has them, with what comes nearest.
    """
    found, nearest = [], ""
    for name in models.names():
        fields = _OF_PYTORCH.get(name, {}).copy() if file.source == "safetensors" else {}
        if file.source == "keras" and "stride_on" in models.fields(name):
            fields["stride_on"] = "1x1"
        try:
            found.append(Adopted(name, _with_or_without_head(name, file, fields), fields))
        except ValueError as error:  # of models that lack a name or a field
            if "the shape" in str(error) or "no place for" in str(error):
                nearest = nearest or f"; the nearest is {name}: {str(error)[:200]}"
    if not found:
        known = ", ".join(f"'{name}'" for name in list(file.arrays)[:3])
        raise UserError(f"{file.path} holds the weights of no model here (its names: {known}, ...){nearest}")
    return found


def _with_or_without_head(name: str, file: load.WeightsFile, fields: dict) -> load.Given:
    """The variables of a file for a model, with the classifier if there is one."""
    given = load.convert(name, file, head=False, **fields)
    return load.convert(name, file, head=True, **fields) if given.num_classes else given


def describe(file: load.WeightsFile, adopted: Adopted) -> list[str]:
    """What a file is, in lines."""
    given = adopted.given
    count = sum(leaf.size for path, leaf in given.variables.items() if path.startswith("params/"))
    types = sorted({array.dtype.name for array in file.arrays.values()})
    classes = f"{given.num_classes:,}" if given.num_classes else "none: it has no classifier"
    return [
        f"layout         {file.source}, {len(file.arrays)} arrays of {', '.join(types)}",
        f"architecture   {adopted.model}, {count:,} parameters",
        f"images         {given.channels} channels",
        f"classes        {classes}",
        f"preprocessing  {_words(given.preprocessing)} (of its publisher)",
    ]


def _words(found: Preprocessing) -> str:
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (found.mean, found.std))
    return f"mean ({mean}), std ({std}), {found.size} pixels, central {found.eval_crop:.1%}, {found.interpolation}"


class Trial(NamedTuple):
    """The accuracy with one preprocessing."""

    name: str
    accuracy: float
    reordered: float  # with the order of classes that suits the predictions best


def try_all(adopted: Adopted, data_dir: str) -> tuple[list[Trial], int]:
    """The accuracies with all known preprocessings, the best first, and of how many images.

    Raises UserError where the images are of another number of classes than the weights.
    """
    config = default_config(adopted.model).dataset.copy_and_resolve_references()
    config.data_dir = data_dir
    source = SOURCES.create("folder", config).load(config)
    if len(source.class_names) != adopted.given.num_classes:
        raise UserError(
            f"{data_dir} has {len(source.class_names)} classes, the weights tell {adopted.given.num_classes} apart; "
            "give labelled images of all, one directory each"
        )
    split = next(source.splits[name] for name in ("test", "validation", "train") if name in source.splits)
    found, channels = adopted.given.preprocessing, adopted.given.channels
    decoding = image_files.Decoding(eval_crop=found.eval_crop, interpolation=found.interpolation)
    images = image_files.decode_all(split.images, size=(found.size,) * 2, channels=channels, decoding=decoding)
    trials = [Trial(name, *_accuracies(guesses, split.labels)) for name, guesses in _guesses(adopted, images)]
    return sorted(trials, key=lambda trial: -trial.accuracy), len(images)


def _guesses(adopted: Adopted, images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name of a preprocessing, the classes int [N] that the network sees with it)."""
    model = models.create(adopted.model, adopted.given.num_classes, **adopted.fields)
    shapes = traverse_util.flatten_dict(variable_shapes(model, images.shape[1:]), sep="/")
    given, _ = adapt(adopted.model, adopted.given.variables, shapes, (adopted.given.channels,) * 2, head=True)
    variables = jax.device_put(traverse_util.unflatten_dict(given, sep="/"))

    @jax.jit
    def classify(images, mean, std):
        shift, scale = (values[None, None, None] for values in (mean, std))
        return model.apply(variables, (images / 255.0 - shift) / scale, train=False).argmax(axis=-1)

    padded = np.concatenate([images, np.zeros((-len(images) % _BATCH, *images.shape[1:]), np.uint8)])
    for name, (mean, std) in KNOWN.items():
        known = Preprocessing(mean, std, 0).for_channels(images.shape[-1])
        colors = np.float32(known.mean), np.float32(known.std)
        starts = range(0, len(padded), _BATCH)
        parts = [np.asarray(classify(padded[start : start + _BATCH], *colors)) for start in starts]
        yield name, np.concatenate(parts)[: len(images)]


def _accuracies(guesses: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    count = max(guesses.max(), labels.max()) + 1
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, guesses), 1)
    rows, columns = scipy.optimize.linear_sum_assignment(-confusion)
    return float(np.mean(guesses == labels)), float(confusion[rows, columns].sum() / len(labels))


def certificate(trials: list[Trial], count: int, num_classes: int) -> list[str]:
    """What the trials say, in lines; raises UserError where the best is not better than chance."""
    best, chance = trials[0], 1 / num_classes
    spread = _SURE * math.sqrt(best.accuracy * (1 - best.accuracy) / count)
    if best.accuracy - spread <= _BETTER_THAN_CHANCE * chance:
        order = max(trials, key=lambda trial: trial.reordered)
        hint = ""
        if order.reordered > max(0.5, 3 * best.accuracy):
            hint = f"; with the classes in another order {order.name} has {order.reordered:.1%}: sort them so"
        raise UserError(
            f"no known preprocessing is better than chance: {best.name} is the best with {best.accuracy:.1%} of "
            f"{count:,} images of {num_classes:,} classes{hint}"
        )
    lines = [f"certificate    on {count:,} labelled images, {best.accuracy:.1%} ± {spread:.1%} with the best"]
    lines += [f"               {trial.accuracy:7.2%}  {trial.name}" for trial in trials]
    if tied := [trial.name for trial in trials[1:] if trial.accuracy > best.accuracy - spread]:
        others = " and ".join(tied)
        lines.append(f"               {best.name} and {others} cannot be told apart; more labelled images may do it")
    return lines


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("adopt"), description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="of weights: .safetensors, .npz, .weights.h5 or .keras")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="labelled images, one directory per class")
    flags = parser.parse_args(argv)
    cli.use_cache()
    file = load.open_weights(hub.located(os.path.expanduser(flags.file)))
    found = identify(file)
    print(f"{flags.file}")
    print(*describe(file, found[0]), sep="\n")
    if found[1:]:
        print(f"               the same names and shapes: {', '.join(other.model for other in found[1:])}")
    if flags.data_dir:
        if not found[0].given.num_classes:
            raise UserError(f"{flags.file} has no classifier, so that labelled images say nothing about it")
        trials, count = try_all(found[0], flags.data_dir)
        print(*certificate(trials, count, found[0].given.num_classes), sep="\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
