"""Which examples form which batch: a pure function of (seed, step), the same for both pipelines."""

import jax
import jax.numpy as jnp

_ORDER_STREAM = 0x0DDE  # keeps the keys of the order apart from those of the steps


def epoch_order(
    seed: jax.Array | int, epoch: jax.Array | int, labels: jax.Array, *, num_classes: int, balanced: bool
) -> jax.Array:
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


MAX_BATCH_SIZE = 2**20  # of `offset_on_device`


def first_place(step: int, *, batch_size: int, num_examples: int) -> tuple[int, int]:
    """(epoch, offset) of the first example of batch `step`, on the host.

    Batches follow each other through the epochs without a gap, so every example is seen once per epoch whatever the
    batch size.
    """
    return divmod(step * batch_size, num_examples)


def offset_on_device(step: jax.Array, *, batch_size: int, num_examples: int) -> jax.Array:
    """The offset of `first_place` for a traced step, int32 scalar; exact for num_examples < 2^31.

    step * batch_size does not fit 32 bits at ImageNet's size, so the product is made bit by bit of the batch size,
    reduced at once: no intermediate value reaches 2^32.
    """
    modulus = jnp.uint32(num_examples)
    start = step.astype(jnp.uint32) % modulus
    offset = jnp.uint32(0)
    for bit in f"{batch_size:b}":
        offset = offset * 2 % modulus
        if bit == "1":
            offset = (offset + start) % modulus
    return offset.astype(jnp.int32)
