"""Deterministic, stratified splits, through scikit-learn."""

from collections.abc import Sequence

import numpy as np

from vitcls.errors import UserError


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (rest, held out): `fraction` of every class, as nearly as whole examples allow.

    Of every class at least one example is in `rest`. Raises UserError, which calls classes by `class_names` or number,
    where `fraction` is outside (0, 1) or a class is too small.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < fraction < 1:
        raise UserError(f"a split cannot hold out the fraction {fraction:g}; it must be above 0 and below 1")
    counts = np.bincount(labels)
    num_classes = np.count_nonzero(counts)
    if counts[counts > 0].min(initial=2) < 2:
        raise UserError(
            f"class '{_name(int(np.argmax(counts == 1)), class_names)}' has a single example and cannot be split; add "
            "examples, give separate splits, or set config.dataset.validation=0"
        )
    held_out = max(round(fraction * len(labels)), num_classes)
    if len(labels) - held_out < num_classes or not num_classes:
        raise UserError(f"{len(labels)} examples of {num_classes} classes are too few to hold out {fraction:g} of them")
    rest, held = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=seed)
    left = np.bincount(labels[rest], minlength=len(counts))
    if np.any((counts > 0) & (left == 0)):
        name = _name(int(np.argmax((counts > 0) & (left == 0))), class_names)
        raise UserError(f"class '{name}' is too small: nothing of it is left where {fraction:g} of all is held out")
    return np.sort(rest), np.sort(held)


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
        raise UserError(
            f"config.dataset.num_folds={num_folds} is more than the {smallest} training examples of class "
            f"'{_name(int(np.argmax(counts == smallest)), class_names)}'; use fewer folds or add examples"
        )
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    rest, held = list(splitter.split(np.zeros(len(labels)), labels))[fold]
    return np.sort(rest), np.sort(held)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if class_names else str(label)
