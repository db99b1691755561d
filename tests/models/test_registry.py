import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vitcls import models
from vitcls.errors import UserError

# name -> (native image size, parameters with 1000 classes). The plain ViTs at 224 are those of timm and torchvision.
PARAMETERS = {
    "improved_vit_tiny": (32, 7_032_328),
    "improved_vit_small": (32, 27_445_288),
    "improved_vit_base": (32, 108_416_104),
    "vit_tiny_patch4": (32, 5_553_832),
    "vit_tiny_patch16": (224, 5_717_416),
    "vit_tiny_patch32": (224, 6_131_560),
    "vit_small_patch4": (32, 21_723_496),
    "vit_small_patch16": (224, 22_050_664),
    "vit_small_patch32": (224, 22_878_952),
    "vit_base_patch4": (32, 85_913_320),
    "vit_base_patch16": (224, 86_567_656),
    "vit_base_patch32": (224, 88_224_232),
    "vit_large_patch4": (32, 303_454_184),
    "vit_large_patch16": (224, 304_326_632),
    "vit_large_patch32": (224, 306_535_400),
}


def test_every_model_has_a_pinned_parameter_count():
    assert set(models.names()) == set(PARAMETERS)
    assert models.names() == sorted(models.names())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    size, parameters = PARAMETERS[name]
    model = models.create(name, 1000)
    images = jnp.zeros((1, size, size, 3))
    variables = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == parameters


def test_create_takes_the_preset_and_what_replaces_it():
    model = models.create("improved_vit_tiny", 7, depth=3, hidden_dim=None)
    assert (model.num_classes, model.depth, model.hidden_dim, model.local_conv) == (7, 3, 192, True)
    assert models.create("vit_base_patch16", 7).local_conv is False


def test_unknown_names_are_answered_with_the_nearest_known():
    with pytest.raises(UserError, match="model 'improved_vit_tny' is not known; did you mean 'improved_vit_tiny'"):
        models.create("improved_vit_tny", 10)
    with pytest.raises(UserError, match="field of improved_vit_tiny 'dept' is not known; did you mean 'depth'"):
        models.create("improved_vit_tiny", 10, dept=3)
    with pytest.raises(UserError, match="field of improved_vit_tiny 'axis_name' is not known"):
        models.create("improved_vit_tiny", 10, axis_name="data")
    with pytest.raises(UserError, match="model 'lenet' is not known"):
        models.field_placeholders("lenet")


@pytest.mark.parametrize("name", models.names())
def test_fields_are_what_create_builds_and_survive_json(name):
    fields = models.fields(name)
    assert not {"num_classes", "axis_name", "parent", "name"} & set(fields)
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
