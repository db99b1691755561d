"""vitcls export: what a file answers by itself, what it carries, and that one with other answers is not written."""

import json
import signal
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest

from tests.conftest import make_tiny_config
from vitcls import cli, config, models, train
from vitcls.export import __main__ as export
from vitcls.export import artefact, compress, make, program
from vitcls.export.source import open_source
from vitcls.metrics.scaling import Isotonic, Temperature, Vector
from vitcls.models.variables import init_variables
from vitcls.models.weights.from_torch import from_torch
from vitcls.models.weights.safetensors import read_safetensors
from vitcls.training.opened import open_with_data

ALONE = """
import json, sys, zipfile
import jax, numpy as np
from jax import export
archive = zipfile.ZipFile(sys.argv[1])
program = export.deserialize(bytearray(archive.read("program.stablehlo")))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([program.call(images[:3]), program.call(images[3:])]))
assert "vitcls" not in sys.modules
"""


def call(arguments, capsys):
    capsys.readouterr()
    code = cli.run(export.main, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def exported(calibrated, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "run.zip"
    assert cli.run(export.main, [f"--workdir={calibrated}", "--format=stablehlo", f"--out={path}"]) == 0
    return path


@pytest.mark.by_turns("exported")
def test_a_program_answers_without_vitcls_as_the_run_does(calibrated, exported, tmp_path):
    """In a process that has jax alone, in batches of two sizes; calibrated, as `vitcls predict` is."""
    opened = open_with_data(calibrated, splits=("test",))
    _, probabilities = opened.predictions("test")
    scale = open_source(calibrated).scale
    assert isinstance(scale, Vector)
    np.save(tmp_path / "images.npy", opened.dataset.test.images)
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, tmp_path / "alone.py", exported, tmp_path / "images.npy", tmp_path / "answers.npy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), scale(probabilities), atol=3e-4)
    loaded = artefact.load(str(exported))
    np.testing.assert_allclose(loaded.answer(opened.dataset.test.images[:2]), scale(probabilities)[:2], atol=3e-4)
    with pytest.raises(ValueError, match="they must be uint8"):
        loaded.answer(opened.dataset.test.images[:2].astype(np.float32))


@pytest.mark.by_turns("exported")
def test_a_program_is_for_all_platforms_and_says_what_it_is(calibrated, exported):
    with zipfile.ZipFile(exported) as archive:
        about = json.loads(archive.read("about.json"))
        found = jax.export.deserialize(bytearray(archive.read("program.stablehlo")))
    assert set(found.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    opened = open_with_data(calibrated, splits=("test",))
    report = json.loads((calibrated / "report" / "metrics.json").read_text())
    assert about["classes"] == list(opened.trained.info.class_names)
    assert about["calibration"] == "vector" and about["checkpoint"]["step"] == opened.step
    assert len(about["checkpoint"]["sha256"]) == 64 and about["metrics"]["accuracy"] == report["accuracy"]
    assert about["config"]["model"]["name"] == opened.trained.config.model.name


@pytest.mark.parametrize(
    "scale",
    [
        None,
        Temperature(1.7),
        Vector((0.5, 1.5, 1.0), (0.1, -0.2, 0.0)),
        Vector((0.5, -0.1, 0.0), (0.1, -0.2, 0.0)),
        Isotonic(((0.0, 0.5, 1.0),) * 3, ((0.1, 0.4, 0.9), (0.05, 0.5, 0.8), (0.2, 0.3, 0.7))),
        Isotonic(((0.1, 0.3, 0.3 + 1e-12, 0.8), (0.2,), (0.4, 0.5)), ((0.1, 0.2, 0.6, 0.9), (0.3,), (0.2, 0.7))),
    ],
    ids=["none", "temperature", "vector", "vector that turns", "isotonic", "isotonic with a jump"],
)
def test_calibrations_are_those_of_numpy(scale):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3) * 0.3, 50).astype(np.float32)
    probabilities[0] = 1, 0, 1e-40
    expected = probabilities if scale is None else scale(probabilities)
    np.testing.assert_allclose(program._calibrate(scale)(probabilities), expected, atol=2e-6)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    made, base = config.default_config("resnet18"), make_tiny_config()
    for key in ("batch_size", "log_every", "eval_every", "checkpoint_every", "steps_per_call"):
        made[key] = base[key]
    made.total = "4 steps"
    made.dataset.update(name="synthetic", num_examples=120, num_classes=3, image_size=8)
    made.model.update(depths=(1, 1), width=8, stem="small")
    made.report.timing = False
    path = tmp_path_factory.mktemp("resnet") / "run"
    train.train_and_evaluate(made, path)
    return path


@pytest.mark.by_turns("resnet")
def test_weights_go_out_by_pytorchs_names_to_the_bit(resnet, tmp_path, capsys):
    out = tmp_path / "resnet.safetensors"
    code, said, err = call([f"--workdir={resnet}", "--format=safetensors", f"--out={out}"], capsys)
    assert code == 0 and "of the run" in said, err
    assert "weights of resnet18 with depths=(1, 1), stem=small, width=8; build PyTorch's network alike" in err
    arrays, metadata = read_safetensors(str(out))
    assert ("conv1.weight" in arrays and json.loads(metadata["classes"]) == ["0", "1", "2"]) or metadata["classes"]
    opened = open_with_data(resnet, splits=("test",))
    fields = {key: value for key, value in opened.trained.config.model.items() if key != "name"}
    found = from_torch("resnet18", arrays, num_classes=3, image_shape=(8, 8, 3), **fields)
    ours = opened.partition.to_host(opened.variables)
    jax.tree.map(np.testing.assert_array_equal, found, {key: ours[key] for key in found})


@pytest.mark.by_turns
def test_the_table_says_why_a_format_is_not_for_a_run(trained, capsys):
    code, said, _ = call([f"--workdir={trained}", "--table"], capsys)
    head, *rows = said.splitlines()
    assert code == 0 and head.split("  ")[0] == "format" and head.endswith("ms, batch of 32")
    whole = [row for row in rows if len(row) == len(head)]
    measured = {tuple(row.split()[:2]) for row in whole}
    assert {("stablehlo", each) for each in compress.PRECISIONS} <= measured  # aligned, and each with its figures
    assert rows[-1].split()[:2] == ["safetensors", "float32"] and "no name for" in rows[-1]


@pytest.mark.by_turns("resnet")
def test_a_file_that_answers_otherwise_is_not_written(resnet, tmp_path, capsys, monkeypatch):
    """One weight is changed on its way out."""

    def spoiled(name, variables, **fields):
        arrays = to_torch(name, variables, **fields)
        arrays["fc.weight"] = -arrays["fc.weight"]
        return arrays

    to_torch = make.to_torch
    monkeypatch.setattr(make, "to_torch", spoiled)
    out = tmp_path / "resnet.safetensors"
    code, _, err = call([f"--workdir={resnet}", "--format=safetensors", f"--out={out}"], capsys)
    assert code == 1 and "answers otherwise than the run, and is not written" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_export_leaves_nothing_beside_the_file_of_before(trained, tmp_path, number, code):
    out = tmp_path / "run.zip"
    out.write_bytes(b"before")
    command = [sys.executable, "-m", "vitcls.export", f"--workdir={trained}", "--format=stablehlo", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) == 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"before"


def test_what_cannot_be_is_one_line(trained, tmp_path, capsys):
    run = f"--workdir={trained}"
    (tmp_path / "other.zip").write_bytes(b"no zip")
    for arguments, expected in (
        ([run], "give --format and --out"),
        ([run, "--format=stablehlo"], "give --format and --out"),
        ([run, "--format=pickle", "--out=a.pkl"], "invalid choice"),
        ([run, "--format=tflite", "--quantize=bfloat16", f"--out={tmp_path / 'a.tflite'}"], "it has float16, int8"),
        ([run, "--format=saved_model", f"--out={tmp_path / 'other.zip'}"], "no SavedModel"),
        ([run, "--format=stablehlo", "--prune=1", f"--out={tmp_path / 'a.zip'}"], "at least 0 and below 1"),
        ([run, "--table", "--quantize=int8"], "--table has every precision"),
        ([run, "--format=stablehlo", f"--out={tmp_path / 'a.txt'}"], "must end in .zip"),
        ([run, "--format=stablehlo", f"--out={tmp_path / 'none' / 'a.zip'}"], "there is no directory"),
        ([f"--workdir={tmp_path}", "--format=stablehlo", f"--out={tmp_path / 'a.zip'}"], "not the workdir of a run"),
        ([run, "--table", f"--out={tmp_path / 'a.zip'}"], "--table alone"),
    ):
        code, _, err = call(arguments, capsys)
        assert code == 2 and len(err.splitlines()) == 1 and expected in err, err
    assert {path.name for path in tmp_path.iterdir()} == {"other.zip"}
    for name in ("other.zip", "none.zip"):
        with pytest.raises(ValueError, match="is no exported program"):
            artefact.load(str(tmp_path / name))


FAMILIES = {
    "airbench94": (32, {}),
    "convnext_tiny": (32, {"depths": (1, 1), "widths": (8, 16)}),
    "densenet121": (32, {"depths": (1, 1), "growth_rate": 4}),
    "efficientnet_b0": (32, {}),
    "improved_resnext50": (32, {"depths": (1, 1), "width": 8}),
    "improved_vit_tiny": (16, {"depth": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 16}),
    "lenet5": (28, {}),
    "mobilenet_v2": (32, {}),
    "resnetv2_50x1_bit": (32, {"depths": (1, 1), "width": 8}),
    "vgg11": (32, {"stem": "small", "head_width": 16}),
    "vit_tiny_patch4": (16, {"depth": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_becomes_a_program_for_batches_of_any_size(name):
    size, fields = FAMILIES[name]
    model = models.create(name, 3, **fields)
    variables = init_variables(model, jax.random.key(0), (size, size, 3))

    def answer(images):
        return jax.nn.softmax(model.apply(variables, images / 255.0, train=False))

    found = jax.export.deserialize(bytearray(program.compiled(answer, (size, size, 3))))
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), np.uint8)
    for count in (1, 5):
        np.testing.assert_allclose(found.call(images[:count]), answer(images[:count]), atol=1e-5)
