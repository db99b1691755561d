"""The commands as a user meets them: what they print, and how they end."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vitcls import cli, config, config_file, evaluate, main, predict, unknown
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.train import train_and_evaluate
from vitcls.training import build, run_dir

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGENET = f"--config={REPOSITORY}/configs/imagenet.py"
DIGITS = f"--config={REPOSITORY}/configs/vit_digits.py"


def run(command, arguments, capsys):
    """(exit code, stdout, stderr) of a command in this process."""
    saved = sys.argv
    try:
        code = cli.run(command, arguments)
    finally:
        sys.argv = saved
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=x"], "--config=FILE is missing"),
        ([DIGITS], "--workdir=DIR is missing"),
        ([DIGITS, "--workdir=x", "--wrkdir=y"], "wrkdir"),
        ([DIGITS, "--workdir=caf\udce9"], r"the name of the workdir 'caf\xe9' is not UTF-8"),
        ([DIGITS, "--workdir=x", "extra"], "'extra' belongs to no flag"),
        (["--config=configs/nothing.py", "--workdir=x"], "configs/nothing.py"),
        ([DIGITS, "--workdir=x", "--config.batch_sise=3"], "did you mean 'batch_size'?"),
        (
            [DIGITS, "--workdir=x", "--config.model.hiden_dim=3"],
            "key of config.model 'hiden_dim' is not known; did you mean",
        ),
        ([DIGITS, "--workdir=x", "--config.optimizer.lr=1"], "key of config.optimizer 'lr' is not known. Known: accum"),
        ([DIGITS, "--workdir=x", "--config.foo=1"], "config key 'foo' is not known. Known: augment, batch_size, "),
        ([DIGITS, "--workdir=x", "--config.hidden_dim=1"], "did you mean 'model.hidden_dim'?"),
        ([DIGITS, "--workdir=x", "--config.optimiser.name=adam"], "did you mean 'optimizer.name'?"),
        ([DIGITS, "--workdir=x", "--config.batch_size=many"], "--config.batch_size=many is not a whole number"),
        ([DIGITS, "--workdir=x", "--config.optimizer.learning_rate=x"], "learning_rate=x is not a number"),
        ([DIGITS, "--config.total", "--workdir=x"], "--config.total has no value; write --config.total=VALUE"),
        ([f"{IMAGENET}:resnet5", "--workdir=x"], "model of configs/imagenet.py 'resnet5' is not known; did you mean"),
        ([DIGITS, "--workdir=x", "--config.model.depth=deep"], "config.model.depth=deep"),
        ([DIGITS, "--workdir=x", "--config.batch_size=0"], "config.batch_size=0 is impossible"),
        ([DIGITS, "--workdir=x", "--config.batch_size=130"], "cannot be divided over 8 devices"),
        ([DIGITS, "--workdir=x", "--config.optimizer.accumulate=3"], "config.optimizer.accumulate=3"),
        ([DIGITS, "--workdir=x", "--config.model.name=improved_vit_tinny"], "did you mean 'improved_vit_tiny'?"),
        ([DIGITS, "--workdir=x", "--config.model.patch_size=3"], "patch_size=3"),
        ([DIGITS, "--workdir=x", "--config.model.num_heads=5"], "num_heads"),
        ([DIGITS, "--workdir=x", "--config.model.aggregation=max"], "aggregation"),
        ([DIGITS, "--workdir=x", "--config.dataset.name=cifar1000"], "did you mean 'cifar100'?"),
        (
            [DIGITS, "--workdir=x", "--config.dataset.name=mnist", "--config.dataset.data_dir=/nowhere"],
            "vitcls prepare mnist",
        ),
        ([DIGITS, "--workdir=x", "--config.total=-3 epochs"], "config.total"),
        ([DIGITS, "--workdir=x", "--config.total=3"], "a duration needs a unit"),
        ([DIGITS, "--workdir=x", "--config.eval_every=1 epoks"], "did you mean 'epochs'?"),
        ([DIGITS, "--workdir=x", "--config.optimizer.name=adamm"], "did you mean 'adam"),
        ([DIGITS, "--workdir=x", "--config.optimizer.learning_rate=-1"], "learning_rate=-1"),
        ([DIGITS, "--workdir=x", "--config.schedule.name=cosin"], "did you mean 'cosine'?"),
        ([DIGITS, "--workdir=x", "--config.schedule.warmup=200%"], "warmup"),
        ([DIGITS, "--workdir=x", "--config.partition.strategy=fdsp"], "did you mean 'fsdp'?"),
        ([DIGITS, "--workdir=x", "--config.augment.flip.probability=2"], "config.augment.flip.probability=2"),
        ([DIGITS, "--workdir=x", "--config.checkpoint.metric=eval/acuracy"], "did you mean 'eval/accuracy'?"),
        ([DIGITS, "--workdir=x", "--config.dataset.validation=0", "--config.report.checkpoint=best"], "validation"),
        ([DIGITS, "--workdir=x", "--config.loss.class_weights=(1.0,2.0)"], "class_weights"),
        ([DIGITS, "--workdir=x", "--config.dataset.mean=(1.0,2.0)"], "config.dataset.mean has 2 values"),
        ([DIGITS, "--workdir=x", "--config.dataset.max_value=-1"], "config.dataset.max_value=-1"),
        ([DIGITS, "--workdir=x", "--config.dataset.eval_crop=0"], "config.dataset.eval_crop=0.0 is impossible"),
        ([DIGITS, "--workdir=x", "--config.dataset.eval_crop=1.1"], "config.dataset.eval_crop=1.1 is impossible"),
        *(
            (
                [DIGITS, "--workdir=x", f"--config.dataset.image_size={size}"],
                "must be 0, a number of pixels, or (height",
            )
            for size in ("-8", "8.5", "wide", "(8,)", "(8, 0)", "(8, 8, 1)", "[8, 8]", "(8, 8.0)", "()", "true")
        ),
        ([DIGITS, "--workdir=x", "--profile_steps=100"], "must be FIRST:LAST"),
        ([DIGITS, "--workdir=x", "--profile_steps=9:3"], "must be FIRST:LAST"),
        ([DIGITS, "--workdir=x", "--profile_steps=10000:10010"], "after the end of the run"),
    ],
    ids=lambda value: value[-1].removeprefix("--") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(main.main, arguments, capsys)
    complaint = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(complaint) == 1
    assert words in complaint[0]
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("raise ValueError('first\\nsecond')", "config.py, line 4, cannot be loaded: ValueError: first second"),
        ("c.augment.rotate = 0.5", "config.py, line 4, sets 'rotate' to 0.5 (float); it must be a block of keys"),
        ("with c.ignore_type(): c.augment.rotate = 0.5", "config.augment.rotate=0.5 is impossible: it is a block of "),
        ("c.augment.rotate = dict(degrees=9, share=1)", "key of config.augment.rotate 'share' is not known"),
        ("c.batchsize = 3", "config.py, line 4, sets 'batchsize', which is no key there; did you mean 'batch_size'?"),
        ("raise SystemExit('no')", "config.py, line 4, ends the program (SystemExit: no)"),
        ("return default_config('lenet6')", "did you mean 'lenet5'?"),
        ("return 1 +", "config.py cannot be loaded: SyntaxError: invalid syntax"),
    ],
)
def test_a_bad_config_file_is_one_line_without_a_traceback(lines, complaint, capsys, tmp_path):
    file = tmp_path / "config.py"
    head = "from vitcls.config import default_config\ndef get_config():\n    c = default_config('lenet5')"
    file.write_text(f"{head}\n    {lines}\n    return c\n")
    code, out, err = run(main.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert complaint in err and "Traceback" not in err and "site-packages" not in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["config.py"]


def test_a_preset_of_a_config_file_without_presets_is_one_line(capsys, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from vitcls import config\ndef get_config():\n    return config.default_config('lenet5')\n")
    code, _, err = run(main.main, [f"--config={file}:small", f"--workdir={tmp_path / 'run'}"], capsys)
    assert (code, err) == (2, f"error: {file} has no presets, so it takes no ':small'\n")


def test_overrides_change_values_and_keep_types(capsys):
    values = main.parse(
        [DIGITS, "--workdir=w", "--config.model.depth=7", "--config.dataset.mean=(0.5,)", "--config.seed=3"]
    )
    assert values.config.model.depth == 7
    assert values.config.dataset.mean == (0.5,)
    assert values.config.seed == 3
    with pytest.raises((AttributeError, KeyError)):
        values.config.new_key = 1


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("(48, 64)", (48, 64)), ("48,64", (48, 64)), ("0", 0)])
def test_an_image_size_is_one_number_or_two(text, size):
    given = main.parse([DIGITS, "--workdir=w", f"--config.dataset.image_size={text}"]).config
    assigned = config.default_config("improved_vit_tiny")
    assigned.dataset.image_size = size
    for values in (given, assigned):
        resolved = config.resolve(values)
        config.validate(resolved)
        assert config.from_json(config.to_json(resolved)).dataset.image_size == resolved.dataset.image_size == size


@pytest.mark.by_turns
def test_images_that_are_not_square_are_trained_on_evaluated_and_predicted(tiny_config, tmp_path, capsys):
    """By a folder, whose images keep their 8x12 pixels; the two classes differ at the far right alone."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 256, (8, 12), np.uint8)
            pixels[:, 9:] = 200 * k
            Image.fromarray(pixels).save(tmp_path / "folder" / name / f"{number}.png")
    tiny_config.dataset.update(name="folder", data_dir=str(tmp_path / "folder"), image_size=0)
    tiny_config.total = "40 steps"
    tiny_config.augment.crop.probability = tiny_config.augment.mixup.probability = 0.0
    tiny_config.optimizer.update(learning_rate=1e-2, ema_decay=0.0)
    run_directory = tmp_path / "run"
    trained = train_and_evaluate(tiny_config, run_directory)
    assert run_dir.open_workdir(run_directory).info.image_shape == (8, 12, 1) and trained["accuracy"] == 1
    code, _, err = run(evaluate.main, [f"--workdir={run_directory}"], capsys)
    assert code == 0, err
    files = [str(tmp_path / "folder" / name / "3.png") for name in ("dark", "light")]
    code, out, err = run(predict.main, [f"--workdir={run_directory}", "--json", *files], capsys)
    assert code == 0, err
    assert [json.loads(line)["top"][0]["class"] for line in out.splitlines()] == ["dark", "light"]


