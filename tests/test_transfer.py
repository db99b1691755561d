"""The whole way of a user with published weights and a folder of photos, in commands."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from tests.models.test_weight_files import safetensors
from vitcls import adopt, cli, main, models
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.models.weights import load
from vitcls.models.weights.to_torch import to_torch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A whole ResNet-18 of 5 classes, as torchvision would write it."""
    shapes = variable_shapes(models.create("resnet18", 5), (32, 32, 3))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: 0.05 * draw.random(leaf.shape, np.float32) + np.float32(0.01), shapes)
    file = safetensors(tmp_path_factory.mktemp("weights") / "w.safetensors", to_torch("resnet18", variables))
    return file, traverse_util.flatten_dict(variables, sep="/")


@pytest.fixture
def photos(tmp_path):
    """Five classes of photos of different sizes and shapes."""
    draw = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / "photos" / f"class_{label}").mkdir(parents=True)
        for i in range(8):
            size = (*draw.integers(40, 90, 2), 3)
            picture = draw.integers(0, 60, size, np.uint8) + np.uint8(40 * label)
            Image.fromarray(picture).save(tmp_path / "photos" / f"class_{label}" / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.mark.by_turns
@pytest.mark.usefixtures("no_pictures")
def test_photos_of_all_shapes_are_fine_tuned_evaluated_and_predicted(weights, photos, tmp_path, capsys, monkeypatch):
    import pathlib
    import sys

    monkeypatch.setattr(sys, "argv", sys.argv)  # the commands set it
    config = pathlib.Path(__file__).parents[1] / "configs" / "transfer.py"
    arguments = [
        f"--config={config}:resnet18,head",
        f"--config.init.weights={weights[0]}",
        f"--config.dataset.data_dir={photos}",
        f"--workdir={tmp_path / 'run'}",
        "--config.dataset.image_size=32",
        "--config.batch_size=8",
        "--config.total=2 steps",
        "--config.report.timing=False",
    ]
    assert cli.run(main.main, arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "mean (0.4850, 0.4560, 0.4060), std (0.2290, 0.2240, 0.2250) of the weights" in said
    assert "trained   2,565 of 11,179,077 parameters, batch statistics stay" in said
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]
    assert kept["mean"] == [0.485, 0.456, 0.406] and kept["random_resized_crop"]


@pytest.mark.by_turns
def test_a_file_is_known_by_its_names_and_shapes(weights):
    (found,) = adopt.identify(load.open_weights(weights[0]))
    assert (found.model, found.given.num_classes, found.given.channels) == ("resnet18", 5, 3)
    for path, leaf in weights[1].items():
        np.testing.assert_array_equal(found.given.variables[path], leaf)


def drawn(name, num_classes, image_shape, **fields):
    shapes = variable_shapes(models.create(name, num_classes, **fields), image_shape)
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.05 * draw.random(leaf.shape, np.float32) + np.float32(0.01), shapes)


@pytest.mark.parametrize(
    ("publisher", "words"),
    [
        ("timm", "mean (0.500, 0.500, 0.500), std (0.500, 0.500, 0.500), SIZE pixels, central 90.0%, bicubic"),
        ("torchvision", "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), SIZE pixels, central 87.5%, bilinear"),
    ],
)
def test_a_vit_is_known_by_the_size_of_its_patches_and_its_publisher_by_the_names(publisher, words, tmp_path):
    for size, expected in ((32, "vit_tiny_patch32, "), (10, "vit_tiny_patch16, patch_size=10, ")):
        variables = drawn("vit_tiny_patch16", 5, (2 * size, 2 * size, 3), patch_size=size)
        arrays = to_torch("vit_tiny_patch16", variables, publisher=publisher, patch_size=size)
        file = load.open_weights(safetensors(tmp_path / f"{size}.safetensors", arrays))
        first, *others = adopt.identify(file)
        lines = adopt.describe(file, first)
        words_of_it = words.replace("SIZE", str(2 * size))  # that of its positions
        assert f"architecture   {expected}" in lines[1] and lines[-1].endswith(f"{words_of_it} (of its publisher)")
        assert not others or size == 10


