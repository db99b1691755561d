"""Which examples form which batch: a pure function of (seed, step), the same for both pipelines."""

import jax
import jax.numpy as jnp

_ORDER_STREAM = 0x0DDE  # keeps the keys of the order apart from those of the steps


def epoch_order(seed: int, epoch: jax.Array, labels: jax.Array, *, num_classes: int, balanced: bool) -> jax.Array:
    """The order int32 [N] in which epoch `epoch` visits the N training examples with `labels` int32 [N].

    Uniform: a permutation; every example once. Balanced: every class gets the same number of the N places (to one),
    each class passing through its own examples in random order, over again where it has too few.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER_STREAM), epoch)
    if not balanced:
        return jax.random.permutation(key, labels.shape[0]).astype(jnp.int32)
    within_key, places_key = jax.random.split(key)
    by_class = jnp.lexsort((jax.random.uniform(within_key, labels.shape), labels))  # shuffled inside each class
    counts = jnp.bincount(labels, length=num_classes)
    starts = jnp.cumsum(counts) - counts
    places = jnp.arange(labels.shape[0])
    place_class, turn = places % num_classes, places // num_classes
    chosen = by_class[starts[place_class] + turn % counts[place_class]]
    return jax.random.permutation(places_key, chosen).astype(jnp.int32)


def first_place(step, *, batch_size: int, num_examples: int):
    """(epoch, offset) of the first example of batch `step`, for ints or int32 arrays.

    Batches follow each other through the epochs without a gap, so every example is seen once per epoch whatever the
    batch size. Written so that no product exceeds num_examples * batch_size (int32 on the device).
    """
    within = (step % num_examples) * batch_size
    return (step // num_examples) * batch_size + within // num_examples, within % num_examples