def test_a_resolved_config_survives_json(tiny_config):
    resolved = config.resolve(tiny_config)
    assert config.from_json(config.to_json(resolved)).to_dict() == resolved.to_dict()
    assert resolved.model.hidden_dim == 16
    assert resolved.model.aggregation is not None


def test_a_block_that_a_config_assigns_keeps_the_defaults_of_what_it_leaves_out(tiny_config):
    tiny_config.augment.rotate = {"probability": 0.5}
    tiny_config.schedule = config.ConfigDict({"name": "linear"})
    resolved = config.resolve(tiny_config)
    assert resolved.augment.rotate.to_dict() == {"probability": 0.5, "degrees": 15.0}
    default = config.default_config("improved_vit_tiny").schedule.to_dict()
    assert resolved.schedule.to_dict() == default | {"name": "linear"}
    assert resolved.model.hidden_dim == 16
    tiny_config.augment.rotate = {"probability": 0.5, "degres": 10.0}
    with pytest.raises(UserError, match=re.escape("rotate 'degres' is not known; did you mean 'degrees'?")):
        config.resolve(tiny_config)


def test_presets_change_values_and_not_keys():
    def keys(tree):
        return {key: keys(value) if isinstance(value, dict) else None for key, value in tree.items()}

    default = config.default_config("improved_vit_tiny").to_dict()
    for path in ("vit_digits.py", "vit_cifar100.py", "vit_cifar100.py:tiny"):
        loaded = main.parse([f"--config={REPOSITORY}/configs/{path}", "--workdir=x"]).config
        assert keys(loaded.to_dict()) == keys(default)
        config.validate(config.resolve(loaded))
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        main.parse([f"--config={REPOSITORY}/configs/vit_cifar100.py:tinny", "--workdir=x"])


