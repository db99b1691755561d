"""Class activation maps, of the last map of features and the gradient of a logit by it."""

import jax
import jax.numpy as jnp

from vitcls.attribution.network import Network, PyTree, features


def gradcam(maps: jax.Array, gradients: jax.Array) -> jax.Array:
    """relu(sum_c mean(dy / dA_c) A_c) (Selvaraju et al. 2017, equations 1 and 2).

    Args:
      maps, gradients: [B, h, w, D].
    Returns:
      float32 [B, h, w], not below 0.
    """
    maps, gradients = maps.astype(jnp.float32), gradients.astype(jnp.float32)
    return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", maps, jnp.mean(gradients, axis=(1, 2))))


def gradcam_plus_plus(maps: jax.Array, gradients: jax.Array) -> jax.Array:
    """Grad-CAM weighted place by place (Chattopadhay et al. 2018, equations 5 and 19), of the class score exp(logit).

    Its factor exp(logit) scales the map of an image as a whole, and is left out. Arguments and result as of `gradcam`.
    """
    maps, gradients = maps.astype(jnp.float32), gradients.astype(jnp.float32)
    totals = jnp.sum(maps, axis=(1, 2), keepdims=True)
    divisor = 2 * gradients**2 + totals * gradients**3
    alphas = jnp.where(divisor == 0, 0.0, gradients**2 / jnp.where(divisor == 0, 1.0, divisor))
    weights = jnp.sum(alphas * jax.nn.relu(gradients), axis=(1, 2))
    return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", maps, weights))


def activity(maps: jax.Array) -> jax.Array:
    """The root mean square of the features at each place, whatever the class: [B, h, w, D] -> float32 [B, h, w]."""
    return jnp.sqrt(jnp.mean(jnp.square(maps.astype(jnp.float32)), axis=-1))


def maps_and_gradients(
    network: Network, variables: PyTree, images: jax.Array, classes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last map of features and the gradient of the logits of `classes` int [B] by it, [B, h, w, D] each."""
    cut = features(network, variables, images)

    def score(maps: jax.Array) -> jax.Array:
        return jnp.sum(jnp.take_along_axis(cut.head(maps), classes[:, None], axis=1))

    return cut.maps, jax.grad(score)(cut.maps)
