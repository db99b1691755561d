"""Formats of other runtimes: any batch, what they carry, smaller weights, and which block is named where one is off."""

import json
import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import make_tiny_config
from vitcls import cli, config, models, train
from vitcls.export import __main__ as export
from vitcls.export import artefact, compress, make, onnx, program, tflite
from vitcls.export.source import open_source
from vitcls.metrics.scaling import Isotonic, Temperature, Vector
from vitcls.models.variables import init_variables
from vitcls.training.opened import open_with_data

NEEDS = {"tflite": "ai_edge_litert", "onnx": "jax2onnx"}
# What a user without vitcls writes: images.npy -> answers.npy, in two batches of different sizes.
ALONE = {
    "saved_model": """
import tensorflow as tf
serve = tf.saved_model.load(path).signatures["serving_default"]
answer = lambda images: serve(images=tf.constant(images))["probabilities"].numpy()
""",
    "tflite": """
from ai_edge_litert.interpreter import Interpreter
model = Interpreter(model_path=path)
def answer(images):
    model.resize_tensor_input(model.get_input_details()[0]["index"], images.shape)
    model.allocate_tensors()
    model.set_tensor(model.get_input_details()[0]["index"], images)
    model.invoke()
    return model.get_tensor(model.get_output_details()[0]["index"])
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
answer = lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
""",
}


def call(arguments, capsys):
    capsys.readouterr()
    code = cli.run(export.main, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def written(format, workdir, folder, capsys):
    """The file of a run in float32, and what the command said."""
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])
    out = folder / f"run{make.FORMATS[format].ending}"
    code, said, err = call([f"--workdir={workdir}", f"--format={format}", f"--out={out}"], capsys)
    assert code == 0 and "of the run" in said, err
    return out, said, err


def like_tiny(model, **dataset):
    """The config of `trained` with another model, for four steps."""
    made, base = config.default_config(model), make_tiny_config()
    for key in ("batch_size", "log_every", "eval_every", "checkpoint_every", "steps_per_call"):
        made[key] = base[key]
    made.total = "4 steps"
    made.dataset.update(name="synthetic", num_examples=120, num_classes=3, **dataset)
    made.report.timing = False
    return made


def about_of(path, format):
    if format == "saved_model":
        return json.loads((path / "assets.extra" / "about.json").read_text())
    if format == "tflite":
        with zipfile.ZipFile(path) as archive:
            assert archive.read("labels.txt").decode().splitlines() == ["class 0", "class 1", "class 2"]
            return json.loads(archive.read("about.json"))
    import onnx as library

    (entry,) = library.load(path).metadata_props
    return json.loads(entry.value)


@pytest.mark.by_turns
@pytest.mark.parametrize("format", ALONE)
def test_a_file_answers_in_its_own_runtime_as_the_run_does(format, calibrated, tmp_path, capsys):
    """In a process without vitcls, in batches of two sizes, calibrated; and it says what it is."""
    out, _, err = written(format, calibrated, tmp_path, capsys)
    assert err.splitlines() == [
        f"converting to {format}, float32",
        "trying it on 24 test images in a process of its own",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    expected = open_source(calibrated).expected(open_source(calibrated).scale)
    np.save(tmp_path / "images.npy", expected.images)
    script = f"""
import sys, numpy as np
path, images = sys.argv[1], np.load(sys.argv[2])
{ALONE[format]}
np.save(sys.argv[3], np.concatenate([answer(images[:3]), answer(images[3:])]))
assert "vitcls" not in sys.modules
"""
    command = [sys.executable, "-c", script, out, tmp_path / "images.npy", tmp_path / "answers.npy"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), expected.of_run, atol=3e-4)
    about = about_of(out, format)
    assert about["calibration"] == "vector" and about["classes"] == ["class 0", "class 1", "class 2"]
    assert len(about["checkpoint"]["sha256"]) == 64 and about["config"]["model"]["name"] == "improved_vit_tiny"
    np.testing.assert_allclose(artefact.load(str(out)).answer(expected.images[:2]), expected.of_run[:2], atol=3e-4)