@pytest.mark.by_turns
def test_evaluate_needs_nothing_but_the_workdir(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = json.loads((trained / "report" / "metrics.json").read_text())
    code, out, err = run(evaluate.main, [f"--workdir={trained}"], capsys)
    assert code == 0, err
    after = json.loads((trained / "report" / "metrics.json").read_text())
    for key in ("loss", "accuracy", "auc_ovr_macro", "ece", "parameters", "flops_per_image", "per_class"):
        assert after[key] == (before[key] if key == "per_class" else pytest.approx(before[key], rel=1e-4))
    assert str(trained / "report" / "index.html") in out
    code, out, err = run(evaluate.main, [f"--workdir={trained}", "--split=validation", "--checkpoint=8"], capsys)
    assert code == 0, err
    assert json.loads((trained / "report" / "metrics.json").read_text())["split"] == "validation"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=nowhere"], "is not the workdir of a run"),
        (["--workdir=ftp://bucket/run"], "--workdir=ftp://bucket/run cannot be used; give a directory"),
        (["--workdir={trained}", "--checkpoint=5"], "checkpoint '5' is not there"),
        (["--workdir={trained}", "--checkpoint=012"], "checkpoint '012' is not there"),
        (["--workdir={trained}", "--checkpoint=" + 5_000 * "9"], "is not there"),
        (["--workdir=" + 300 * "w"], "is not the workdir of a run"),
        (["--workdir={trained}", "--split=tset"], "--split"),
        ([], "--workdir"),
        (["--wrkdir={trained}"], "did you mean '--workdir'?"),
    ],
)
def test_evaluate_says_what_is_wrong(trained, arguments, words, capsys):
    code, _, err = run(evaluate.main, [argument.format(trained=trained) for argument in arguments], capsys)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert words in err


