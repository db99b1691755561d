"""What removing places does, random maps, mosaics and shuffled weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.attribution import evidence
from vitcls.attribution.evidence import Evidence

NOTHING = np.zeros((1, 1, 1, 1), np.float32)


def test_curves_and_their_areas_by_hand():
    """The 'probability' is the sum of the pixels 4 3 2 1 over 10; the map wants the 4 first."""
    images = np.array([4, 3, 2, 1], np.float32).reshape(1, 2, 2, 1) / 10
    order = evidence.ranks(np.array([[[0.9, 0.5], [0.3, 0.1]]]), np.random.default_rng(0))
    np.testing.assert_array_equal(order, [[[0, 1], [2, 3]]])
    deletion, insertion = evidence.curves(lambda some: jnp.sum(some, axis=(1, 2, 3)), images, order, NOTHING, steps=4)
    np.testing.assert_allclose(deletion[0], [1, 0.6, 0.3, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(insertion[0], [0, 0.4, 0.7, 0.9, 1], atol=1e-6)
    assert evidence.area(np.asarray(deletion))[0] == pytest.approx((0.5 + 0.6 + 0.3 + 0.1) / 4)
    assert evidence.area(np.asarray(insertion))[0] == pytest.approx((0.4 + 0.7 + 0.9 + 0.5) / 4)


def test_equal_places_are_ordered_by_lot():
    firsts = [int(evidence.ranks(np.zeros((1, 2, 2)), np.random.default_rng(i)).argmin()) for i in range(40)]
    assert set(firsts) == {0, 1, 2, 3}


def test_random_maps_have_the_spectrum_of_the_map_and_nothing_else_of_it():
    rows, columns = np.mgrid[:16, :12]
    heat = np.exp(-((rows - 4) ** 2 + (columns - 3) ** 2) / 8)
    made = evidence.random_maps(heat, 50, np.random.default_rng(0))
    np.testing.assert_allclose(np.abs(np.fft.fft2(made)), np.abs(np.fft.fft2(heat))[None].repeat(50, 0), atol=1e-6)
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in made]
    assert len(set(peaks)) > 25
    assert abs(np.mean([evidence.rank_correlation(heat, one) for one in made])) < 0.15


def test_a_map_has_to_beat_all_of_nineteen_random_ones():
    areas = np.linspace(0.2, 0.3, 19)
    assert Evidence(0.1, 0.5, areas, areas).p_value == 0.05
    assert Evidence(0.1, 0.5, areas, areas).better_than_random
    assert not Evidence(0.3, 0.3, areas, areas).better_than_random
    assert Evidence(0.3, 0.3, areas, areas).p_value == 1
    one_is_as_good = np.append(areas[1:], 0.9)
    assert Evidence(0.1, 0.5, areas, one_is_as_good).p_value == 0.1
    assert Evidence(0.1, 0.5, areas, areas).random("deletion")["value"] == pytest.approx(0.25)


def test_rank_correlation():
    one = np.arange(6.0).reshape(2, 3)
    assert evidence.rank_correlation(one, one**3) == pytest.approx(1)
    assert evidence.rank_correlation(one, -one) == pytest.approx(-1)
    assert evidence.rank_correlation(one, np.ones((2, 3))) == 0


def forward(variables, images):
    """Uses 'last' last, whatever the alphabet says."""
    x = jnp.tanh(images.reshape(len(images), -1) @ variables["params"]["z_first"])
    x = jnp.tanh(x @ variables["params"]["middle"])
    return x @ variables["params"]["a_last"] + variables["params"]["bias"][None]


def test_weights_are_dealt_anew_from_the_top_down():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(4, 4))) for name in ("z_first", "middle", "a_last")}
    variables = {"params": params | {"bias": jnp.asarray(rng.normal(size=4))}}
    images = np.ones((1, 2, 2, 1), np.float32)
    changed = {}
    for stage in evidence.STAGES:
        new = evidence.randomised(forward, variables, images, stage)["params"]
        changed[stage] = {name for name in new if not np.array_equal(new[name], variables["params"][name])}
        for name in new:  # the same weights, elsewhere
            np.testing.assert_array_equal(np.sort(new[name], axis=None), np.sort(variables["params"][name], axis=None))
    assert changed["head"] == changed["upper half"] == {"a_last", "bias"}
    assert changed["all"] == {"z_first", "middle", "a_last", "bias"}


def test_a_mosaic_has_each_class_in_its_tile():
    labels = np.arange(40) % 5
    images = (labels[:, None, None, None] / 10).astype(np.float32) * np.ones((1, 7, 9, 2), np.float32)
    for mosaic in evidence.mosaics(images, labels, 5, np.random.default_rng(0)):
        assert len(set(mosaic.classes.tolist())) == 4
        for label, tile in zip(mosaic.classes, evidence.tiles((7, 9)), strict=True):
            np.testing.assert_allclose(mosaic.image[tile], label / 10, atol=1e-6)
    covered = np.zeros((7, 9), int)
    for tile in evidence.tiles((7, 9)):
        covered[tile] += 1
    assert (covered == 1).all()
    assert evidence.mosaics(images, labels % 3, 5, np.random.default_rng(0)) == []


def test_pointing_is_the_place_of_the_maximum_and_the_share_of_what_is_positive():
    heat = np.array([[-5.0, 1.0], [0.0, 3.0]])
    places = evidence.tiles((2, 2))
    assert [evidence.pointed(heat, tile, np.random.default_rng(0)) for tile in places] == [
        (False, 0.0),
        (False, 0.25),
        (False, 0.0),
        (True, 0.75),
    ]
    by_lot = [evidence.pointed(np.zeros((2, 2)), places[0], np.random.default_rng(i)) for i in range(200)]
    assert 0.15 < np.mean([hit for hit, _ in by_lot]) < 0.35 and by_lot[0][1] == 0.25
