"""The whole way of a user with published weights and a folder of photos, in commands."""

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


def test_weights_of_no_model_are_refused(tmp_path):
    file = load.open_weights(safetensors(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="holds the weights of no model here"):
        adopt.identify(file)


def test_a_certificate_says_the_accuracies_or_is_refused():
    good = [adopt.Trial("half", 0.8, 0.8), adopt.Trial("imagenet", 0.6, 0.6)]
    first, *rest = adopt.certificate(good, 200, 10)
    assert "80.0% ± 5.5%" in first and [line.split() for line in rest] == [["80.00%", "half"], ["60.00%", "imagenet"]]
    *_, last = adopt.certificate([*good, adopt.Trial("caffe", 0.79, 0.79)], 200, 10)
    assert last.strip() == "half and caffe cannot be told apart; more labelled images may do it"
    with pytest.raises(UserError, match=r"better than chance: half is the best with 12.0% of 200 images of 10"):
        adopt.certificate([adopt.Trial("half", 0.12, 0.2)], 200, 10)
    with pytest.raises(UserError, match=r"in another order imagenet has 75.0%"):
        adopt.certificate([adopt.Trial("half", 0.12, 0.2), adopt.Trial("imagenet", 0.1, 0.75)], 200, 10)
