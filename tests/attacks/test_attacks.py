"""Attacks against closed forms, other libraries and the signs by which a model only looks robust."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import attacks
from vitcls.attacks import apgd, ball, square
from vitcls.attacks.checks import check

NETWORK = runpy.run_path(str(pathlib.Path(__file__).parent / "network.py"))
forward = NETWORK["forward"]
IMAGES, LABELS = NETWORK["images"]()
KEYS = jax.random.split(jax.random.key(0), len(LABELS))
ALL = {
    "fgsm": attacks.fgsm,
    "pgd": functools.partial(attacks.PGD, steps=10),
    "apgd": functools.partial(attacks.APGD, steps=10),
    "square": functools.partial(attacks.Square, steps=20),
}


@functools.cache
def compiled(attack):
    return jax.jit(lambda keys, images, labels, eps: attacks.perturb(attack, keys, images, labels, forward, eps=eps))


def attacked(attack, eps, count=1000):
    return np.asarray(compiled(attack)(KEYS[:count], IMAGES[:count], LABELS[:count], eps))


def accuracy(images):
    return np.mean(np.asarray(forward(images)).argmax(axis=1) == LABELS[: len(images)])


@pytest.mark.by_turns
@pytest.mark.parametrize("norm", attacks.NORMS)
@pytest.mark.parametrize("name", list(ALL))
def test_images_stay_in_the_ball_and_in_range_and_are_worse(name, norm):
    eps = {"linf": 0.1, "l2": 0.8}[norm]
    images = attacked(ALL[name](norm), eps, 200)
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    assert np.asarray(attacks.distances(images, IMAGES[:200], norm)).max() <= eps * (1 + 1e-5)
    assert accuracy(images) < 0.5


# Robust accuracies of 1,000 images by foolbox 3.3.4 (FGSM, and PGD of 40 steps of eps / 16 from the image) and by
# adversarial-robustness-toolbox 1.20.1 (Square, seeds 0 and 1), with jax 0.10.2 and numpy 2.4.6.
FOOLBOX = {
    ("fgsm", "linf", 0.02): 0.344,
    ("fgsm", "linf", 0.05): 0.055,
    ("fgsm", "linf", 0.1): 0.002,
    ("fgsm", "l2", 0.2): 0.257,
    ("fgsm", "l2", 0.5): 0.027,
    ("fgsm", "l2", 1.0): 0.002,
    ("pgd", "linf", 0.02): 0.326,
    ("pgd", "linf", 0.05): 0.039,
    ("pgd", "l2", 0.2): 0.236,
    ("pgd", "l2", 0.5): 0.012,
}
ART = {(0.05, 300): (0.064, 0.064), (0.03, 1500): (0.170, 0.171), (0.05, 1500): (0.039, 0.040)}


@pytest.mark.by_turns
@pytest.mark.parametrize(("name", "norm", "eps"), list(FOOLBOX))
def test_fgsm_and_pgd_agree_with_foolbox(name, norm, eps):
    attack = attacks.fgsm(norm) if name == "fgsm" else attacks.PGD(norm, steps=40, begin="clean")
    assert accuracy(attacked(attack, eps)) == pytest.approx(FOOLBOX[name, norm, eps], abs=0.005)


def left_by_square(model, norm, eps, queries, images, labels):
    """The accuracy that is left, over two seeds."""
    found = [
        attacks.Runner(lambda _, images: model(images), {}, batch_size=200, seed=seed)
        .survives(attacks.Square(norm, queries), images, labels, np.arange(len(labels)), eps)
        .mean()
        for seed in (0, 1)
    ]
    return np.mean(found)


@pytest.mark.by_turns
@pytest.mark.parametrize(("eps", "queries"), list(ART))
def test_square_agrees_with_art(eps, queries):
    found = left_by_square(forward, "linf", eps, queries, IMAGES, LABELS)
    assert found == pytest.approx(np.mean(ART[eps, queries]), abs=0.005)


# The same by the authors' own code (max-andr/square-attack, p 0.8, seeds 0 to 2) in l2, of images of 16x16: ART 1.20.1
# has no bumps for less than ten pixels, nor signs for squares of odd sides.
AUTHORS_L2 = {(0.5, 100): (0.508, 0.521, 0.512), (1.0, 500): (0.099, 0.1, 0.09)}


@pytest.mark.by_turns
@pytest.mark.parametrize(("eps", "queries"), list(AUTHORS_L2))
def test_square_in_l2_agrees_with_its_authors(eps, queries):
    """The network sees the means of 2x2 pixels."""

    def coarse(images):
        return forward(images.reshape(len(images), 8, 2, 8, 2, 2).mean(axis=(2, 4)))

    images = np.random.default_rng(1).uniform(size=(1000, 16, 16, 2)).astype(np.float32)
    images = np.clip(0.5 + 1.8 * (images - 0.5), 0, 1).astype(np.float32)
    labels = np.asarray(jax.jit(coarse)(images)).argmax(axis=1).astype(np.int32)
    labels[::10] = (labels[::10] + 1) % 4
    found = left_by_square(coarse, "l2", eps, queries, images, labels)
    assert found == pytest.approx(np.mean(AUTHORS_L2[eps, queries]), abs=0.01)


def linear():
    w = np.random.default_rng(1).normal(size=IMAGES[0].size).astype(np.float32)
    b = 0.5 * w.sum()

    def model(images):
        z = images.reshape(len(images), -1) @ w - b
        return jnp.stack([z, -z], axis=-1)

    return w.reshape(IMAGES[0].shape), model


@pytest.mark.by_turns
@pytest.mark.parametrize("norm", attacks.NORMS)
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd"])
def test_the_optimum_of_a_linear_model_is_found(name, norm):
    """Away from the truth by eps sign(w), or eps w / |w|."""
    w, model = linear()
    clean = 0.4 + 0.2 * IMAGES[:20]  # so that nothing is cut
    labels = jnp.asarray(np.asarray(model(clean)).argmax(axis=1), jnp.int32)
    direction = np.sign(w) if norm == "linf" else w / np.linalg.norm(w)
    eps = {"linf": 0.01, "l2": 0.1}[norm]
    expected = clean + eps * direction * np.where(labels == 0, -1.0, 1.0)[:, None, None, None].astype(np.float32)
    attack = {"fgsm": attacks.fgsm(norm), "pgd": attacks.PGD(norm, begin="clean"), "apgd": attacks.APGD(norm)}[name]
    found = attacks.perturb(attack, KEYS[:20], clean, labels, model, eps=eps)
    if name == "apgd":  # which keeps the first point that is misclassified
        broken = np.asarray(model(expected)).argmax(axis=1) != labels
        np.testing.assert_array_equal(np.asarray(model(found)).argmax(axis=1) != labels, broken)
        found, expected = (np.asarray(x)[~broken] for x in (found, expected))
        assert 0 < len(found) < 20
    np.testing.assert_allclose(found, expected, atol=1e-5 if norm == "linf" or name == "pgd" else 3e-3)


def test_a_sure_prediction_still_has_a_slope():
    """Against softmax less one in float64; in float32 that of the truth is rounded off."""
    logits = np.array([[60.0, 20.0, 10.0, 0.0]])
    slope = jax.grad(lambda z: ball.cross_entropy(z, jnp.zeros(1, jnp.int32))[0])(jnp.asarray(logits, jnp.float32))
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(slope[0, 1:], p[0, 1:], rtol=1e-4)
    np.testing.assert_allclose(slope[0, 0], -p[0, 1:].sum(), rtol=1e-4)


@pytest.mark.by_turns
def test_what_becomes_of_an_image_does_not_depend_on_its_batch():
    found = [
        attacks.Runner(lambda _, images: forward(images), {}, batch_size=size).survives(
            ALL[name]("linf"), IMAGES[:90], LABELS[:90], np.arange(90), 0.03
        )
        for name in ALL
        for size in (90, 16)
    ]
    for whole, parts in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(whole, parts)
        assert 0 < whole.mean() < 0.9


@pytest.mark.by_turns
def test_the_loop_and_the_single_steps_give_the_same():
    for attack in (attacks.PGD(steps=30), attacks.APGD(steps=30), attacks.Square(steps=60)):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(60))
        images = attacks.perturb(attack, keys, IMAGES[:60], LABELS[:60], forward, eps=0.02)
        stepped = attacks.Runner(lambda _, x: forward(x), {}, batch_size=7).survives(
            attack, IMAGES[:60], LABELS[:60], np.arange(60), 0.02
        )
        np.testing.assert_array_equal(np.asarray(forward(images)).argmax(axis=1) == LABELS[:60], stepped)


def test_checkpoints_and_squares_are_those_of_the_papers():
    """Of 100 steps: after 22, 41, 58, 70, 80, 87, 93 and 99; the share of 10,000 queries halves nine times."""
    np.testing.assert_array_equal(np.flatnonzero(apgd.checkpoints(100)) + 1, [22, 41, 58, 70, 80, 87, 93, 99])
    assert apgd.checkpoints(100)[40] == 19
    sizes = square.window_sizes(10_000, 0.8, (32, 32), least=1)
    for step, halvings in ((0, 0), (10, 0), (11, 1), (51, 2), (201, 3), (501, 4), (1001, 5), (8001, 9)):
        assert sizes[step] == max(1, round(np.sqrt(0.8 / 2**halvings * 1024)))


def found_by_checks(model, images=IMAGES[:40], *, eps=0.02, steps=20):
    labels = np.asarray(model(images)).argmax(axis=1).astype(np.int32)
    runner = attacks.Runner(lambda _, x: model(x), {}, batch_size=40)
    made = check(runner, images, labels, np.arange(40), norm="linf", eps=eps, steps=steps, queries=100)
    return {each.name for each in made if not each.passed}


def quantized(images):
    return forward(jnp.round(8 * images) / 8)


def staircase(images):
    """A slope of the wrong sign at almost every point of a slope that is right in the large."""
    steps = jnp.floor(50 * images) / 50
    return forward(steps - 0.5 * (images - steps))


def islands(images):
    """Misclassified where most values are moved by 0.1 the right way, and lower and lower on the way from 0.03 on."""
    away = (images - 0.5).reshape(len(images), -1)
    height = jnp.where(away > 0.095, 1.0, jnp.where(away < 0.03, away, 0.06 - away))
    z = 0.1 * (64 - jnp.sum(height, axis=1))
    return jnp.stack([z, -z], axis=-1)


@pytest.mark.by_turns
@pytest.mark.parametrize(
    ("model", "failed"),
    [
        (forward, set()),
        (lambda x: jax.nn.softmax(forward(x)), {"logits"}),
        (lambda x: forward(x) * jnp.where(forward(x).max() > -1e9, jnp.nan, 1.0), {"logits"}),
        (lambda x: 1e4 * forward(x), {"slopes", "large_eps", "square_and_pgd"}),
        (quantized, {"slopes", "large_eps", "square_and_pgd"}),
        (staircase, {"large_eps", "square_and_pgd"}),
    ],
    ids=["plain", "probabilities", "nan", "saturated", "quantized", "staircase"],
)
def test_a_model_that_only_looks_robust_is_found_out(model, failed):
    found = found_by_checks(model, eps=0.1)
    assert failed <= found and (failed or not found), found


def test_pgd_that_is_weaker_than_fgsm_is_found_out():
    assert "pgd_and_fgsm" in found_by_checks(islands, np.full((40, 8, 8, 2), 0.5, np.float32), eps=0.1)


def ridges(images):
    """Misclassified where a sixth of the values move by 0.09, behind a ridge at 0.05 that only long steps cross."""
    away = (images - 0.5).reshape(len(images), -1)
    height = jnp.where(away > 0.09, 1.0, jnp.where(away < 0.05, away, 0.1 - away))
    z = 0.1 * (20 - jnp.sum(height, axis=1))
    return jnp.stack([z, -z], axis=-1)


def test_more_steps_that_find_less_are_found_out():
    assert "more_steps" in found_by_checks(ridges, np.full((40, 8, 8, 2), 0.5, np.float32), eps=0.1)


def test_one_step_is_compared_with_four():
    """With itself it would always be as strong."""
    labels = np.asarray(forward(IMAGES[:40])).argmax(axis=1).astype(np.int32)
    runner = attacks.Runner(lambda _, x: forward(x), {}, batch_size=40)
    made = check(runner, IMAGES[:40], labels, np.arange(40), norm="linf", eps=0.02, steps=1, queries=5)
    (words,) = (each.words for each in made if each.name == "more_steps")
    assert words.startswith("PGD-4 leaves") and "PGD-1 " in words
