"""The Python interface, as its page shows it."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import vitcls
from vitcls.core.errors import UserError


def test_a_run_is_all_that_its_workdir_holds(trained, tmp_path):
    run = vitcls.open_run(trained)
    assert run.class_names == ("class 0", "class 1", "class 2") and run.image_shape == (8, 8, 3)
    assert run.config.model.hidden_dim == 16 and repr(run).endswith("run': improved_vit_tiny on synthetic)")
    assert run.metrics == json.loads((trained / "report" / "metrics.json").read_text())
    assert run.history[-1]["step"] == 12
    images = np.random.default_rng(0).integers(0, 256, (35, 8, 8, 3), np.uint8)
    probabilities = run.predict(images)
    assert (probabilities.shape, probabilities.dtype) == ((35, 3), np.float32)
    mean, std = (np.array(getattr(run._opened.info, name), np.float32) for name in ("mean", "std"))
    inputs = (images / np.float32(255) - mean) / std
    logits = jax.jit(lambda v, x: run.model.apply(v, x, train=False))(run.variables, inputs)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)

    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    np.testing.assert_allclose(run.predict(paths), probabilities[:3], rtol=1e-5)
    large = images[:2].repeat(3, 1).repeat(3, 2)
    np.testing.assert_allclose(run.predict(large), probabilities[:2], atol=0.05)
    assert run.predict(images[:0]).shape == run.predict([]).shape == (0, 3)
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(UserError, match=r"page.png is an HTML page; 1 of 2 files could not be read"):
        run.predict([paths[0], tmp_path / "page.png"])
    for wrong in (images / 255, images[..., :1], images[0]):
        with pytest.raises(UserError, match=r"they must be uint8 \[N, H, W, 3\], or paths"):
            run.predict(wrong)
    with pytest.raises(UserError, match="is not the workdir of a run"):
        vitcls.open_run(tmp_path)
    first = vitcls.open_run(trained, checkpoint="8").variables
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(run.variables), strict=True))


def test_models_by_name():
    assert vitcls.list_models("improved_vit*") == ["improved_vit_base", "improved_vit_small", "improved_vit_tiny"]
    assert "resnet50" in vitcls.list_models()
    assert vitcls.create_model("improved_vit_small", num_classes=10).num_classes == 10
    assert vitcls.create_model("lenet5", widths=(4, 4, 4)).num_classes == 10
    with pytest.raises(UserError, match="did you mean 'lenet5'"):
        vitcls.create_model("lenet6")
    with pytest.raises(AttributeError, match="has no attribute 'open'; it has Run, create_model"):
        vitcls.open  # noqa: B018


def test_the_package_itself_imports_nothing():
    code = """
import sys, vitcls
print(sorted(name for name in sys.modules if name in ('jax', 'flax', 'numpy')), dir(vitcls)[-7:])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "train_and_evaluate" in done.stdout
