"""SimCLR: features without labels, from two views of each image (Chen et al. 2020, arXiv 2002.05709)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.core.registry import require, require_range
from vitcls.tasks.base import Aux, Context, Task

_OTHERS = 1e-3  # of the vote, for all images of the bank


@dataclasses.dataclass(frozen=True)
class SimCLR:
    """The normalised, temperature-scaled cross-entropy of two views (NT-Xent: section 2.1, equation 1).

    Views are what `config.augment` makes of an image with two keys; the paper crops, jitters colours and flips. A
    projection head of two layers is trained on top of the model's features and left out of the evaluation, which is a
    weighted vote of the nearest training images by the cosine of features (Wu et al. 2018, section 3.4). All others
    have a thousandth of the vote, which orders the classes that no neighbour is of.
    """

    temperature: float = 0.5
    projection_dim: int = 128
    neighbors: int = 20
    neighbor_temperature: float = 0.07  # a neighbour's vote is exp(cosine / neighbor_temperature)
    bank_size: int = 50_000  # training images among which neighbours are looked for

    def __post_init__(self):
        for field in ("temperature", "neighbor_temperature"):
            require(self, field, 1e-3 <= getattr(self, field) <= 1e3, "in [0.001, 1000]")
        require_range(self, projection_dim=(1, 2**16), neighbors=(1, 10_000), bank_size=(1, 10_000_000))

    def build(self, context: Context) -> Task:
        num_classes = len(context.class_names)

        def inputs(tools, batch):
            targets = jax.nn.one_hot(batch["label"], num_classes)

            def view(number):
                keys = jax.vmap(jax.random.fold_in, (0, None))(batch["key"], number)
                return tools.normalize(tools.augment(keys, batch["image"], targets)[0])

            return jnp.stack([view(0), view(1)], axis=1)  # [B, 2, H, W, C]

        def loss(tools, params, batch_stats, views, extra, frozen, key):
            # The two views of an image are neighbours, so that no image changes its device.
            output = tools.forward(params, batch_stats, views.reshape(-1, *views.shape[2:]), key, sow=True)
            projected = output.sown["projection"][0].reshape(*views.shape[:2], -1)  # [B, 2, D]
            losses, found = nt_xent(projected, tools.gather_batch, tools.positions(len(views)), self.temperature)
            return losses, Aux(output.batch_stats, {"found": found})

        def features(apply, variables, images):
            found = apply(variables, images, sow=True).sown["encoder"]["features"][0].astype(jnp.float32)
            return found / jnp.maximum(jnp.linalg.norm(found, axis=-1, keepdims=True), 1e-6)

        def cosines(apply, variables, images, bank):
            return features(apply, variables, images) @ bank["rows"].T

        def nearest(similarity):
            return jax.lax.top_k(similarity, min(self.neighbors, similarity.shape[1]))

        def neighbor_similarity(apply, variables, images, labels, bank):
            return jnp.mean(nearest(cosines(apply, variables, images, bank))[0], axis=1)

        def predict(apply, variables, images, bank):
            similarity = cosines(apply, variables, images, bank)
            best, places = nearest(similarity)
            classes = jax.nn.one_hot(bank["label"], num_classes)
            votes = jax.nn.softmax(best / self.neighbor_temperature)
            shares = jnp.sum(votes[..., None] * classes[places], axis=1)
            every = jax.nn.softmax(similarity / self.neighbor_temperature) @ classes
            return jnp.log((1 - _OTHERS) * shares + _OTHERS * every)

        return Task(
            loss,
            inputs=inputs,
            wrap=lambda model: Projected(encoder=model, dim=self.projection_dim),
            means={"pairs_found": "found"},
            predict=predict,
            eval_sums={"neighbor_similarity": neighbor_similarity},
            remember=features,
            bank_size=self.bank_size,
            own_loss=True,
            separable=False,
        )


class Projected(nn.Module):
    """A model with a projection head on its features: images -> the model's logits; sows 'projection' [B, dim]."""

    encoder: nn.Module
    dim: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        logits = self.encoder(images, train=train)
        if self.is_mutable_collection("intermediates"):
            features = self.encoder.get_variable("intermediates", "features")[0].astype(jnp.float32)
            hidden = nn.relu(nn.Dense(features.shape[-1], name="hidden")(features))
            self.sow("intermediates", "projection", nn.Dense(self.dim, use_bias=False, name="project")(hidden))
        return logits


def nt_xent(views: jax.Array, gather_batch, positions: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Views float [b, 2, D] of this device's images -> (losses [b], share of views whose other is the nearest [b]).

    The 2 B views of the global batch take part; an image's loss is the mean of those of its two views. `positions`
    int32 [b] are those of the images in the global batch.
    """
    views = views / jnp.maximum(jnp.linalg.norm(views, axis=-1, keepdims=True), 1e-6)
    every = gather_batch(views).reshape(-1, views.shape[-1])  # [2 B, D]
    own = 2 * positions[:, None] + jnp.arange(2)[None, :]  # [b, 2], the places of these views in `every`
    similarity = jnp.einsum("bvd,nd->bvn", views, every) / temperature
    itself = own[..., None] == jnp.arange(len(every))[None, None, :]
    similarity = jnp.where(itself, -jnp.inf, similarity)
    other = own[:, ::-1, None]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(similarity, axis=-1), other, axis=-1)[..., 0]
    found = jnp.argmax(similarity, axis=-1) == other[..., 0]
    return -jnp.mean(log_p, axis=1), jnp.mean(found.astype(jnp.float32), axis=1)
