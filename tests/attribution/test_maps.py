"""Every method against a closed form, numpy, or a loop that says the definition again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.attribution import attention, cam, gradients
from vitcls.attribution.explainer import make_explainer
from vitcls.attribution.network import attention_weights, features, grid, make_network
from vitcls.core.errors import UserError
from vitcls.models.vit import VisionTransformer

SHAPE = (6, 9, 2)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, *SHAPE)).astype(np.float32)
CLASSES = np.array([0, 2, 1], np.int32)
NOTHING = np.full((1, 1, 1, 2), 0.5, np.float32)
WEIGHTS = RNG.normal(size=(*SHAPE, 3)).astype(np.float32)


def linear(variables, images):
    return jnp.einsum("bhwc,hwck->bk", images, variables)


def of_classes():
    """The weights of each image's class, [B, H, W, C]."""
    return np.moveaxis(WEIGHTS, -1, 0)[CLASSES]


def gradient(images):
    return gradients.gradient_of(linear, WEIGHTS, images, CLASSES)


def score(images):
    return gradients.logits_of(linear, WEIGHTS, jnp.asarray(images), CLASSES)


def test_integrated_gradients_of_a_linear_model_are_its_weights_times_the_way():
    found = gradients.integrated_gradients(gradient, IMAGES, NOTHING, 3)
    np.testing.assert_allclose(found, of_classes() * (IMAGES - NOTHING), rtol=1e-5, atol=1e-6)
    difference = score(IMAGES) - score(np.broadcast_to(NOTHING, IMAGES.shape))
    assert gradients.completeness_error(found, difference).max() < 1e-5
    np.testing.assert_allclose(gradients.completeness_error(2 * found, difference), 1, rtol=1e-4)


def test_integrated_gradients_of_a_square_are_its_own_integral():
    """f(x) = sum x^2 from x0: the integral is x^2 - x0^2 for each pixel, by the midpoint rule exactly."""
    found = gradients.integrated_gradients(lambda images: 2 * images, IMAGES, NOTHING, 4)
    np.testing.assert_allclose(found, IMAGES**2 - NOTHING**2, atol=1e-6)


# By captum 0.9.0 with torch 2.13.0, in millionths: IntegratedGradients("riemann_middle", n_steps=20, baselines=0.5)
# of class 1, [4, 5, 2], and LayerGradCam(relu_attributions=True) of class 0 at the map, [4, 5].
CAPTUM_GRADIENTS = """
-5743 -21992 -29044 -11738 22074 5565 53953 36468 -5600 280 5436 -3114 -401 8515 -173 -4701 -71990 10700 3968
-53137 1307 24202 -14684 -70280 -44374 439 -3241 -75090 -8265 59 63 3736 13587 17132 -26787 -5256 7053 -14976
-222 -26717
"""
CAPTUM_GRADCAM = """
116286 114084 59116 81254 11062 135381 138790 142642 136769 138688 135941 133661 136242 139560 135317 106768
133599 136441 140506 133186
"""


def test_integrated_gradients_and_gradcam_agree_with_captum():
    """Of a convolution, tanh, the mean square of its map and a dense layer, all by a seed."""
    rng = np.random.default_rng(7)
    image = rng.random((1, 4, 5, 2)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 2, 3)).astype(np.float32)
    dense = rng.normal(size=(3, 2)).astype(np.float32)

    def map_of(images):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout))

    def head(maps):
        return jnp.mean(maps**2, axis=(1, 2)) @ dense

    def slope(images):
        return jax.grad(lambda images: head(map_of(images))[:, 1].sum())(images)

    found = gradients.integrated_gradients(slope, image, NOTHING, 20)
    np.testing.assert_allclose(1e6 * found.ravel(), np.array(CAPTUM_GRADIENTS.split(), int), atol=2)
    maps = map_of(image)
    found = cam.gradcam(maps, jax.grad(lambda maps: head(maps)[:, 0].sum())(maps))
    np.testing.assert_allclose(1e6 * found.ravel(), np.array(CAPTUM_GRADCAM.split(), int), atol=2)