def test_a_name_that_is_too_long_is_one_line(capsys, tmp_path):
    name = tmp_path / (300 * "w")
    for command, arguments in ((main.main, [DIGITS]), (unknown.main, [f"--workdir={tmp_path}", f"--ood={name}"])):
        code, _, err = run(command, [*arguments, f"--workdir={name}"], capsys)
        assert code == 2 and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_predict_labels_files_and_names_those_it_cannot_read(trained, capsys, tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(good)
    page = tmp_path / "page.jpg"
    page.write_text("<html>not found</html>")
    files = [str(good), str(page), str(tmp_path / "missing.png"), str(tmp_path / (300 * "n")), str(good)]

    code, out, err = run(predict.main, [f"--workdir={trained}", "--json", *files], capsys)
    assert code == 2
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [str(good), str(good)]
    assert sum(row["probability"] for row in rows[0]["top"]) == pytest.approx(1, abs=1e-4)  # 3 classes in all
    assert [row["probability"] for row in rows[0]["top"]] == sorted(
        (r["probability"] for r in rows[0]["top"]), reverse=True
    )
    assert "page.jpg" in err and "missing.png" in err and "good.png" not in err and "n: File name too long" in err

    code, out, _ = run(predict.main, [f"--workdir={trained}", str(good)], capsys)
    assert code == 0
    assert out.splitlines()[0] == str(good)
    assert "%" in out.splitlines()[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        "compare a b",
        "export --workdir=a --format=saved_model",
        "feedback export --database=sqlite:///a.db",
        "inspect --config=configs/vit_digits.py",
        "retrain --workdir=a --feedback=sqlite:///a.db",
        "experiment --config=configs/experiments/mnist_search.py",
        "tune --config=configs/vit_digits.py --space=a",
        "worth --config=configs/vit_digits.py --weights=a",
    ],
)
def test_what_is_written_is_a_path_on_this_machine(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb, *rest = arguments.split()
    command = importlib.import_module(cli._door(cli.VERBS[verb].module)).main
    flag = "--workdir" if verb in ("experiment", "tune", "worth") else "--out"
    code, out, err = run(command, [*rest, f"{flag}=s3://runs/x"], capsys)
    assert (code, out) == (2, "")
    assert err == f"error: {flag}='s3://runs/x' is a URL; it must be a path on this machine\n"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(capsys):
    def command(argv):
        with open("/dev/full", "w") as file:
            file.write("x" * 2**20)

    code, out, err = run(command, [], capsys)
    sys.stderr.close()  # what comes after that line goes nowhere
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert "No space left on device" in err and "make room" in err


def namespaces(*flags):
    """The beginning of a command in namespaces of its own."""
    command = ["unshare", "--user", "--map-root-user", *flags]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("unshare (of util-linux) is not there, or may not make namespaces")
    return command


@pytest.mark.by_turns
def test_a_training_that_fills_its_disk_says_so_in_one_line_and_leaves_the_reason(tmp_path):
    (tmp_path / "config.py").write_text("from tests.conftest import make_tiny_config as get_config\n")
    train = [sys.executable, "-m", "vitcls.main", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/disk/run"]
    train += ["--config.total=2000 steps", "--config.checkpoint_every=2 steps", "--config.checkpoint.keep=900"]
    disk = f"mkdir {tmp_path}/disk && mount -t tmpfs -o size=600k none {tmp_path}/disk"
    script = f"{disk} && {shlex.join(train)}; echo $?; cd {tmp_path}/disk/run && ls && cat failed.json"
    command = [*namespaces("--mount"), "sh", "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    code, *names, failed = done.stdout.splitlines()
    *before, last = done.stderr.splitlines()
    assert (code, last) == ("1", "failed: [Errno 28] No space left on device; make room and run it again")
    assert not any("Error" in line or "Traceback" in line for line in before), done.stderr
    assert not any(name.startswith("lock.json") for name in names)
    assert json.loads(failed)["failure"] == "OSError: [Errno 28] No space left on device"


def test_predict_takes_a_directory_as_the_files_below_it(trained, capsys, tmp_path):
    names = ["b.png", "a/2.png", "a/1.png", ".hidden.png", ".thumbs/1.png"]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / name)
    code, out, _ = run(predict.main, [f"--workdir={trained}", "--json", str(tmp_path / "photos")], capsys)
    shown = [json.loads(line)["file"] for line in out.splitlines()]
    assert (code, shown) == (0, [str(tmp_path / "photos" / name) for name in ("a/1.png", "a/2.png", "b.png")])

    (tmp_path / "empty").mkdir()
    code, out, err = run(predict.main, [f"--workdir={trained}", str(tmp_path / "empty")], capsys)
    assert (code, out) == (2, "") and "empty holds no files" in err


def test_the_first_of_several_processes_predicts_alone(trained, capsys, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "2", "STEP_NUM_NODES": "2", "LOCALID": "0"}
    for process in ("0", "1"):
        for name, value in (slurm | {"PROCID": process}).items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        code, out, _ = run(predict.main, [f"--workdir={trained}", str(tmp_path / "black.png")], capsys)
        assert (code, bool(out)) == (0, process == "0")


def test_predict_names_links_that_it_does_not_follow(trained, capsys, tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "ok.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "linked").symlink_to(trained, target_is_directory=True)
    code, out, err = run(predict.main, [f"--workdir={trained}", "--json", str(tmp_path)], capsys)
    assert code == 2 and len(out.splitlines()) == 1 and "3 of 4 files could not be read" in err
    assert all(f"{tmp_path}/{name}: " in err for name in ("gone.png", "loop.png", "linked"))


def test_a_config_file_may_be_called_and_written_as_python_allows(tmp_path):
    text = """
from __future__ import annotations
import dataclasses
from tests.conftest import make_tiny_config

@dataclasses.dataclass
class Sizes:
    batch: int = 4

def get_config(preset=""):
    config = make_tiny_config()
    config.batch_size = Sizes().batch + len(preset)
    return config
"""
    for file in (tmp_path / "a:b" / "tiny.py", tmp_path / "tiny", tmp_path / "c:d"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        assert config_file.load(file).batch_size == 4
        assert config_file.load(f"{file}:x:y/z.py").batch_size == 4 + len("x:y/z.py")
    with pytest.raises(UserError, match=f"the config file '{tmp_path}/none.py' is not there"):
        config_file.load(f"{tmp_path}/none.py:preset")


def test_predict_moves_the_weights_to_the_device_once(trained, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(70)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    files[3].write_text("not an image")
    moved, device_put = [], jax.device_put

    def watched(tree, *arguments, **options):
        moved.append(sum(leaf.size for leaf in jax.tree.leaves(tree)))
        return device_put(tree, *arguments, **options)

    monkeypatch.setattr(jax, "device_put", watched)
    opened = run_dir.open_workdir(trained)
    rows = predict.predict(opened, files)
    outcomes = [next(rows)]
    with jax.transfer_guard_host_to_device("disallow"):  # of what is not given to device_put
        outcomes += rows
    shapes = variable_shapes(build.make_model(opened.config, opened.info), opened.info.image_shape)
    batch = 32 * (8 * 8 * 3 + 2)  # image, label, mask
    assert moved == [sum(leaf.size for leaf in jax.tree.leaves(shapes)), batch, batch, batch]
    assert [file for file, _ in outcomes] == files
    assert [i for i, (_, outcome) in enumerate(outcomes) if isinstance(outcome, str)] == [3]
    alone = dict(predict.predict(opened, [files[69]]))
    np.testing.assert_allclose(outcomes[69][1].probabilities, alone[files[69]].probabilities, rtol=1e-5)


@pytest.mark.by_turns
def test_a_report_is_timed_where_the_config_asks_for_it(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    given = json.loads((copy / "config.json").read_text())
    del given["report"]["timing"]  # as before there was such a key
    (copy / "config.json").write_text(json.dumps(given))
    results = evaluate.evaluate(copy)
    assert 0 < results["latency_ms"]["median"] <= results["latency_ms"]["p95"]
    assert results["images_per_second"] > 0
    page = (copy / "report" / "index.html").read_text(encoding="utf-8")
    assert "Latency of one image" in page and "Inference on all devices" in page
    assert "Latency of one image" not in (trained / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.by_turns
def test_predict_agrees_with_the_report(trained):
    """The same picture gives the same probabilities from a file as from the data set."""
    opened = run_dir.open_workdir(trained)
    from vitcls import data

    dataset = data.load(opened.config.dataset)
    image = Image.fromarray(dataset.test.images[0])
    path = trained.parent / "first.png"
    image.save(path)
    ((_, (probabilities, _)),) = predict.predict(opened, [path])
    model = build.make_model(opened.config, opened.info)
    variables = opened.restore_variables(model, opened.find_step("last"))
    images = (dataset.test.images[:1] / 255.0 - np.array(opened.info.mean)) / np.array(opened.info.std)
    logits = np.asarray(model.apply(variables, images.astype(np.float32), train=False))[0]
    np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-3)


def test_predict_decodes_as_the_training_did(trained, tmp_path):
    """With the white of the data set and the crop of the config, whatever the file has."""
    opened = run_dir.open_workdir(trained)
    pixels = np.random.default_rng(0).integers(0, 100, (16, 16), np.uint8)
    Image.fromarray(pixels[4:12, 4:12]).save(tmp_path / "centre.png")
    Image.fromarray(np.rint(pixels * (4095 / 255)).astype(np.uint16)).save(tmp_path / "deep.png")
    ((_, (expected, _)),) = predict.predict(opened, [tmp_path / "centre.png"])
    deep = dataclasses.replace(opened, info=dataclasses.replace(opened.info, max_value=4095.0))
    deep.config.dataset.eval_crop = 0.5
    ((_, (found, _)),) = predict.predict(deep, [tmp_path / "deep.png"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_predict_says_what_it_makes_of_a_depth_that_no_training_image_had(trained, tmp_path, caplog):
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "deep.png")
    list(predict.predict(run_dir.open_workdir(trained), [tmp_path / "deep.png"]))
    (line,) = (record.getMessage() for record in caplog.records if "8 bits" in record.getMessage())
    assert line.startswith(f"{tmp_path / 'deep.png'} has more than 8 bits, which no training image has: 65535")


def test_the_installed_script_knows_the_verbs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitcls", "evalute"])
    assert cli.main() == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["vitcls", "predict", "--workdir=nowhere", "x.png"])
    assert cli.main() == 2
    assert "nowhere is not the workdir of a run" in capsys.readouterr().err


def test_flags_that_help_does_not_tell_are_not_suggested(capsys):
    from vitcls.serve import __main__ as serve

    assert cli.run(serve.main, ["--workdir=x", "--listen_fdd=3"]) == 2
    said = capsys.readouterr().err
    assert "flag '--listen_fdd' is not known" in said and "--artefact" in said and "--listen_fd," not in said
    assert "did you mean '--listen_fd'" not in said


def test_the_help_of_training_names_every_flag(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitcls", "train", "--help"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # which python -m pytest has
    assert cli.main() == 0
    out = capsys.readouterr().out
    for action in main.make_parser()._actions:
        (line,) = [line for line in out.splitlines() if re.search(rf"^  (-h, )?{action.option_strings[-1]}( |$)", line)]
        assert action.help in line
    assert "--config.KEY=VALUE" in out and "--config.model.name=NAME" in out
    assert "usage: vitcls train " in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_command_of_a_report_can_be_given_again():
    arguments = ["train", "--config=a.py", "--workdir=my run", "--config.total=5 epochs"]
    code = f"""
import sys
import time
from vitcls.training import facts
sys.argv = ["/usr/bin/vitcls", *{arguments!r}]
print(facts.command_line())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert shlex.split(done.stdout) == ["vitcls", *arguments]


def test_parsing_leaves_the_arguments_of_the_process_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitcls", "train", DIGITS, "--workdir=x"])
    main.parse(sys.argv[2:])
    assert sys.argv == ["vitcls", "train", DIGITS, "--workdir=x"]


@pytest.mark.parametrize("module", ["vitcls.models", "vitcls.training.steps"])
def test_the_core_loads_no_heavy_library(module):
    heavy = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


def test_groups_are_read_from_a_csv_file_by_place(trained, tmp_path, capsys):
    run_directory = tmp_path / "run"
    shutil.copytree(trained, run_directory)
    count = json.loads((run_directory / "dataset.json").read_text())["num_examples"]["test"]
    file = tmp_path / "groups.csv"
    file.write_text("index,group\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(count)))
    code, out, _ = run(evaluate.main, [f"--workdir={run_directory}", f"--groups={file}"], capsys)
    assert code == 0 and "groups: " in out
    found = json.loads((run_directory / "groups" / "metrics.json").read_text())
    assert [(row["group"], row["num_examples"], row["small"]) for row in found["groups"]] == [
        ("a", count // 2, True),
        ("b", count // 2, True),
    ]
    assert "under 30 images: not ranked" in (run_directory / "groups" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "must have a head with file (or index) and group"),
        ("index,kind\n0,a\n", "must have a head with file (or index) and group"),
        ("index,group\n0,a\n", "has no group for 23 of 24 images, the first is 1; add them"),
        ("index,group\n0,a\n99,b\n", "the index '99' is none of this split's, which are 0 to 23"),
        ("index,group\n0,a\n0,b\n", "the index 0 is in two groups, a and b"),
        ("index,group\n0,\n", "has a row without a group"),
        ("file,group\na.png,a\n", "names files, but the images of this data set are none"),
        (b"index,group\n0,\xff\n", "is no CSV file in UTF-8"),
    ],
)
def test_groups_that_do_not_fit_are_one_line(trained, text, words, tmp_path, capsys):
    file = tmp_path / "groups.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = run(evaluate.main, [f"--workdir={trained}", f"--groups={file}"], capsys)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (trained / "groups").exists()


def test_ctrl_c_is_one_line():
    program = (
        "import os, signal, time\nfrom vitcls import cli\nprint('half')\n"
        "cli.run(lambda _: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60), [])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "half\n", "interrupted\n")


@pytest.mark.parametrize("module", ["vitcls.main", "vitcls", "vitcls.serve"])
def test_ctrl_c_while_it_is_loaded_is_one_line_too(module, tmp_path):
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, "-m", module, "--help"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("JAX_PLATFORMS", "foo", "error: JAX_PLATFORMS=foo cannot be used: "),
        ("JAX_NUM_CPU_DEVICES", "x", "error: the environment variable JAX_NUM_CPU_DEVICES=x is impossible; unset it"),
        ("JAX_ENABLE_X64", "x", "error: the environment variable JAX_ENABLE_X64=x is impossible; unset it"),
    ],
)
def test_what_jax_cannot_do_with_the_environment_is_one_line(name, value, line):
    command = [sys.executable, "-m", "vitcls.main", DIGITS, "--dry_run"]
    environment = os.environ | {name: value}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


def test_sigterm_ends_the_first_process_of_a_container_also_before_it_trains(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("import os, signal, sys\nos.kill(os.getpid(), signal.SIGTERM)\nsys.exit(f'{os.getpid()} lives')")
    command = [*namespaces("--pid", "--fork"), sys.executable, "-m", "vitcls.main", f"--config={file}", "--dry_run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (143, "")


def test_a_module_that_cannot_be_imported_is_one_line(capsys):
    code, _, err = run(predict.main, ["--workdir=x", "--import=nowhere", "a.png"], capsys)
    assert (code, err) == (
        2,
        "error: argument --import: nowhere cannot be imported (No module named 'nowhere'); see --help\n",
    )
