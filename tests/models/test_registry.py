import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vitcls import models

# name -> parameters with 1000 classes at the native size; the number of torchvision, timm or Keras where they have the
# model. Running statistics and auxiliary classifiers are not counted.
PARAMETERS = {
    "airbench94": 2_226_944,
    "improved_vit_tiny": 7_032_328,
    "improved_vit_small": 27_445_288,
    "improved_vit_base": 108_416_104,
    "vit_tiny_patch4": 5_553_832,
    "vit_tiny_patch16": 5_717_416,
    "vit_tiny_patch32": 6_131_560,
    "vit_small_patch4": 21_723_496,
    "vit_small_patch16": 22_050_664,
    "vit_small_patch32": 22_878_952,
    "vit_base_patch4": 85_913_320,
    "vit_base_patch16": 86_567_656,
    "vit_base_patch32": 88_224_232,
    "vit_large_patch4": 303_454_184,
    "vit_large_patch16": 304_326_632,
    "vit_large_patch32": 306_535_400,
    "alexnet": 61_100_840,
    "alexnet_2012": 60_965_224,
    "convnext_base": 88_591_464,
    "convnext_small": 50_223_688,
    "convnext_tiny": 28_589_128,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_lite0": 4_652_008,
    "googlenet": 6_624_904,
    "improved_resnext50": 25_318_699,
    "improved_resnext50_lite": 15_465_770,
    "inception_v3": 23_834_568,
    "lenet5": 145_856,
    "mnist_cnn": 549_352,
    "mnist_cnn_enhanced": 690_344,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "paper_cnn": 25_838_632,
    "paper_cnn_enhanced": 25_979_688,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnetv2_101x1_bit": 44_541_480,
    "resnetv2_101x3_bit": 387_934_888,
    "resnetv2_152x2_bit": 236_335_208,
    "resnetv2_152x4_bit": 936_533_224,
    "resnetv2_50x1_bit": 25_549_352,
    "resnetv2_50x3_bit": 217_319_080,
    "resnext101_32x8d": 88_791_336,
    "resnext29_8x64d": 35_441_448,
    "resnext50_32x4d": 25_028_904,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}


def test_every_model_has_a_pinned_parameter_count():
    assert set(models.names()) == set(PARAMETERS)
    assert models.names() == sorted(models.names())


@pytest.mark.by_turns
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert count(name, 1000) == PARAMETERS[name]


def count(name, num_classes):
    form = {"grouped_conv": "xla"} if "grouped_conv" in models.fields(name) else {}  # traced the faster
    model = models.create(name, num_classes, **form)
    images = jnp.zeros((1, *models.preset(name).image_shape))
    variables = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def test_small_networks_have_the_counts_of_their_papers():
    assert count("lenet5", 10) == 61_706
    # Table II of Nimma & Uddagiri, with 200,704 x 128 + 128 for the dense layer.
    assert count("paper_cnn", 10) == 896 + 18_496 + 25_690_240 + 1_290


def test_create_takes_the_preset_and_what_replaces_it():
    model = models.create("improved_vit_tiny", 7, depth=3, hidden_dim=None)
    assert (model.num_classes, model.depth, model.hidden_dim, model.local_conv) == (7, 3, 192, True)
    assert models.create("vit_base_patch16", 7).local_conv is False


def test_unknown_names_are_answered_with_the_nearest_known():
    with pytest.raises(
        ValueError, match=r"model.name 'improved_vit_tny' is not known; did you mean 'improved_vit_tiny'"
    ):
        models.create("improved_vit_tny", 10)
    with pytest.raises(ValueError, match="field of improved_vit_tiny 'dept' is not known; did you mean 'depth'"):
        models.create("improved_vit_tiny", 10, dept=3)
    with pytest.raises(ValueError, match=r"config.model.name 'lenet' is not known"):
        models.field_placeholders("lenet")


@pytest.mark.parametrize("name", models.names())
def test_fields_are_what_create_builds_and_survive_json(name):
    fields = models.fields(name)
    assert not {"num_classes", "parent", "name"} & set(fields)
    built = models.create(name, 10)
    assert fields == {field: getattr(built, field) for field in fields}
    read = json.loads(json.dumps(fields))
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in read.items()} == fields


@pytest.mark.parametrize("name", models.names())
def test_placeholders_are_empty_and_take_their_type_only(name):
    fields = models.fields(name)
    config = ConfigDict(models.field_placeholders(name))
    assert set(config) == set(fields)
    assert all(value is None for value in config.values())
    for field, value in fields.items():
        config[field] = value
        with pytest.raises(TypeError):
            config[field] = {"not": "a value"}
    assert config.to_dict() == fields


def test_models_stand_on_jax_and_flax_alone():
    heavy = ("tensorflow", "tensorflow_datasets", "orbax.checkpoint", "matplotlib", "sklearn")
    program = f"import sys, vitcls.models; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
