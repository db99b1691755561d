"""Attacks: images within a ball around their own that a classifier gets wrong.

An attack is a frozen dataclass of two pure functions, `start` and `step`, that many `steps` apart, so that its caller
either compiles one step and calls it from Python (`Runner`) or has all of them in one program (`perturb`). `broken`
says which images need no more steps. `vitcls.attacks.bounds` is the other side: what no attack can do.
"""

from vitcls.attacks.apgd import APGD
from vitcls.attacks.ball import NORMS, distances, furthest
from vitcls.attacks.pgd import PGD, fgsm
from vitcls.attacks.run import Runner, perturb
from vitcls.attacks.square import Square

__all__ = ["APGD", "NORMS", "PGD", "Runner", "Square", "distances", "fgsm", "furthest", "perturb"]
