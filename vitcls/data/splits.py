"""Deterministic, stratified splits, which are those of scikit-learn."""

import logging
from collections.abc import Sequence

import numpy as np

from vitcls.core.errors import UserError

_logger = logging.getLogger("vitcls")
_WITHOUT = {  # what to do where nothing can be held out, by split
    "validation": "set config.dataset.validation=0 or add examples",
    "unused": "set config.dataset.fraction=1 or add examples",
    "test": "give the data set a test split of its own or add examples",
}


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, class_names: Sequence[str] = (), *, split: str = "validation"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (rest, held out): `fraction` of every class, as nearly as whole examples allow.

    Of every class at least one example is in `rest`; a class with a single example is there alone, which a warning
    says. Raises UserError where `fraction` is outside (0, 1) or no class has two examples. Messages call the part held
    out `split` ('validation', 'test' or 'unused') and classes by `class_names` or number.
    """
    if not 0 < fraction < 1:
        raise UserError(f"a split cannot hold out the fraction {fraction:g}; it must be above 0 and below 1")
    counts = np.bincount(labels)
    divisible = np.flatnonzero(counts[labels] > 1)
    num_classes = np.count_nonzero(counts > 1)
    if not num_classes:
        raise UserError(f"no class has two examples, so no {split} split can be carved; {_WITHOUT[split]}")
    _warn_of_singles(np.flatnonzero(counts == 1), class_names, split)
    held_out = min(max(round(fraction * len(divisible)), num_classes), len(divisible) - num_classes)
    held = divisible[_draw(labels[divisible], held_out, seed)]
    # A large fraction can take all of a small class: training gets its first example back.
    wanting = np.flatnonzero((counts > 1) & (np.bincount(labels[held], minlength=len(counts)) == counts))
    held = np.setdiff1d(held, [np.argmax(labels == label) for label in wanting])
    return np.setdiff1d(np.arange(len(labels)), held), held


def _draw(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Which `number` examples scikit-learn's `train_test_split` holds out, drawn from the same random numbers.

    Drawn here, as every process of every run needs them first, and scikit-learn takes a second to import.
    """
    random = np.random.RandomState(seed)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = _shares(counts, len(labels) - number, random)
    drawn = _shares(counts - kept, number, random)
    members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    orders = [random.permutation(count) for count in counts]
    return np.concatenate([m[o[k : k + d]] for m, o, k, d in zip(members, orders, kept, drawn, strict=True)])


def _shares(counts: np.ndarray, number: int, random: np.random.RandomState) -> np.ndarray:
    """How many of each class make `number`, in proportion: the largest remainders are rounded up, equal ones by lot."""
    exact = counts / counts.sum() * number
    shares = np.floor(exact)
    remainders, left = exact - shares, int(number - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if left == 0:
            break
        equal = np.flatnonzero(remainders == remainder)
        chosen = random.choice(equal, min(left, len(equal)), replace=False)
        shares[chosen] += 1
        left -= len(chosen)
    return shares.astype(int)


def _warn_of_singles(singles: np.ndarray, class_names: Sequence[str], split: str) -> None:
    if len(singles):
        first = f"'{_name(int(singles[0]), class_names)}'"
        which = f"class {first} has" if len(singles) == 1 else f"{len(singles)} classes, the first is {first}, have"
        _logger.warning("%s a single example, which stays in training; the %s split has none of it", which, split)


def fold_split(
    labels: np.ndarray, num_folds: int, fold: int, seed: int, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (rest, fold `fold` of `num_folds`); the folds are stratified, disjoint and cover all.

    Raises UserError, which calls classes by `class_names` or number, where there is no such fold or a class has fewer
    examples than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    if num_folds < 2 or not 0 <= fold < num_folds:
        raise UserError(f"there is no fold {fold} of {num_folds}; folds are 0 .. num_folds - 1, and at least 2")
    counts = np.bincount(labels)
    smallest = int(counts[counts > 0].min(initial=len(labels)))
    if smallest < num_folds:
        advice = f"at most {smallest}" if smallest > 1 else "0"
        raise UserError(
            f"config.dataset.num_folds={num_folds} is more than the {smallest} training examples of class "
            f"'{_name(int(np.argmax(counts == smallest)), class_names)}'; set it to {advice} or add examples"
        )
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    rest, held = list(splitter.split(np.zeros(len(labels)), labels))[fold]
    return np.sort(rest), np.sort(held)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if class_names else str(label)