def test_smoothgrad_of_a_linear_model_is_its_weights():
    found = gradients.smoothgrad(gradient, IMAGES, jax.random.key(0), samples=3)
    np.testing.assert_allclose(found, of_classes(), rtol=1e-5)


def test_smoothgrad_sees_noise_of_the_size_that_is_asked_for():
    """The gradient of sum x^3 is 3 x^2, its mean under noise 3 (x^2 + sigma^2)."""
    flat = np.zeros((1, 40, 40, 1), np.float32)
    flat[0, 0, 0] = 2.0  # the range
    found = gradients.smoothgrad(lambda images: 3 * images**2, flat, jax.random.key(1), samples=8, noise=0.25)
    assert np.mean(np.asarray(found)[0, 1:]) == pytest.approx(3 * 0.5**2, rel=0.05)


@pytest.mark.parametrize(("window", "stride"), [((2, 3), (1, 2)), ((4, 4), (3, 3)), ((6, 9), (1, 1))])
def test_occlusion_is_what_a_loop_over_windows_gives(window, stride):
    found = gradients.occlusion(score, IMAGES, NOTHING, window=window, stride=stride)
    totals, counts = np.zeros(IMAGES.shape[:3]), np.zeros(IMAGES.shape[1:3])
    axes = [
        sorted({min(start, size - side) for start in range(0, size - side + step, step)})
        for size, side, step in zip(SHAPE, window, stride, strict=False)
    ]
    for top in axes[0]:
        for left in axes[1]:
            covered = IMAGES.copy()
            covered[:, top : top + window[0], left : left + window[1]] = 0.5
            fall = np.einsum("bhwc,bhwc->b", IMAGES - covered, of_classes())
            totals[:, top : top + window[0], left : left + window[1]] += fall[:, None, None]
            counts[top : top + window[0], left : left + window[1]] += 1
    assert counts.min() > 0
    np.testing.assert_allclose(found, totals / counts, rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """A convolution, its map, the mean over it, and a classifier."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(images))
        self.sow("intermediates", "conv_map", x)
        return nn.Dense(3, name="head")(jnp.square(x).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def small():
    model = Small()
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    return make_network(model, lambda images: images - 0.5, (0.5, 0.5)), {"params": variables["params"]}


def test_grad_cam_is_what_numpy_makes_of_it(small):
    """The logit is sum_c w_c mean(A_c^2), so dy / dA_c is 2 w_c A_c / (h w)."""
    network, variables = small
    maps, slopes = cam.maps_and_gradients(network, variables, IMAGES, CLASSES)
    kernel, activations = np.asarray(variables["params"]["head"]["kernel"]), np.asarray(maps, np.float64)
    by_hand = 2 * activations * kernel[:, CLASSES].T[:, None, None] / 54
    np.testing.assert_allclose(slopes, by_hand, rtol=1e-4, atol=1e-7)

    expected = np.maximum(np.sum(by_hand.mean(axis=(1, 2), keepdims=True) * activations, axis=-1), 0)
    np.testing.assert_allclose(cam.gradcam(maps, slopes), expected, rtol=1e-4, atol=1e-7)

    plus = np.zeros(maps.shape[:3])
    for i in range(len(maps)):
        for c in range(maps.shape[-1]):
            a, g = activations[i, ..., c], by_hand[i, ..., c]
            below = 2 * g**2 + a.sum() * g**3
            alpha = np.divide(g**2, below, out=np.zeros_like(g), where=below != 0)
            plus[i] += (alpha * np.maximum(g, 0)).sum() * a
    np.testing.assert_allclose(cam.gradcam_plus_plus(maps, slopes), np.maximum(plus, 0), rtol=1e-3, atol=1e-6)
    assert expected.max() > 0 and plus.max() > 0


def test_the_cut_gives_the_logits_that_the_network_gives(small):
    network, variables = small
    cut = features(network, variables, IMAGES)
    np.testing.assert_allclose(cut.head(cut.maps), network.forward(variables, IMAGES), rtol=1e-5)
    assert not np.allclose(cut.head(2 * cut.maps), network.forward(variables, IMAGES))


def test_integrated_gradients_take_more_steps_until_they_are_complete(small):
    network, variables = small
    explainer = make_explainer(network, variables, SHAPE)
    heat = explainer.maps("integrated_gradients", IMAGES, CLASSES)
    assert heat.completeness_error.max() <= 0.01 and heat.steps.min() >= 32
    origin = np.full_like(IMAGES, 0.5)
    ends = [np.asarray(network.forward(variables, some))[np.arange(3), CLASSES] for some in (IMAGES, origin)]
    np.testing.assert_allclose(heat.maps.sum(axis=(1, 2)), ends[0] - ends[1], rtol=0.011)


def test_a_network_of_another_seed_gives_other_maps(small):
    explainer = make_explainer(*small, SHAPE)
    maps = explainer.maps("gradcam", IMAGES, CLASSES).maps
    found = explainer.randomisation("gradcam", IMAGES, CLASSES, maps)
    assert set(found) == {"head", "upper half", "all"} and all(values.shape == (3,) for values in found.values())
    active = explainer.maps("feature_maps", IMAGES, CLASSES).maps
    np.testing.assert_allclose(explainer.randomisation("feature_maps", IMAGES, CLASSES, active)["head"], 1)


def test_tokens_are_laid_out_on_grids_that_are_not_square():
    assert grid(6, (8, 12)) == (2, 3, 0)
    assert grid(7, (8, 12)) == (2, 3, 1)
    assert grid(197, (224, 224)) == (14, 14, 1)
    assert grid(64, (32, 32)) == (8, 8, 0)
    with pytest.raises(ValueError, match="no grid of square patches"):
        grid(11, (8, 12))


@pytest.mark.parametrize("extra", [0, 1])
def test_rollout_is_the_product_that_numpy_gives(extra):
    tokens = 6 + extra
    weights = [np.asarray(jax.nn.softmax(RNG.normal(size=(2, 3, tokens, tokens)), axis=-1)) for _ in range(3)]
    expected = np.eye(tokens)[None].repeat(2, axis=0)
    for each in weights:
        layer = 0.5 * each.mean(axis=1) + 0.5 * np.eye(tokens)
        expected = np.stack([one @ other for one, other in zip(layer, expected, strict=True)])
    rows = expected[:, 0, 1:] if extra else expected.mean(axis=1)
    found = attention.rollout([jnp.asarray(each) for each in weights], (8, 12))
    np.testing.assert_allclose(found, rows.reshape(2, 2, 3), rtol=1e-5)
    last = weights[-1].mean(axis=1)
    rows = last[:, 0, 1:] if extra else last.mean(axis=1)
    np.testing.assert_allclose(attention.last_attention(weights, (8, 12)), rows.reshape(2, 2, 3), rtol=1e-5)


@pytest.mark.by_turns
@pytest.mark.parametrize("aggregation", ["token", "mean_attention"])
def test_a_vit_shows_the_place_that_its_class_looks_at(aggregation):
    """On 2 x 3 patches: the cut keeps the logits, and every patch has a gradient, behind a class token too."""
    model = VisionTransformer(3, 4, 8, 11, 2, 8, aggregation=aggregation, remat="block")
    images = RNG.random((2, 8, 12, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    network = make_network(model, lambda images: images, (0.0,))
    variables = {"params": variables["params"]}
    cut = features(network, variables, images)
    assert cut.maps.shape == (2, 2, 3, 8)
    np.testing.assert_allclose(cut.head(cut.maps), network.forward(variables, images), rtol=1e-4, atol=1e-5)
    _, slopes = cam.maps_and_gradients(network, variables, images, np.array([0, 1]))
    assert np.abs(slopes).max(axis=-1).min() > 0
    weights = attention_weights(network.read(variables, images)[1])
    assert len(weights) == 11  # in the order of the blocks, not of the alphabet
    shown = network.read(variables, images)[1]
    np.testing.assert_array_equal(weights[2], shown["block_2"]["attention"]["attention_weights"][0])


def test_a_method_that_a_network_cannot_do_is_refused(small):
    explainer = make_explainer(*small, SHAPE)
    assert "rollout" not in explainer.methods
    with pytest.raises(UserError, match="--method=rollout needs a model with attention weights; this one can gradcam"):
        explainer.choose(["rollout"])
    assert explainer.choose([]) == ("gradcam", "integrated_gradients", "occlusion")
