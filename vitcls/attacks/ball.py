"""The balls that attacks stay in: all images in [0, 1] at most eps from one's own, by the linf or the l2 norm."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

NORMS = ("linf", "l2")
Forward = Callable[[jax.Array], jax.Array]  # images float32 [B, H, W, C] in [0, 1] -> logits float32 [B, K]


def furthest(image_shape: Sequence[int], norm: str) -> float:
    """How far two images [H, W, C] in [0, 1] can be from each other: a ball of that radius holds all of them."""
    return 1.0 if norm == "linf" else math.sqrt(math.prod(image_shape))


def lengths(delta: jax.Array, norm: str) -> jax.Array:
    """The norm of each of [B, H, W, C], [B, 1, 1, 1]."""
    if norm == "linf":
        return jnp.max(jnp.abs(delta), axis=(1, 2, 3), keepdims=True)
    largest = jnp.maximum(jnp.max(jnp.abs(delta), axis=(1, 2, 3), keepdims=True), 1e-37)
    return largest * jnp.sqrt(jnp.sum((delta / largest) ** 2, axis=(1, 2, 3), keepdims=True))  # no square underflows


def distances(images: jax.Array, clean: jax.Array, norm: str) -> jax.Array:
    """How far each of [B, H, W, C] is from its own, [B]."""
    return lengths(images - clean, norm)[:, 0, 0, 0]


def project(images: jax.Array, clean: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    """The nearest point of the ball, then cut to [0, 1], which for l2 is within the ball and not always the nearest."""
    delta = images - clean
    if norm == "linf":
        delta = jnp.clip(delta, -eps, eps)
    else:
        delta = delta * jnp.minimum(1.0, eps / jnp.maximum(lengths(delta, norm), 1e-12))
    return jnp.clip(clean + delta, 0.0, 1.0)


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """The direction of length 1 in which the loss grows the most (Madry et al. 2018, section 2.1); 0 where it is 0."""
    if norm == "linf":
        return jnp.sign(gradient)
    return gradient / jnp.maximum(lengths(gradient, norm), 1e-37)


def random_point(keys: jax.Array, clean: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    """A point of each ball, uniform before it is cut to [0, 1]; one key for each image."""
    shape = clean.shape[1:]

    def draw(key: jax.Array) -> jax.Array:
        if norm == "linf":
            return jax.random.uniform(key, shape, minval=-1.0)
        direction, radius = jax.random.split(key)
        normal = jax.random.normal(direction, shape)
        return normal / jnp.linalg.norm(normal) * jax.random.uniform(radius) ** (1 / normal.size)

    return jnp.clip(clean + eps * jax.vmap(draw)(keys), 0.0, 1.0)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, K], int32 [B] -> [B].

    By the gap between the true class and the others together: softmax less one, the slope of the usual form, is all
    rounding where a prediction is sure, and attacks would climb that.
    """
    truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    own = jnp.sum(jnp.where(truth, logits, 0.0), axis=-1)
    others = jax.nn.logsumexp(jnp.where(truth, -jnp.inf, logits), axis=-1)
    return jax.nn.softplus(others - own)


def ascent(forward: Forward, loss: Callable, images: jax.Array, truth: jax.Array) -> tuple[jax.Array, ...]:
    """(gradients [B, H, W, C], losses [B], logits [B, K]) of `loss(logits, truth)` at the images."""

    def total(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = forward(images).astype(jnp.float32)
        losses = loss(logits, truth)
        return jnp.sum(losses), (losses, logits)

    gradients, (losses, logits) = jax.grad(total, has_aux=True)(images)
    return gradients, losses, logits