def test_mobilenet_v3_that_pads_as_tensorflow_has_its_colours():
    """timm's `tf_` weights want 0.5; its others, of the same names, ImageNet's mean."""
    file = load.WeightsFile("w.safetensors", "safetensors", {}, {})
    means = [load.published("mobilenet_v3_small", file, padding=padding).mean for padding in ("same", "even")]
    assert means == [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406)]


def test_a_resnet_that_halves_its_maps_elsewhere_takes_only_what_was_exported_so(tmp_path):
    fields = {"depths": (1, 1), "width": 4, "stride_on": "1x1"}
    arrays = to_torch("resnet50", drawn("resnet50", 5, (32, 32, 3), **fields), **fields)
    theirs = load.open_weights(safetensors(tmp_path / "theirs.safetensors", arrays))
    with pytest.raises(UserError, match="resnet50 can take weights of PyTorch with stride_on='3x3' only"):
        load.convert("resnet50", theirs, head=True, **fields)
    ours = theirs._replace(metadata={"vitcls": '"0.1.0"'})
    assert load.convert("resnet50", ours, head=True, **fields).num_classes == 5


@pytest.mark.parametrize(
    ("weights", "name", "fields", "words"),
    [
        ("timm/efficientnet_b0.ra_in1k", "efficientnet_b0", {}, "pads as PyTorch does.*; take timm/tf_efficientnet_b0"),
        ("timm/mobilenetv3_large_100.ra_in1k", "mobilenet_v3_large", {}, "with padding='even' only"),
        ("timm/tf_mobilenetv3_large_100.in1k", "mobilenet_v3_large", {"padding": "even"}, "padding='same' only"),
        ("timm/tf_efficientnet_b0.in1k", "efficientnet_b0", {}, ""),
        ("timm/mobilenetv2_100.ra_in1k", "mobilenet_v2", {"padding": "even"}, ""),
    ],
)
def test_a_name_of_the_hub_says_how_its_network_pads(weights, name, fields, words):
    """Names and shapes of the arrays do not."""
    expected = pytest.raises(UserError, match=words) if words else contextlib.nullcontext()
    with expected:
        load.check_publisher(weights, name, **fields)


@pytest.mark.by_turns
def test_a_mobilenet_v3_of_the_hub_is_known_by_its_name(tmp_path):
    variables = drawn("mobilenet_v3_small", 5, (32, 32, 3), padding="even")
    path = safetensors(tmp_path / "w.safetensors", to_torch("mobilenet_v3_small", variables, padding="even"))
    first, *_ = adopt.identify(load.open_weights(path), "timm/mobilenetv3_small_100.lamb_in1k")
    lines = adopt.describe(load.open_weights(path), first)
    assert "mobilenet_v3_small, padding=even, " in lines[1] and "mean (0.485, 0.456, 0.406)" in lines[-1]