@pytest.mark.by_turns
def test_a_saved_model_takes_the_place_of_an_older_one(trained, tmp_path, capsys):
    arguments = [f"--workdir={trained}", "--format=saved_model", f"--out={tmp_path / '1'}"]
    assert call(arguments, capsys)[0] == 0
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    assert call(arguments, capsys)[0] == 0 and (tmp_path / "1" / "saved_model.pb").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_int8_is_255_steps_of_each_output_channel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32) * np.array([1, 10, 0.1, 3, 0])
    found = compress.quantize(kernel.astype(np.float32))
    assert found.values.dtype == np.int8 and found.scale.shape == (5,)
    back = np.asarray(compress.restore({"kernel": found})["kernel"])
    assert (np.abs(back - kernel) <= np.abs(kernel).max(axis=(0, 1, 2), keepdims=True) / 254 + 1e-6).all()
    assert abs(found.values[..., :4]).max(axis=(0, 1, 2)).tolist() == [127] * 4 and not found.values[..., 4].any()


def test_only_weights_are_rounded():
    variables = {
        "params": {"layer": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}},
        "batch_stats": {"norm": {"mean": np.ones(3, np.float32)}},
    }
    for precision in ("float16", "bfloat16"):
        found = compress.round_weights(variables, precision)
        assert found["params"]["layer"]["kernel"].dtype == precision
        assert found["params"]["layer"]["bias"].dtype == found["batch_stats"]["norm"]["mean"].dtype == np.float32
    variables["params"]["layer"]["kernel"][0, 0] = 1e5
    with pytest.raises(ValueError, match="layer/kernel has weights too large for float16"):
        compress.round_weights(variables, "float16")


@pytest.mark.by_turns
@pytest.mark.parametrize("format", make.FORMATS)
def test_int8_is_smaller_and_calibrated_on_training_images(format, trained, tmp_path, capsys):
    if format == "safetensors":
        pytest.skip("weights as PyTorch loads them are floats")
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])
    run, out = f"--workdir={trained}", tmp_path / f"run{make.FORMATS[format].ending}"
    code, said, err = call([run, f"--format={format}", "--quantize=int8", f"--out={out}"], capsys)
    assert code == 0 and "accuracy" in said, err
    about = artefact.load(str(out)).about
    assert about["weights"] == "int8"
    assert about["activations"] == ("int8" if format in NEEDS else "float32")
    source = open_source(trained)
    rows = {image.tobytes() for image in source.opened.dataset.train.images}
    assert {image.tobytes() for image in source.calibration_images} <= rows
    assert not {image.tobytes() for image in source.expected(None).images} & rows


