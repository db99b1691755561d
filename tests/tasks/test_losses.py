import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from sklearn.utils.class_weight import compute_class_weight

from vitcls.core.errors import UserError
from vitcls.tasks import losses

B, K = 12, 5


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(B, K), scale=3).astype(np.float32)


@pytest.fixture(scope="module")
def labels():
    return np.arange(B) % K


@pytest.fixture(scope="module")
def soft_targets():
    return np.random.default_rng(1).dirichlet(np.ones(K), size=B).astype(np.float32)


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def make_loss(name="cross_entropy", label_smoothing=0.0, focal_gamma=2.0, class_weights=(1.0,) * K):
    return losses.make_loss(
        name, label_smoothing=label_smoothing, focal_gamma=focal_gamma, class_weights=np.asarray(class_weights)
    )


def test_cross_entropy_of_hard_labels_is_scikit_learns_log_loss(logits, labels):
    loss = losses.cross_entropy(jnp.asarray(logits), jnp.eye(K)[labels])
    assert loss.shape == (B,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss.mean(), sklearn.metrics.log_loss(labels, softmax(logits)), rtol=1e-5)


def test_cross_entropy_of_soft_targets(logits, soft_targets):
    expected = -(soft_targets * np.log(softmax(logits))).sum(axis=-1)
    np.testing.assert_allclose(
        losses.cross_entropy(jnp.asarray(logits), jnp.asarray(soft_targets)), expected, rtol=1e-5
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_by_hand(logits, soft_targets, gamma):
    p = softmax(logits)
    expected = -(soft_targets * (1 - p) ** gamma * np.log(p)).sum(axis=-1)
    loss = losses.focal(jnp.asarray(logits), jnp.asarray(soft_targets), gamma)
    assert loss.shape == (B,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_focal_with_gamma_zero_is_cross_entropy(logits, soft_targets):
    logits, soft_targets = jnp.asarray(logits), jnp.asarray(soft_targets)
    expected = losses.cross_entropy(logits, soft_targets)
    np.testing.assert_allclose(losses.focal(logits, soft_targets, 0.0), expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_a_certain_prediction_has_finite_value_and_gradient(gamma):
    logits, targets = jnp.array([[200.0, 0.0], [200.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda x: losses.focal(x, targets, gamma).sum())(logits)
    np.testing.assert_allclose(value, 200.0)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [1.0, -1.0]], atol=1e-5)


def test_smoothing_spreads_the_amount_over_all_classes():
    smoothed = losses.smooth(jnp.array([[0.0, 1.0, 0.0, 0.0]]), 0.2)
    np.testing.assert_allclose(smoothed, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)


def test_label_smoothing_in_the_loss(logits, labels):
    smoothed = np.full((B, K), 0.1 / K)
    smoothed[np.arange(B), labels] += 0.9
    expected = -(smoothed * np.log(softmax(logits))).sum(axis=-1)
    loss = make_loss(label_smoothing=0.1)(jnp.asarray(logits), jnp.eye(K)[labels])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_class_weights_weigh_hard_labels_as_scikit_learn_and_torch_do(logits, labels):
    weights = np.array([0.5, 1.0, 2.0, 0.0, 3.0])
    loss = make_loss(class_weights=weights)(jnp.asarray(logits), jnp.eye(K)[labels])
    expected = sklearn.metrics.log_loss(labels, softmax(logits), sample_weight=weights[labels])
    np.testing.assert_allclose(loss.sum() / weights[labels].sum(), expected, rtol=1e-5)


def test_class_weights_are_applied_to_each_class_of_a_smoothed_mixed_target(logits, soft_targets):
    weights = np.array([0.5, 1.0, 2.0, 0.0, 3.0])
    p = softmax(logits)
    expected = -(weights * (0.8 * soft_targets + 0.2 / K) * (1 - p) ** 1.5 * np.log(p)).sum(axis=-1)
    loss = make_loss("focal", label_smoothing=0.2, focal_gamma=1.5, class_weights=weights)
    np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(soft_targets)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, logits, soft_targets):
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = make_loss(name, label_smoothing=0.1)
    result = loss(half, jnp.asarray(soft_targets, jnp.bfloat16))
    assert result.dtype == jnp.float32
    expected = loss(half.astype(jnp.float32), jnp.asarray(soft_targets, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(result, expected)


def test_unknown_loss():
    with pytest.raises(UserError, match=r"config\.loss\.name 'focale' is not known; did you mean 'focal'"):
        make_loss("focale")


def test_balanced_class_weights_are_scikit_learns():
    labels = np.repeat(np.arange(4), [10, 1, 5, 4])
    weights = losses.class_weights(("balanced",), np.bincount(labels))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(4), y=labels), rtol=1e-6)


def test_class_weights_as_given():
    ones = losses.class_weights((), np.array([3, 0, 5]))
    np.testing.assert_array_equal(ones, np.ones(3, np.float32))
    given = losses.class_weights((1, 0.0, 2.5), np.array([3, 0, 5]))
    assert ones.dtype == given.dtype == np.float32
    np.testing.assert_array_equal(given, [1.0, 0.0, 2.5])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((1.0, 2.0), "has 2 entries for 3 classes"),
        (("balance",), "has 1 entries for 3 classes"),
        ((1.0, -1.0, 1.0), "at least 0"),
        ((1.0, float("nan"), 1.0), "finite"),
        ((1.0, float("inf"), 1.0), "finite"),
        ((1.0, "two", 3.0), "finite numbers"),
        ((0.0, 0.0, 0.0), "not all 0"),
        (("balanced",), "class 1, which has no training example"),
    ],
)
def test_impossible_class_weights(spec, message):
    with pytest.raises(ValueError, match=r"^class_weights=") as caught:
        losses.class_weights(spec, np.array([3, 0, 5]))
    assert message in str(caught.value)


def test_l2_penalty_is_half_the_sum_of_squares_of_what_the_mask_keeps():
    params = {
        "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
        "bias": jnp.array([10.0]),
        "half": jnp.ones(3, jnp.bfloat16),
    }
    mask = {"kernel": True, "bias": False, "half": True}
    penalty, gradient = jax.value_and_grad(losses.l2_penalty)(params, mask)
    assert penalty.dtype == jnp.float32 and penalty.shape == ()
    np.testing.assert_allclose(penalty, 0.5 * (1 + 4 + 9 + 0.25 + 3))
    np.testing.assert_array_equal(gradient["kernel"], params["kernel"])
    np.testing.assert_array_equal(gradient["bias"], [0.0])


def test_l2_penalty_of_nothing_is_zero():
    penalty = losses.l2_penalty({"bias": jnp.ones(2)}, {"bias": False})
    assert penalty.dtype == jnp.float32 and float(penalty) == 0.0
