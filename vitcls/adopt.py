"""Say what a file of published weights is, and with labelled images how its images must be prepared.

    vitcls adopt FILE [--data_dir=LABELLED]

LABELLED has one directory per class, of all classes that the classifier tells apart. Every known preprocessing is tried
on it, with its classes sorted by name, by the numbers in their names, and whatever the case; what is printed is the
accuracy with each. Exit code 2 where none is better than chance.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
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
from vitcls.models.weights import from_torch, hub, load
from vitcls.models.weights.adapt import adapt
from vitcls.models.weights.matching import DoesNotFit
from vitcls.models.weights.preprocessing import KNOWN, Preprocessing

_BATCH = 32
_SURE = 1.96  # standard deviations: 95 % to both sides
_BETTER_THAN_CHANCE = 2.0  # times as often right, or half of the way to always


class Adopted(NamedTuple):
    """What a file is."""

    model: str
    given: load.Given

    @property
    def patch_size(self) -> int | None:
        """Where it is another than that of the model by default."""
        size = self.given.fields.get("patch_size")
        return None if size == models.fields(self.model).get("patch_size") else size


def identify(file: load.WeightsFile, weights: str = "") -> list[Adopted]:
    """The models whose weights a file has, by its names and shapes, usually one; no device work.

    `weights` is what the user calls it, which may be a name of the Hub.

    Raises UserError where no model has them, with what comes nearest.
    """
    found, failed = [], []
    for name in models.names():
        fields = from_torch.fields_for(name) if file.source == "safetensors" else {}
        if hub.is_name(weights) and not hub.pads_as_tensorflow(weights) and "padding" in models.fields(name):
            fields["padding"] = "even"
        if file.source == "keras" and "stride_on" in models.fields(name):
            fields["stride_on"] = "1x1"
        try:
            found.append(Adopted(name, _with_or_without_head(name, file, fields)))
        except DoesNotFit as error:
            failed.append((error.count, name, str(error)))
        except ValueError:  # of models that lack a name or a field
            pass
    if not found:
        known = ", ".join(f"'{name}'" for name in list(file.arrays)[:3])
        _, name, reason = min(failed, default=(0, "", ""))
        nearest = f"; the nearest is {name}: {_cut(reason, 400)}" if failed else ""
        raise UserError(f"{file.path} holds the weights of no model here (its names: {known}, ...){nearest}")
    return [adopted for adopted in found if adopted.patch_size is None] or found


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[:most].rsplit(" ", 1)[0] + " ..."


def _with_or_without_head(name: str, file: load.WeightsFile, fields: dict) -> load.Given:
    """The variables of a file for a model, with the classifier if there is one."""
    given = load.convert(name, file, head=False, **fields)
    return load.convert(name, file, head=True, **fields) if given.num_classes else given


def describe(file: load.WeightsFile, adopted: Adopted) -> list[str]:
    """What a file is, in lines."""
    given = adopted.given
    count = sum(leaf.size for path, leaf in given.variables.items() if path.startswith("params/"))
    types = sorted({array.dtype.name for array in file.arrays.values()})
    usual = models.fields(adopted.model)
    fields = "".join(f", {key}={value}" for key, value in given.fields.items() if value != usual.get(key))
    classes = f"{given.num_classes:,}" if given.num_classes else "none: it has no classifier"
    return [
        f"layout         {file.source}, {len(file.arrays)} arrays of {', '.join(types)}",
        f"architecture   {adopted.model}{fields}, {count:,} parameters",
        f"images         {given.channels} channels",
        f"classes        {classes}",
        f"preprocessing  {_words(given.preprocessing)} (of its publisher)",
    ]


def _words(found: Preprocessing) -> str:
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (found.mean, found.std))
    return f"mean ({mean}), std ({std}), {found.size} pixels, central {found.eval_crop:.1%}, {found.interpolation}"


class Trial(NamedTuple):
    """The accuracy with one preprocessing, and the classes in one order."""

    name: str
    accuracy: float
    reordered: float  # with the order of classes that suits the predictions best
    order: str = ""  # '' where all orders are one

    def __str__(self) -> str:
        return self.name + (f", classes by {self.order}" if self.order else "")


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
    sortings = orders(source.class_names)
    trials = [
        Trial(name, *_accuracies(guesses, outputs[split.labels]), order)
        for name, guesses in _guesses(adopted, images)
        for order, outputs in sortings.items()
    ]
    return sorted(trials, key=lambda trial: -trial.accuracy), len(images)


def orders(class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The orders by which others sort classes: which output int [K] each then is. One without a name, if all agree."""
    numbers = re.compile(r"(\d+)")

    def numbered(name: str) -> list:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in numbers.split(name)]

    found: dict[str, np.ndarray] = {}
    for order, key in {"name": str, "number": numbered, "name whatever the case": str.casefold}.items():
        ranks = np.argsort(sorted(range(len(class_names)), key=lambda i: key(class_names[i])))
        if not any(np.array_equal(ranks, other) for other in found.values()):
            found[order] = ranks
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def _guesses(adopted: Adopted, images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name of a preprocessing, the classes int [N] that the network sees with it)."""
    model = models.create(adopted.model, adopted.given.num_classes, **adopted.given.fields)
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
    if best.accuracy - spread <= min(_BETTER_THAN_CHANCE * chance, (1 + chance) / 2):
        order = max(trials, key=lambda trial: trial.reordered)
        hint = ""
        if order.reordered > max(0.5, 3 * best.accuracy):
            hint = f"; with the classes in another order {order.name} has {order.reordered:.1%}: sort them so"
        raise UserError(
            f"no known preprocessing is better than chance: {best} is the best with {best.accuracy:.1%} of "
            f"{count:,} images of {num_classes:,} classes{hint}"
        )
    lines = [f"certificate    on {count:,} labelled images, {best.accuracy:.1%} ± {spread:.1%} with the best"]
    lines += [f"               {trial.accuracy:7.2%}  {trial}" for trial in trials]
    if tied := [str(trial) for trial in trials[1:] if trial.accuracy > best.accuracy - spread]:
        others = " and ".join(tied)
        lines.append(f"               {best} and {others} cannot be told apart; more labelled images may do it")
    return lines


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("adopt"), description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="of weights: .safetensors, .npz, .weights.h5 or .keras")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="labelled images, one directory per class")
    flags = parser.parse_args(argv)
    cli.use_cache()
    file = load.open_weights(hub.located(os.path.expanduser(flags.file)))
    found = identify(file, flags.file)
    load.check_publisher(flags.file, found[0].model, **found[0].given.fields)
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