@pytest.mark.parametrize("format", NEEDS)
def test_calibrations_are_inside(format, tmp_path):
    pytest.importorskip(NEEDS[format])
    writer, place = {"tflite": tflite, "onnx": onnx}[format], tmp_path / f"file{make.FORMATS[format].ending}"
    lines = ((0.0, 0.5, 1.0),) * 3, ((0.1, 0.4, 0.9), (0.05, 0.5, 0.8), (0.2, 0.3, 0.7))
    scales = (Temperature(1.7), Vector((0.5, 1.5, 1.0), (0.1, -0.2, 0.0)), Isotonic(*lines))

    def probabilities(images):
        return jax.nn.softmax(images.astype(jnp.float32).mean(axis=(1, 2)) / 64, axis=-1)

    def answer(images):
        return jnp.concatenate([program._calibrate(scale)(probabilities(images)) for scale in scales], axis=1)

    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), np.uint8)
    writer.write(answer, (2, 3, 3), {"classes": ["a"], "image_shape": [2, 3, 3]}, place)
    found, given = artefact.load(str(place)).answer(images), np.asarray(probabilities(images))
    np.testing.assert_allclose(found, np.concatenate([scale(given) for scale in scales], axis=1), atol=1e-5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Of a family that every format has."""
    path = tmp_path_factory.mktemp("vit") / "run"
    made = like_tiny("vit_tiny_patch4", image_size=8)
    made.model.update(depth=2, hidden_dim=16, num_heads=2, mlp_dim=24)
    train.train_and_evaluate(made, path)
    return path


@pytest.fixture(scope="module")
def in_forms_of_its_device(tmp_path_factory):
    """Of layers in bfloat16, and convolutions in forms that depend on the size of the batch."""
    path = tmp_path_factory.mktemp("forms") / "run"
    made = make_tiny_config()
    made.update(total="4 steps")
    made.model.update(dtype="bfloat16", grouped_conv="cpu")
    train.train_and_evaluate(made, path)
    return path


@pytest.mark.by_turns
@pytest.mark.parametrize("format", ALONE)
def test_forms_and_types_of_a_device_stay_behind(format, in_forms_of_its_device, tmp_path, capsys):
    out, said, _ = written(format, in_forms_of_its_device, tmp_path, capsys)
    opened = open_with_data(in_forms_of_its_device, splits=("test",))
    found = artefact.load(str(out)).answer(opened.dataset.test.images)
    np.testing.assert_allclose(found, opened.predictions("test")[1], atol=0.01)
    about = about_of(out, format)
    whole = format in ("tflite", "onnx")
    assert about["activations"] == ("float32" if whole else "bfloat16")
    assert about["config"]["model"]["dtype"] == "bfloat16"  # of the run
    if whole:
        assert float(said.partition("differ by at most ")[2].partition(",")[0]) > 1e-5  # from the run, not from itself


def spoil(path, weights, factor=-3):
    """Multiplies `weights`, in whatever layout a file or directory has them."""
    if path.suffix == ".zip":  # which has checksums
        with zipfile.ZipFile(path) as archive:
            program, about = (archive.read(name) for name in ("program.stablehlo", "about.json"))
        path.write_bytes(artefact.pack_program(changed(program, weights, factor), json.loads(about)))
        return
    for file in filter(pathlib.Path.is_file, path.rglob("*") if path.is_dir() else [path]):
        file.write_bytes(changed(file.read_bytes(), weights, factor))


def changed(content, weights, factor):
    for layout in (weights, weights.T):
        spoiled = (layout * factor).astype(layout.dtype)
        content = content.replace(layout.tobytes(), spoiled.tobytes())
    return content


@pytest.mark.by_turns("vit")
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("format", make.FORMATS)
def test_the_first_block_that_differs_is_named(format, precision, vit, tmp_path, capsys, monkeypatch):
    """The weights of one are spoiled in the bytes that the format's writer has written."""
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])
    params, whole = open_source(vit).variables["params"], make.FORMATS[format]
    weights = params["block_1"]["feed_forward"]["expand"]["kernel"].astype(precision)

    def write(job, answer, place):
        whole.write(job, answer, place)
        spoil(place, weights)

    monkeypatch.setitem(make.FORMATS, format, whole._replace(write=write))
    out = tmp_path / f"run{whole.ending}"
    arguments = [f"--workdir={vit}", f"--format={format}", f"--out={out}"]
    code, _, err = call([*arguments, f"--quantize={precision}"][: 3 + (precision != "float32")], capsys)
    *before, last = err.splitlines()
    assert code == 1 and last.startswith("failed: ") and "the first block that differs is 'block_1'" in last, err
    assert len(before) == 2 + (format == "safetensors"), err  # of which a line says which network PyTorch needs
    assert not list(tmp_path.iterdir())


@pytest.mark.by_turns("vit")
def test_rounding_excuses_no_fault(vit, tmp_path, capsys, monkeypatch):
    """A file of bfloat16 answers as JAX does with the same weights: closer than rounding them has changed them."""
    arguments = [f"--workdir={vit}", "--format=stablehlo", "--quantize=bfloat16", f"--out={tmp_path / 'run.zip'}"]
    assert call(arguments, capsys)[0] == 0
    expected, given = open_source(vit).expected(None, "bfloat16"), artefact.load(str(tmp_path / "run.zip")).answer
    by_rounding = np.abs(expected.of_rounded - expected.of_network).max()
    assert np.abs(given(expected.images) - expected.of_rounded).max() < 1e-5 < by_rounding

    head, write = open_source(vit).variables["params"]["head"]["kernel"].astype(jnp.bfloat16), make._stablehlo

    def spoiled(job, answer, place):
        write(job, answer, place)
        spoil(place, head, factor=1.03125)

    monkeypatch.setitem(make.FORMATS, "stablehlo", make.FORMATS["stablehlo"]._replace(write=spoiled))
    (tmp_path / "run.zip").unlink()
    code, _, err = call(arguments, capsys)
    assert code == 1 and "the first block that differs is 'head'" in err and not list(tmp_path.iterdir()), err


