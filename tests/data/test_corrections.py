"""Corrections in the training split: repeated, in place of what they correct, by either pipeline."""

import json

import numpy as np
import pytest
from PIL import Image

from vitcls.config import default_config
from vitcls.core import sharding
from vitcls.core.errors import UserError
from vitcls.data import corrections, load, pixels, train_batches


def shade(value):
    return np.full((8, 8, 1), value, np.uint8)


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shade(value)[..., 0]).save(path)


@pytest.fixture
def root(tmp_path):
    """Two corrections that train and one that judges; the images 1 and 2 of training are replaced."""
    root = tmp_path / "corrections"
    save(root / "train" / "b" / "x.png", 201)
    save(root / "train" / "a" / "y.png", 202)
    save(root / "held_out" / "b" / "z.png", 203)
    write_record(root, train=[1, 2], validation=[0])
    return root


def write_record(root, **replaced):
    (root / "corrections.json").write_text(json.dumps({"replaced": replaced}))


@pytest.fixture(params=["folder", "npz"])
def config(request, tmp_path, root):
    """Ten training images with the shades 0 .. 9, of class a and b in turn, and two of validation and test."""
    config = default_config("lenet5").dataset
    values = {"train": range(10), "val": range(20, 22), "test": range(30, 32)}
    if request.param == "folder":
        for split, shades in values.items():
            for shade_ in shades:
                save(tmp_path / "data" / split / "ab"[shade_ % 2] / f"{shade_}.png", shade_)
        config.update(name="folder", data_dir=str(tmp_path / "data"))
    else:
        arrays = {f"{split}_images": np.stack([shade(v) for v in shades]) for split, shades in values.items()}
        arrays |= {f"{split}_labels": np.array(shades) % 2 for split, shades in values.items()}
        np.savez(tmp_path / "data.npz", **arrays)
        config.update(name="npz", data_dir=str(tmp_path / "data.npz"))
    config.update(corrections=str(root), correction_weight=3)
    return config


def as_pairs(dataset, name):
    split = getattr(dataset, name)
    shades = pixels(split, dataset.image_shape)[:, 0, 0, 0].tolist()
    return list(zip(shades, (dataset.class_names[label] for label in split.labels), strict=True))


def plain(config):
    without = config.copy_and_resolve_references()
    without.corrections = ""
    return load(without)


def test_they_are_repeated_and_replace_what_they_correct(config, root):
    if config.name == "npz":
        for part in ("train", "held_out"):
            for old, new in (("a", "0"), ("b", "1")):
                if (root / part / old).exists():
                    (root / part / old).rename(root / part / new)
    before, after = plain(config), load(config)
    expected = [pair for i, pair in enumerate(as_pairs(before, "train")) if i not in (1, 2)]
    expected += [(202, before.class_names[0]), (201, before.class_names[1])] * 3
    assert as_pairs(after, "train") == expected
    assert as_pairs(after, "validation") == as_pairs(before, "validation")[1:]
    assert as_pairs(after, "test") == as_pairs(before, "test")
    held_out = corrections.read(root, "held_out", after.class_names, after.test.decoding)
    assert held_out.labels.tolist() == [1] and held_out.images.name(0).endswith("z.png")


@pytest.mark.parametrize("config", ["folder"], indirect=True)
def test_both_pipelines_give_the_same_batches_of_them(config):
    dataset, shades = load(config), {}
    for pipeline in ("resident", "streaming"):
        config.pipeline = pipeline
        batches = train_batches(dataset, config, partition=sharding.all_devices("data"), batch_size=8, seed=1)
        inputs = batches.host_inputs(0, 1)
        batch = batches.batch_fn(inputs, np.int32(0), 1)(np.int32(0))
        shades[pipeline] = np.asarray(batch["image"])[:, 0, 0, 0].tolist()
    assert shades["resident"] == shades["streaming"] and set(shades["resident"]) & {201, 202}


@pytest.mark.parametrize("config", ["folder"], indirect=True)
def test_what_cannot_be_used_is_said(config, root):
    write_record(root, train=[10], validation=[])
    with pytest.raises(UserError, match="of other data"):
        load(config)
    (root / "corrections.json").write_text("{}")
    with pytest.raises(UserError, match=r"corrections.json cannot be used"):
        load(config)
    save(root / "train" / "c" / "x.png", 1)
    with pytest.raises(UserError, match="is of a class that the data do not have"):
        load(config)
    config.corrections = "nowhere"
    with pytest.raises(UserError, match="has no directory 'train'"):
        load(config)
