"""All methods for one network, compiled and in batches of one size; what commands and servers call."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.attribution import attention, cam, evidence, gradients
from vitcls.attribution.evidence import Evidence
from vitcls.attribution.network import Network, PyTree, abilities, attention_weights, features
from vitcls.core import errors
from vitcls.core.errors import UserError

BATCH = 32
TOLERANCE = 0.01  # of the completeness of integrated gradients
_FIRST_STEPS, _MOST_STEPS = 32, 4096


class Method(NamedTuple):
    """A way to make maps."""

    needs: str  # '' for nothing but logits; else what `network.abilities` says
    of_class: bool  # whether the map depends on the class that is asked about
    paper: str


METHODS = {
    "gradcam": Method("map", True, "Selvaraju et al. 2017"),
    "gradcam++": Method("map", True, "Chattopadhay et al. 2018"),
    "rollout": Method("attention", False, "Abnar & Zuidema 2020"),
    "attention": Method("attention", False, "the last block's weights"),
    "integrated_gradients": Method("", True, "Sundararajan et al. 2017"),
    "smoothgrad": Method("", True, "Smilkov et al. 2017"),
    "occlusion": Method("", True, "Zeiler & Fergus 2014"),
    "feature_maps": Method("map", False, "the mean activity of the last map of features"),
}
DEFAULT = ("gradcam", "rollout", "integrated_gradients", "occlusion")  # as far as the network can


class Heat(NamedTuple):
    """Maps of images, and for integrated gradients how complete they are."""

    maps: np.ndarray  # float32 [N, H, W]; higher is more evidence for the class, below 0 against it
    completeness_error: np.ndarray | None = None  # float [N]; relative, of the sum and the difference of logits
    steps: np.ndarray | None = None  # int [N]; of the sum


@dataclasses.dataclass(frozen=True)
class Explainer:
    """Explains images float32 [N, H, W, C] in [0, 1] of one size for classes int [N]."""

    network: Network
    variables: PyTree
    image_shape: tuple[int, int, int]

    @functools.cached_property
    def methods(self) -> tuple[str, ...]:
        """Those that this network can do."""
        able = abilities(self.network, self.variables, self.image_shape) | {""}
        return tuple(name for name, method in METHODS.items() if method.needs in able)

    def choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """`names`, or sensible ones where there are none; raises UserError for an unknown or impossible one."""
        for name in names:
            if name not in METHODS:
                raise errors.unknown("method", name, METHODS)
            if name not in self.methods:
                what = {"map": "a map of features", "attention": "attention weights"}[METHODS[name].needs]
                raise UserError(f"--method={name} needs a model with {what}; this one can {', '.join(self.methods)}")
        return tuple(dict.fromkeys(names)) or tuple(name for name in DEFAULT if name in self.methods)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, K]."""
        return _in_batches(lambda some: (self._probabilities(self.variables, some),), images)[0]

    def maps(self, method: str, images: np.ndarray, classes: np.ndarray, variables: PyTree = None) -> Heat:
        """The maps of a method; `variables` replace the network's own."""
        if method == "integrated_gradients":
            return self._integrated(images, classes, variables)
        variables = self.variables if variables is None else variables
        return Heat(*_in_batches(lambda *some: (self._map(method, variables, *some),), images, classes))

    def _map(self, method: str, variables: PyTree, images: np.ndarray, classes: np.ndarray) -> jax.Array:
        """[B, H, W] of a batch."""
        gradient, score = self._bound(variables, classes)
        if method == "smoothgrad":  # the largest magnitude over the colours, as in the paper
            found = gradients.smoothgrad(gradient, images, jax.random.key(0))
            return jnp.max(jnp.abs(found), axis=-1)
        if method == "occlusion":  # by windows of a quarter of each side, which overlap by half
            window = tuple(max(1, side // 4) for side in images.shape[1:3])
            stride = tuple(max(1, side // 2) for side in window)
            return gradients.occlusion(score, images, self._baseline, window=window, stride=stride)
        return self._shown(method)(variables, images, classes)

    def _bound(self, variables: PyTree, classes: np.ndarray) -> tuple[Callable, Callable]:
        """images -> gradients of the logits of `classes`, and images -> the logits."""
        return functools.partial(self._gradient, variables, classes), functools.partial(self._logit, variables, classes)

    def _integrated(self, images: np.ndarray, classes: np.ndarray, others: PyTree) -> Heat:
        """Doubles the steps of those images that are not complete yet; of other variables nobody asks for that."""
        variables, most = (self.variables, _MOST_STEPS) if others is None else (others, _FIRST_STEPS)
        maps = np.zeros(images.shape[:3], np.float32)
        error, used = np.full(len(images), np.inf), np.zeros(len(images), int)
        steps, left = _FIRST_STEPS, np.arange(len(images))
        while len(left):
            run = functools.partial(self._complete, variables, steps)
            maps[left], error[left] = _in_batches(run, images[left], classes[left])
            used[left] = steps
            left = np.flatnonzero(~(error <= TOLERANCE)) if steps < most else []
            steps *= 2
        return Heat(maps, error, used)

    def _complete(self, variables: PyTree, steps: int, images: np.ndarray, classes: np.ndarray):
        """Maps [B, H, W], summed over the colours, and the error of their completeness [B]."""
        gradient, score = self._bound(variables, classes)
        found = gradients.integrated_gradients(gradient, images, self._baseline, steps)
        nothing = np.broadcast_to(self._baseline, images.shape)
        return jnp.sum(found, axis=-1), gradients.completeness_error(found, score(images) - score(nothing))

    def evidence(
        self,
        images: np.ndarray,
        classes: np.ndarray,
        maps: np.ndarray,
        seed: int = 0,
        count: int = evidence.RANDOM_MAPS,
    ) -> list[Evidence]:
        """What supports each map [N, H, W], beside `count` random ones as smooth as it."""
        rng = np.random.default_rng(seed)
        everyone = [np.concatenate([heat[None], evidence.random_maps(heat, count, rng)]) for heat in maps]
        order = np.concatenate([evidence.ranks(some, rng) for some in everyone])
        same = (np.repeat(array, count + 1, axis=0) for array in (images, classes))
        rows = _in_batches(self._curves, *same, order)
        areas = (evidence.area(curve).reshape(len(maps), count + 1) for curve in rows)
        return [Evidence(float(d[0]), float(i[0]), d[1:], i[1:]) for d, i in zip(*areas, strict=True)]

    def randomisation(
        self, method: str, images: np.ndarray, classes: np.ndarray, maps: np.ndarray, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Stage -> rank correlations [N] of the maps with those of a network that is randomised so far."""
        found = {}
        for stage in evidence.STAGES:
            others = self.maps(method, images, classes, self._randomised(stage, seed)).maps
            pairs = zip(maps, others, strict=True)
            found[stage] = np.array([evidence.rank_correlation(one, other) for one, other in pairs])
        return found

    @functools.cached_property
    def _randomised(self) -> Callable:
        one = np.zeros((1, *self.image_shape), np.float32)
        return functools.cache(
            lambda stage, seed: evidence.randomised(self.network.forward, self.variables, one, stage, seed)
        )

    def feature_maps(self, image: np.ndarray) -> np.ndarray:
        """The last map of features of one image [H, W, C], float32 [h, w, D]."""
        return np.asarray(self._features(self.variables, image[None])[0], np.float32)

    @functools.cached_property
    def _features(self) -> Callable:
        return jax.jit(lambda variables, images: features(self.network, variables, images).maps)

    @functools.cached_property
    def _probabilities(self) -> Callable:
        return jax.jit(lambda variables, images: jax.nn.softmax(self.network.forward(variables, images), axis=-1))

    def _curves(self, images: np.ndarray, classes: np.ndarray, order: np.ndarray) -> tuple[jax.Array, jax.Array]:
        def probability(some: jax.Array) -> jax.Array:
            return self._probabilities(self.variables, some)[np.arange(len(classes)), classes]

        return evidence.curves(probability, images, order, self._baseline)

    @functools.cached_property
    def _gradient(self) -> Callable:
        forward = self.network.forward
        return jax.jit(lambda variables, classes, images: gradients.gradient_of(forward, variables, images, classes))

    @functools.cached_property
    def _logit(self) -> Callable:
        forward = self.network.forward
        return jax.jit(lambda variables, classes, images: gradients.logits_of(forward, variables, images, classes))

    @functools.cached_property
    def _shown(self) -> Callable[[str], Callable]:
        return functools.cache(lambda method: jax.jit(_program(method, self.network)))

    @property
    def _baseline(self) -> np.ndarray:
        """[1, 1, 1, C]."""
        return np.asarray(self.network.baseline, np.float32)[None, None, None]


def _program(method: str, network: Network) -> Callable:
    """(variables, images, classes) -> maps [B, H, W], of a method that looks inside."""

    def program(variables: PyTree, images: jax.Array, classes: jax.Array) -> jax.Array:
        size = images.shape[1:3]
        match method:
            case "gradcam":
                maps = cam.gradcam(*cam.maps_and_gradients(network, variables, images, classes))
            case "gradcam++":
                maps = cam.gradcam_plus_plus(*cam.maps_and_gradients(network, variables, images, classes))
            case "feature_maps":
                maps = cam.activity(features(network, variables, images).maps)
            case "rollout":
                maps = attention.rollout(attention_weights(network.read(variables, images)[1]), size)
            case "attention":
                maps = attention.last_attention(attention_weights(network.read(variables, images)[1]), size)
        return _resized(maps, images.shape)

    return program


def _resized(maps: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, h, w] -> float32 [B, H, W], bilinear."""
    return jax.image.resize(maps.astype(jnp.float32), (maps.shape[0], *shape[1:3]), "linear")


def _in_batches(function: Callable, *arrays: np.ndarray) -> list[np.ndarray]:
    """The results of `function`, a tuple of arrays, over rows in batches; padded to powers of two up to BATCH."""
    parts = []
    for start in range(0, len(arrays[0]), BATCH):
        some = [np.asarray(array[start : start + BATCH]) for array in arrays]
        count = len(some[0])
        size = 1 << (count - 1).bit_length()
        padded = [np.concatenate([rows, np.repeat(rows[:1], size - count, axis=0)]) for rows in some]
        parts.append([np.asarray(part)[:count] for part in jax.device_get(function(*padded))])
    return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def explain(
    explainer: Explainer, image: np.ndarray, method: str, label: int, seed: int = 0
) -> tuple[np.ndarray, Evidence]:
    """The map float32 [H, W] of one image [H, W, C] in [0, 1] for a class, and what supports it."""
    classes = np.array([label], np.int32)
    maps = explainer.maps(method, image[None], classes).maps
    return maps[0], explainer.evidence(image[None], classes, maps, seed)[0]


def make_explainer(network: Network, variables: Any, image_shape: tuple[int, int, int]) -> Explainer:
    """Takes the variables to the first device of this process."""
    return Explainer(network, jax.device_put(jax.device_get(variables), jax.local_devices()[0]), image_shape)