@pytest.mark.by_turns
def test_lenet_becomes_onnx_with_its_frame(tmp_path, capsys):
    """Images of 28 pixels, which it pads by their edges."""
    pytest.importorskip("jax2onnx")
    train.train_and_evaluate(like_tiny("lenet5", image_size=28), tmp_path / "run")
    out = tmp_path / "lenet.onnx"
    code, said, err = call([f"--workdir={tmp_path / 'run'}", "--format=onnx", f"--out={out}"], capsys)
    assert code == 0 and "of the run" in said, err
    expected = open_source(tmp_path / "run").expected(None)
    np.testing.assert_allclose(artefact.load(str(out)).answer(expected.images), expected.of_run, atol=1e-5)


@pytest.mark.by_turns
def test_pruning_sets_the_smallest_of_each_kernel_to_zero(trained, tmp_path, capsys):
    out = tmp_path / "run.zip"
    code, said, err = call([f"--workdir={trained}", "--format=stablehlo", "--prune=0.5", f"--out={out}"], capsys)
    assert code == 0 and "of the run" in said, err
    source, whole = open_source(trained, prune=0.5), open_source(trained).variables["params"]
    kept = source.variables["params"]["block_0"]["feed_forward"]["expand"]["kernel"]
    kernel = whole["block_0"]["feed_forward"]["expand"]["kernel"]
    smallest = np.argsort(np.abs(kernel).ravel())[: kernel.size // 2]
    expected = kernel.copy().ravel()
    expected[smallest] = 0
    np.testing.assert_array_equal(kept, expected.reshape(kernel.shape))
    np.testing.assert_array_equal(source.variables["params"]["norm"]["scale"], whole["norm"]["scale"])
    expected = source.expected(None)
    found = artefact.load(str(out))
    np.testing.assert_allclose(found.answer(expected.images), expected.of_network, atol=3e-4)
    assert np.abs(expected.of_network - expected.of_run).max() > 1e-3 and found.about["pruned"] == 0.5


WHOLE = {"improved_vit_small": 32, "improved_resnext50": 32, "resnet50": 64, "mobilenet_v2": 64}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tflite", "onnx"])
@pytest.mark.parametrize("name", WHOLE)
def test_networks_of_full_size_are_a_quarter_in_int8(name, format, tmp_path):
    """With random weights: the logits, less their mean, point where those of the float program do."""
    pytest.importorskip(NEEDS[format])
    size, writer = WHOLE[name], {"tflite": tflite, "onnx": onnx}[format]
    model = models.create(name, 100)
    variables = init_variables(model, jax.random.key(0), (size, size, 3))
    images = np.random.default_rng(0).integers(0, 256, (24, size // 8, size // 8, 3), np.uint8)
    images = images.repeat(8, axis=1).repeat(8, axis=2)  # patches of one colour, which differ more than noise does

    def answer(images):
        return model.apply(variables, images.astype(jnp.float32) / 64 - 2, train=False)

    expected, places = np.asarray(jax.jit(answer)(images[:8])), {}
    for precision in ("float32", "int8"):
        places[precision] = tmp_path / f"{precision}{make.FORMATS[format].ending}"
        about = {"classes": ["a"], "image_shape": [size, size, 3]}
        writer.write(answer, (size, size, 3), about, places[precision], precision=precision, calibration=images[8:])
    float32, int8 = (artefact.load(str(place)).answer(images[:8]) for place in places.values())
    np.testing.assert_allclose(float32, expected, atol=1e-3 * np.abs(expected).max())
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (float32, int8)]
    cosine = np.sum(centred[0] * centred[1]) / np.prod([np.linalg.norm(each) for each in centred])
    ratio = artefact.size(places["int8"]) / artefact.size(places["float32"])
    print(
        f"{name} {format}: {artefact.size(places['float32']) / 1e6:.2f} MB, int8 {ratio:.3f} of it, cosine {cosine:.5f}"
    )
    assert cosine > 0.95 and ratio < 0.3
