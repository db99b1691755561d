"""Is a model as robust as attacks say, or do the attacks fail on it? What shows that they do.

After Carlini et al. 2019 (arXiv 1902.06705) and Athalye et al. 2018 (section 3.1): a model whose gradients say nothing
looks robust to every attack that climbs them.
"""

from typing import Any, NamedTuple

import numpy as np

from vitcls.attacks.ball import furthest
from vitcls.attacks.pgd import PGD, fgsm
from vitcls.attacks.run import Runner
from vitcls.attacks.square import Square

SLACK = 0.02  # of the images, and two of them in any case, for the luck of random starts
SQUARE_SLACK = 0.05  # by which a search without gradients may find more than one with
FLAT = 1e-30  # the largest slope of a loss that float32 has rounded away
FLAT_SHARE = 0.1  # of the images that may have no slope


class Check(NamedTuple):
    """One sign that attacks can or cannot be trusted on a model."""

    name: str
    passed: bool
    figures: dict[str, float]  # fractions
    words: str  # what was found


def check(
    runner: Runner,
    images: np.ndarray,
    labels: np.ndarray,
    places: np.ndarray,
    *,
    norm: str,
    eps: float,
    steps: int,
    queries: int,
) -> list[Check]:
    """All checks, on images that the model classifies right: float32 [N, H, W, C] in [0, 1], labels int32 [N]."""

    def accuracy(attack: Any, eps: float) -> float:
        return float(runner.survives(attack, images, labels, places, eps).mean())

    whole = furthest(images[0].shape, norm)
    at_pgd = accuracy(PGD(norm, steps), eps)
    more = max(4, steps)
    fewer, at_more = more // 4, at_pgd if more == steps else accuracy(PGD(norm, more), eps)
    luck = max(SLACK, 2 / len(labels))
    return [
        _logits(runner.logits(images)),
        _slopes(runner.slopes(images, labels)),
        _everything_falls(accuracy(PGD(norm, steps), whole), whole),
        _not_weaker("pgd_and_fgsm", f"PGD-{steps}", at_pgd, "FGSM", accuracy(fgsm(norm), eps), luck),
        _not_weaker("more_steps", f"PGD-{more}", at_more, f"PGD-{fewer}", accuracy(PGD(norm, fewer), eps), luck),
        _not_weaker(
            "square_and_pgd",
            f"PGD-{steps}",
            at_pgd,
            "Square",
            accuracy(Square(norm, queries), eps),
            max(SQUARE_SLACK, luck),
        ),
    ]


def _logits(logits: np.ndarray) -> Check:
    """Probabilities in place of logits make a softmax of a softmax, whose loss has hardly any slope."""
    finite = bool(np.isfinite(logits).all())
    in_range = finite and bool(((logits >= 0) & (logits <= 1)).all())
    probabilities = in_range and bool(np.allclose(logits.sum(axis=1), 1, atol=1e-3))
    words = "the logits are finite and no probabilities"
    if not finite:
        words = "some logits are not finite"
    elif probabilities:
        words = "the model gives probabilities in place of logits"
    return Check("logits", finite and not probabilities, {}, words)


def _slopes(slopes: np.ndarray) -> Check:
    flat = float(np.mean(~(slopes > FLAT)))
    words = f"the loss has no slope at {flat:.1%} of the images, of which {FLAT_SHARE:.0%} may have none"
    return Check("slopes", flat <= FLAT_SHARE, {"flat": flat}, words)


def _everything_falls(accuracy: float, eps: float) -> Check:
    words = (
        f"with eps {eps:.4g}, which reaches any image, PGD leaves {accuracy:.1%} of the images, of which {SLACK:.0%} "
        "may be left"
    )
    return Check("large_eps", accuracy <= SLACK, {"accuracy": accuracy}, words)


def _not_weaker(name: str, strong: str, left: float, weak: str, other: float, slack: float) -> Check:
    """`left` and `other`: the accuracies under the attack that should be the stronger one, and under the other."""
    words = f"{strong} leaves {left:.1%} of the images, {weak} {other:.1%}, which may be {slack:.0%} less"
    return Check(name, left <= other + slack, {"accuracy": left, "other_accuracy": other}, words)
