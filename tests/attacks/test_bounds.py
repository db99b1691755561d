"""Bounds of logits against intervals written out with SciPy, closed forms, and attacks that try to leave them."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from vitcls import attacks, models
from vitcls.attacks import bounds

NETWORK = runpy.run_path(str(pathlib.Path(__file__).parent / "network.py"))
LENET = {"widths": (2, 3, 4), "hidden_width": 5, "pooling": "max", "activation": "relu"}


def lenet(**fields):
    model = models.create("lenet5", 3, **LENET | fields)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(6, 32, 32, 2)).astype(np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables["params"])
    return images, {"params": params}, lambda v, images: model.apply(v, images, train=False)


def by_hand(params, low, high):
    """Gowal et al. 2018, equations 6 and 7, of LeNet-5 in float64: the ends of the logits, and what the head reads."""

    def times(matrix, low, high):
        middle, half = (low + high) / 2, (high - low) / 2
        return matrix(middle, False) - matrix(half, True), matrix(middle, False) + matrix(half, True)

    def correlate(layer, x, absolute):
        kernel = np.abs(layer["kernel"]) if absolute else layer["kernel"]
        pairs = [[scipy.signal.correlate2d(x[..., i], kernel[..., i, o], "valid") for i in range(x.shape[-1])]
                 for o in range(kernel.shape[-1])]  # fmt: skip
        return np.stack([sum(maps) for maps in pairs], axis=-1) + (0 if absolute else layer["bias"])

    def dense(layer, x, absolute):
        return x @ np.abs(layer["kernel"]) if absolute else x @ layer["kernel"] + layer["bias"]

    def halve(x):
        return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max(axis=(1, 3))

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    ends = low, high
    for i in (1, 2, 3):
        layer = params[f"conv_{i}"]["conv"]
        ends = times(functools.partial(correlate, layer), *ends)
        ends = [np.maximum(end, 0) for end in ends]
        ends = [halve(end) for end in ends] if i < 3 else [end.ravel() for end in ends]
    features = [np.maximum(end, 0) for end in times(functools.partial(dense, params["hidden"]), *ends)]
    return times(functools.partial(dense, params["head"]), *features), features


def test_the_bounds_are_those_of_the_paper():
    images, variables, forward = lenet()
    low, high = np.maximum(images - 0.03, 0), np.minimum(images + 0.03, 1)
    found = bounds.logits(lambda x: forward(variables, x), low, high)
    labels = np.arange(6) % 3
    gaps = bounds.largest_gaps(found, labels)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    bias = np.asarray(variables["params"]["head"]["bias"], np.float64)
    for i, label in enumerate(labels):
        ends, features = by_hand(variables["params"], low[i].astype(np.float64), high[i].astype(np.float64))
        np.testing.assert_allclose([found.low[i], found.high[i]], ends, rtol=1e-4, atol=1e-4)
        difference = kernel - kernel[:, [label]]  # section 3.2: the last layer and the margin are one
        most = np.where(difference > 0, features[1][:, None], features[0][:, None])
        expected = np.sum(difference * most, axis=0) + bias - bias[label]
        np.testing.assert_allclose(gaps[i], expected, rtol=1e-4, atol=1e-4)
        assert np.all(gaps[i] <= ends[1] - ends[0][label] + 1e-4)


def test_the_bounds_of_a_matrix_are_attained():
    matrix = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    images = np.full((1, 2, 2, 3), 0.5, np.float32)

    def forward(x):
        return x.reshape(len(x), -1) @ matrix

    gaps = bounds.largest_gaps(bounds.logits(forward, images - 0.1, images + 0.1), jnp.array([1]))[0]
    for other in (0, 2):
        corner = images + 0.1 * np.sign(matrix[:, other] - matrix[:, 1]).reshape(images.shape)
        at_corner = forward(corner)[0]
        assert gaps[other] == pytest.approx(at_corner[other] - at_corner[1], rel=1e-5)
    assert gaps[1] == 0


OPERATIONS = {
    "lenet5 of 1998": lenet(pooling="avg", activation="tanh")[1:],
    "shortcuts and averages of batches": None,
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "hard swish": lambda x: x * jax.nn.relu6(x + 3) / 6,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "a gate": lambda x: x * jax.nn.sigmoid(1 - 3 * jnp.mean(x, axis=(1, 2), keepdims=True)),
    "a difference": lambda x: x - jnp.max(x, axis=-1, keepdims=True) / -2.0,
    "a matrix on the left": lambda x: jnp.einsum("ij,bjkc->bikc", jnp.array([[1.0, -2.0], [3.0, -1.0]]), x),
    "a checkpoint": jax.checkpoint(lambda x: -jnp.tanh(x)),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_no_image_of_the_box_leaves_the_bounds(name):
    images = 4 * np.random.default_rng(0).uniform(size=(8, 2, 2, 3)).astype(np.float32) - 2
    forward = OPERATIONS[name]
    if name.startswith("lenet5"):
        (variables, of_lenet), images = forward, lenet()[0]
        forward = lambda x: of_lenet(variables, x)  # noqa: E731
    elif forward is None:
        images = np.random.default_rng(0).uniform(size=(8, 8, 8, 3)).astype(np.float32)
        model = models.create("paper_cnn", 3, depths=(1, 1), widths=(3, 4), residual=True, norm="batch")
        trained = model.init(jax.random.key(0), images, train=False)
        _, averages = model.apply(trained, 3 * images, train=True, mutable=["batch_stats"])
        variables = {"params": trained["params"], **averages}
        forward = lambda x: model.apply(variables, x, train=False)  # noqa: E731
    eps = 0.1
    low, high = jax.jit(lambda x: bounds.logits(forward, x - eps, x + eps)[:2])(images)
    moved = [images + np.random.default_rng(i).uniform(-eps, eps, images.shape).astype(np.float32) for i in range(8)]
    corners = [images + eps * np.sign(each - images) for each in moved]
    for each in (images, *moved, *corners):
        logits = np.asarray(forward(each))
        slack = 1e-5 * np.abs(logits).max()
        assert np.all(low - slack <= logits) and np.all(logits <= high + slack)
    assert np.all(low < high)


def test_without_a_box_the_bounds_are_the_logits():
    images, variables, forward = lenet()
    found = bounds.logits(lambda x: forward(variables, x), images, images)
    np.testing.assert_allclose(found.low, forward(variables, images), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.high, forward(variables, images), rtol=1e-5, atol=1e-5)


def test_what_is_certified_no_attack_takes():
    images, labels = NETWORK["images"]()
    images, labels, places = images[:200], labels[:200], np.arange(200)
    runner = attacks.Runner(lambda _, x: NETWORK["forward"](x), {}, batch_size=100)
    eps = 0.004
    certified = runner.certified(images, labels, eps)
    left = runner.survives(attacks.PGD("linf", 10), images, labels, places, eps)
    right = runner.logits(images).argmax(axis=1) == labels
    assert 0.2 < certified.mean() < right.mean() and np.all(left[certified])
    np.testing.assert_array_equal(runner.certified(images, labels, 0.0), right)
    assert not runner.certified(images, labels, 1.0).any()
    no_numbers = attacks.Runner(lambda _, x: jnp.sqrt(NETWORK["forward"](x) - 100), {}, batch_size=100)
    assert not no_numbers.certified(images, labels, eps).any()


def test_numbers_that_are_made_whole_have_none():
    """-1 and 1 both become True, and -1 becomes 255: what is between is elsewhere."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    for whole in (bool, jnp.uint8):
        with pytest.raises(bounds.Unbounded, match="whole"):
            bounds.check(lambda _, x, whole=whole: x.astype(whole).astype(jnp.float32), {}, images)


def test_what_has_no_bounds_says_so():
    model = models.create("vit_tiny_patch4", 3)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    with pytest.raises(bounds.Unbounded, match=r"its operation '.*' has no bounds"):
        bounds.check(lambda v, x: model.apply(v, x, train=False), shapes, images)