def test_weights_of_no_model_are_refused(weights, tmp_path):
    file = load.open_weights(safetensors(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="holds the weights of no model here"):
        adopt.identify(file)
    arrays = {key: np.asarray(array) for key, array in load.open_weights(weights[0]).arrays.items()}
    arrays["layer4.1.bn3.weight"] = arrays.pop("layer4.1.bn2.weight")
    file = load.open_weights(safetensors(tmp_path / "renamed.safetensors", arrays))
    words = r"nearest is resnet18: the weights have no 'layer4.1.bn2.weight', .*; resnet18 has no place for 1 .*4.1.bn3"
    with pytest.raises(UserError, match=words):
        adopt.identify(file)


@pytest.mark.by_turns
def test_labelled_images_tell_the_preprocessing_and_the_order_of_the_classes(tmp_path):
    """Of a ResNet-18 that tells twelve grey levels apart, of images less 0.5 and divided by 0.5."""
    shapes = variable_shapes(models.create("resnet18", 12), (32, 32, 3))
    flat = {
        path: np.zeros(leaf.shape, np.float32) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    for path, leaf in flat.items():
        through = "/stem/" in path or "/shortcut/" in path  # the blocks beside them add nothing
        if path.endswith("/var") or (path.endswith("/scale") and through):
            leaf[:] = 1
        elif path.endswith("/shortcut/conv/kernel"):
            leaf[0, 0, 0, 0] = leaf[0, 0, 1, 1] = 1
    flat["params/stem/conv/kernel"][3, 3, 0, :2] = 1, -1  # behind ReLU the first two channels are x and -x
    limits, class_of = np.linspace(-1, 1, 13)[:-1], np.arange(12)
    flat["params/head/kernel"][:2] = 100 * np.stack([class_of, -class_of])
    flat["params/head/bias"][:] = -100 * np.cumsum(limits)
    for label in range(12):  # '10' is before '2' by name, and behind '9' by number
        (tmp_path / "photos" / str(label + 1)).mkdir(parents=True)
        for i in (0.3, 0.7):
            grey = Image.fromarray(np.full((32, 32, 3), 255 * (label + i) / 12, np.uint8))
            grey.save(tmp_path / "photos" / str(label + 1) / f"{i}.png")
    arrays = to_torch("resnet18", traverse_util.unflatten_dict(flat, sep="/"))
    given = load.convert("resnet18", load.open_weights(safetensors(tmp_path / "w.safetensors", arrays)), head=True)
    given = given._replace(preprocessing=dataclasses.replace(given.preprocessing, size=32))
    trials, count = adopt.try_all(adopt.Adopted("resnet18", given), str(tmp_path / "photos"))
    assert (count, str(trials[0]), trials[0].accuracy) == (24, "half, classes by number", 1.0)
    by_name = next(trial for trial in trials if str(trial) == "half, classes by name")
    assert by_name.accuracy == 1 / 12 and by_name.reordered == 1.0
    assert len(trials) == 8 and all(trial.accuracy < 0.7 for trial in trials[1:])


def test_orders_that_agree_are_one():
    assert {name: ranks.tolist() for name, ranks in adopt.orders(["Cat", "dog"]).items()} == {"": [0, 1]}
    assert {name: ranks.tolist() for name, ranks in adopt.orders(["Dog", "cat"]).items()} == {
        "name": [0, 1],
        "name whatever the case": [1, 0],
    }


def test_a_certificate_says_the_accuracies_or_is_refused():
    good = [adopt.Trial("half", 0.8, 0.8), adopt.Trial("imagenet", 0.6, 0.6)]
    first, *rest = adopt.certificate(good, 200, 10)
    assert "80.0% ± 5.5%" in first and [line.split() for line in rest] == [["80.00%", "half"], ["60.00%", "imagenet"]]
    *_, last = adopt.certificate([*good, adopt.Trial("caffe", 0.79, 0.79)], 200, 10)
    assert last.strip() == "half and caffe cannot be told apart; more labelled images may do it"
    with pytest.raises(UserError, match=r"better than chance: half is the best with 12.0% of 200 images of 10"):
        adopt.certificate([adopt.Trial("half", 0.12, 0.2)], 200, 10)
    with pytest.raises(UserError, match=r"better than chance: half is the best with 70.0% of 50 images of 2 classes"):
        adopt.certificate([adopt.Trial("half", 0.7, 0.7)], 50, 2)
    assert "100.0%" in adopt.certificate([adopt.Trial("half", 1.0, 1.0)], 50, 2)[0]
    with pytest.raises(UserError, match=r"in another order imagenet has 75.0%"):
        adopt.certificate([adopt.Trial("half", 0.12, 0.2), adopt.Trial("imagenet", 0.1, 0.75)], 200, 10)
