"""A class that was mislabelled in training, corrected by users, retrained, promoted: with a server and without."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import requests
from flax.traverse_util import flatten_dict
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import binomtest

from tests.serve.running import Load, server, wait_until
from vitcls import cli, predict
from vitcls.calibrate import calibrate
from vitcls.config import default_config
from vitcls.data import corrections
from vitcls.feedback.store import Correction, open_store
from vitcls.metrics.significance import mcnemar_exact_one_sided
from vitcls.retrain.__main__ import main
from vitcls.retrain.collect import is_held_out
from vitcls.retrain.verdict import ALPHA, Verdict
from vitcls.serve.promotion import current, promote
from vitcls.train import train_and_evaluate
from vitcls.training import build, novelty, run_dir
from vitcls.training.opened import open_with_data
from vitcls.unknown import unknown

NEW, IN_TRAINING = 30, 20  # photos of fours that users show


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def make_digits():
    """Real digits, of which nearly all training images of a four are labelled nine, and photos of fours.

    Returns the arrays of an npz file, and 50 images of fours, 20 of which are in it as nines.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = np.uint8(digits.images * 255 / 16)[order, ..., None]
    labels = digits.target[order].astype(np.int32)
    test, rest = np.arange(360), np.arange(360, len(labels))
    fours = rest[labels[rest] == 4]
    train, shown = labels.copy(), fours[: NEW + IN_TRAINING]
    train[fours[:-10]] = 9
    kept = np.setdiff1d(rest, fours[:NEW])
    arrays = {"x_train": images[kept], "y_train": train[kept], "x_test": images[test], "y_test": labels[test]}
    return arrays, images[shown]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run on those digits, and its photos as files."""
    root = tmp_path_factory.mktemp("served")
    arrays, photos = make_digits()
    np.savez(root / "digits.npz", **arrays)
    for i, photo in enumerate(photos):
        (root / f"{i:02}.png").write_bytes(encoded(photo))
    config = default_config("improved_vit_tiny")
    config.batch_size, config.total, config.steps_per_call = 64, "300 steps", 10
    config.eval_every = config.checkpoint_every = "100 steps"
    config.dataset.update(name="npz", data_dir=str(root / "digits.npz"))
    config.model.update(stem="patch", patch_size=2, hidden_dim=32, depth=2, num_heads=4, mlp_dim=64)
    config.optimizer.update(name="adam", learning_rate=4e-3)
    config.schedule.warmup = "5%"
    config.report.timing = False
    train_and_evaluate(config, root / "run")
    calibrate(root / "run")
    return root


@pytest.fixture
def loop(served, tmp_path):
    """A copy of the run and its photos, and a database."""
    shutil.copytree(served, tmp_path, dirs_exist_ok=True)
    url = f"sqlite:///{tmp_path}/feedback.db"
    yield tmp_path, open_store(url)


def answers(root, run):
    files = sorted(root.glob("*.png"))
    opened = run_dir.open_workdir(run)
    return [opened.info.class_names[guess.probabilities.argmax()] for _, guess in predict.predict(opened, files)]


def correct(store, root, said, label="4"):
    for file, predicted in zip(sorted(root.glob("*.png")), said, strict=True):
        store.add(Correction(file.read_bytes(), "answer", "weights", predicted, 0.9, label, "ann"))


def retrain(root, *flags, database="feedback.db"):
    url = f"sqlite:///{root / database}"
    out = [] if any(flag.startswith("--out") for flag in flags) else [f"--out={root}/run2"]
    return cli.run(main, [f"--workdir={root}/run", f"--feedback={url}", *out, "--total=100 steps", *flags])


def right(run, arrays):
    """Which test images are right as the run is served."""
    classify = predict.make_classifier(run_dir.open_workdir(run))
    return classify(arrays["x_test"]).argmax(axis=1) == arrays["y_test"]


def weights(run):
    opened = run_dir.open_workdir(run)
    _, variables = opened.restore(build.make_model(opened.config, opened.info), "last")
    return flatten_dict(variables)


@pytest.mark.by_turns
def test_the_whole_loop(loop, capsys, no_pictures):
    root, store = loop
    said = answers(root, root / "run")
    assert said.count("4") <= 2
    correct(store, root, said)
    assert retrain(root, "--weight=20", "--total=200 steps", "--config.optimizer.learning_rate=2e-3") == 0
    now = answers(root, current(root / "run"))
    assert current(root / "run") == root / "run2" and now.count("4") >= 47
    with np.load(root / "digits.npz") as arrays:
        before, after = right(root / "run", arrays), right(root / "run2", arrays)
    lost, won = np.count_nonzero(before & ~after), np.count_nonzero(after & ~before)
    found = json.loads((root / "run2" / "report" / "retraining.json").read_text())
    assert (found["test_lost"], found["test_won"], found["test_challenger"]) == (lost, won, after.sum())
    assert found["p_worse"] >= ALPHA and found["promoted"] and won > 20
    by_file = dict(zip(sorted(path.stem for path in root.glob("*.png")), now, strict=True))
    uploads = {hashlib.sha256(path.read_bytes()).hexdigest(): by_file[path.stem] for path in root.glob("*.png")}
    held_out = list((root / "run2" / "corrections" / "held_out").rglob("*.png"))
    assert found["held_out_images"] == len(held_out) and found["held_out_champion"] < found["held_out_challenger"]
    assert found["held_out_challenger"] == sum(uploads[path.stem] == "4" for path in held_out)  # what is served
    assert found["words"] in capsys.readouterr().out and found["words"].endswith("It is promoted.")

    record = json.loads((root / "run2" / "corrections" / "corrections.json").read_text())
    replaced = sum(map(len, record["replaced"].values()))
    assert replaced == IN_TRAINING  # in training and validation together
    info, old = (run_dir.open_workdir(root / name).info for name in ("run2", "run"))
    train = old.num_examples["train"] - len(record["replaced"]["train"]) + 20 * record["images"]["train"]
    assert info.num_examples["train"] == train and info.num_examples["test"] == old.num_examples["test"]

    calibrated = json.loads((root / "run2" / "calibrate" / "metrics.json").read_text())  # as the served run is
    assert calibrated["method"] == "temperature"  # no other leaves all answers as they are

    store.add(Correction(encoded(np.full((8, 8, 1), 99, np.uint8)), "a", "m", "1", 0.5, "2", "eve"))
    assert retrain(root, f"--out={root}/run3", "--total=1 steps") == 0  # from what is served now
    second, third = (run_dir.open_workdir(root / name) for name in ("run2", "run3"))
    assert third.config.init.weights == str(root / "run2") and third.info.num_examples["train"] >= train
    assert third.config.optimizer.learning_rate == second.config.optimizer.learning_rate
    assert not third.config.dataset.corrections.startswith(str(root / "run2"))

    promote(root / "run", root / "run3")
    capsys.readouterr()
    assert retrain(root) == 2  # it would be compared with what is served no more
    assert f"{root}/run3 is served for {root}/run by now" in capsys.readouterr().err
    for _ in range(2):
        assert cli.run(main, [f"--workdir={root}/run", "--rollback"]) == 0
    assert current(root / "run") == root / "run"
    assert retrain(root) == 2 and "was promoted" in capsys.readouterr().err
    assert current(root / "run") == root / "run"


@pytest.mark.by_turns
def test_the_threshold_of_the_unknown_is_found_again(loop, no_pictures, monkeypatch):
    """Of the new weights, by the score and the strangers of before, from anywhere; 95 % of validation is known."""
    root, store = loop
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 8, 8, 1), np.uint8)
    labels = np.arange(40, dtype=np.int32) % 2
    np.savez(root / "noise.npz", x_train=noise[0], y_train=labels, x_test=noise[1], y_test=labels)
    monkeypatch.chdir(root)
    unknown(root / "run", ["noise.npz"], score="energy")
    monkeypatch.chdir("/")
    correct(store, root, answers(root, root / "run"))
    assert retrain(root, "--total=20 steps") == 0
    before, after = (novelty.read(root / name) for name in ("run", "run2"))
    opened = open_with_data(root / "run2", splits=("validation",))
    assert after.checkpoint_step == opened.step == 20 != before.checkpoint_step
    assert after.name == before.name == "energy" and after.threshold != before.threshold
    logits = opened.outputs(opened.dataset.validation).logits.astype(np.float64)
    energy = np.log(np.exp(logits).sum(axis=1))
    known = np.mean(energy >= after.threshold)
    assert 0.95 <= known < 0.95 + 2 / len(energy)
    judge = predict.make_judge(run_dir.open_workdir(root / "run2"))
    assert judge(noise[1][:8]).dtype == bool  # it is used: a threshold of another checkpoint would not be


@pytest.mark.by_turns
def test_it_goes_on_to_the_same_bits_wherever_it_is(loop, no_pictures):
    """Also where feedback has come since, and the run has moved."""
    root, store = loop
    correct(store, root, answers(root, root / "run"))
    flags = ("--config.checkpoint_every=20 steps", "--config.checkpoint.keep=9")
    assert retrain(root, *flags) == 0
    want = weights(root / "run2")
    assert answers(root, root / "run2").count("4") >= 40  # what calibration, on labels with errors, must not undo
    for step in (60, 80, 100):
        shutil.rmtree(root / "run2" / "checkpoints" / str(step))
    store.add(Correction(encoded(np.full((8, 8, 1), 99, np.uint8)), "a", "m", "1", 0.5, "2", "eve"))
    shutil.move(root / "run2", root / "moved")
    assert retrain(root, *flags, f"--out={root}/moved") == 0
    got = weights(root / "moved")
    assert len(got) > 10 and all(np.array_equal(got[path], want[path]) for path in want | got)


def test_a_start_that_failed_leaves_no_old_feedback(loop, no_pictures):
    """What was forgotten since is in no training; a folder that is not ours stays."""
    root, store = loop
    correct(store, root, answers(root, root / "run"))
    for flag in ("--weight=-1", "--weight=0", "--total=soon"):
        assert retrain(root, flag) == 2 and not (root / "run2").exists()
    assert retrain(root, "--config.batch_size=63") == 2 and (root / "run2" / "corrections").exists()
    photo = hashlib.sha256((root / "00.png").read_bytes()).hexdigest()
    store.forget_image(photo)
    assert retrain(root, "--total=1 steps") == 0
    kept = {path.stem for path in (root / "run2" / "corrections").rglob("*.png")}
    assert len(kept) > 40 and photo not in kept
    theirs = root / "theirs" / "corrections" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    assert retrain(root, "--total=1 steps", f"--out={root}/theirs") == 2
    assert theirs.read_text() == "mine"


def test_a_challenger_that_is_no_better_is_not_served(loop, capsys, no_pictures):
    root, store = loop
    correct(store, root, answers(root, root / "run"), label="0")  # wrong: nothing to be learned in a step
    assert retrain(root, "--total=1 steps") == 0
    assert "It is not promoted." in capsys.readouterr().out
    assert current(root / "run") == root / "run"


def test_test_images_neither_train_nor_judge(loop, no_pictures, capsys):
    root, store = loop
    with np.load(root / "digits.npz") as arrays:
        tested = encoded(arrays["x_test"][0])
    correct(store, root, ["9"] * (NEW + IN_TRAINING))
    for content, label in ((tested, "3"), (b"no image", "3"), (encoded(np.zeros((8, 8, 1), np.uint8)), "eleven")):
        store.add(Correction(content, "a", "m", "1", 0.5, label, "eve"))
    assert retrain(root, "--total=1 steps") == 0
    record = json.loads((root / "run2" / "corrections" / "corrections.json").read_text())
    left = {why: len(images) for why, images in record["left_out"].items()}
    assert left == {"even votes": 0, "other classes": 1, "unreadable": 1, "test images": 1}
    names = [path.stem for path in (root / "run2" / "corrections").rglob("*.png")]
    assert record["left_out"]["test images"][0] not in names and len(names) == NEW + IN_TRAINING
    parts = {path.stem: path.parts[-3] for path in (root / "run2" / "corrections").rglob("*.png")}
    assert all((part == corrections.HELD_OUT) == is_held_out(name) for name, part in parts.items())
    assert "left out (test images)" in capsys.readouterr().err


def test_files_of_one_picture_are_one_image(loop, no_pictures):
    """Held out or not together, and without a label where they differ; what judges leaves the training split."""
    root, store = loop
    files = sorted(root.glob("*.png"))
    correct(store, root, ["9"] * len(files))
    others = {}
    for file in files:
        note = PngInfo()
        note.add_text("note", "sent once more")
        buffer = io.BytesIO()
        Image.open(file).save(buffer, "PNG", pnginfo=note)
        others[file] = buffer.getvalue()
        store.add(Correction(others[file], "a", "m", "1", 0.5, "4" if file != files[3] else "9", "eve"))
    assert retrain(root, "--total=1 steps") == 0
    record = json.loads((root / "run2" / "corrections" / "corrections.json").read_text())
    names = {path.stem: path.parts[-3] for path in (root / "run2" / "corrections").rglob("*.png")}
    assert len(names) == len(files) - 1 and len(record["left_out"]["even votes"]) == 2
    for file, other in others.items():
        pair = [hashlib.sha256(content).hexdigest() for content in (file.read_bytes(), other)]
        if file != files[3]:
            (kept,) = names.keys() & set(pair)
            assert (names[kept] == corrections.HELD_OUT) == any(map(is_held_out, pair))
    before, after = (run_dir.open_workdir(root / name).info.num_examples["train"] for name in ("run", "run2"))
    replaced = len(record["replaced"]["train"])
    assert after == before - replaced + 10 * record["images"]["train"]


def test_what_is_wrong_is_one_line(loop, capsys):
    root, store = loop

    def said(*flags):
        assert retrain(root, *flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "collect more" in said()
    assert not (root / "run2").exists() or not list((root / "run2").iterdir())
    assert "retrain has not begun" in said(f"--out={root}/run")
    assert "did you mean 'optimizer.name'" in said("--config.optimiser.name=x")
    store.add(Correction(b"x", "a", "m", "1", 0.5, "2", "eve"))
    assert "collect more" in said()
    assert cli.run(main, [f"--workdir={root}/run"]) == 2
    assert "--rollback" in capsys.readouterr().err
    assert cli.run(main, [f"--workdir={root}/run", "--rollback"]) == 2
    assert "nothing to go back to" in capsys.readouterr().err


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (0, 5), (12, 3), (40, 31)])
def test_p_is_that_of_the_binomial_test(lost, won):
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert mcnemar_exact_one_sided(lost, won) == pytest.approx(expected, rel=1e-12)


def test_worse_on_the_test_split_is_not_promoted():
    best = Verdict("a", "b", 100, 90, 85, 5, 0, mcnemar_exact_one_sided(5, 0), 10, 0, 10)
    assert best.p_worse < ALPHA and not best.promoted
    assert Verdict("a", "b", 100, 90, 86, 4, 0, mcnemar_exact_one_sided(4, 0), 10, 0, 10).promoted
    assert not Verdict("a", "b", 100, 90, 90, 0, 0, 1.0, 10, 5, 5).promoted


def test_photos_in_a_folder_by_the_streaming_pipeline(tmp_path, tiny_config, no_pictures):
    """Also where the data have moved."""
    rng = np.random.default_rng(0)
    photos = {name: rng.integers(0, 256, (40, 8, 8, 1), np.uint8) for name in ("cat", "dog")}
    for name, images in photos.items():
        for i, image in enumerate(images):
            path = tmp_path / "photos" / ("test" if i < 8 else "train") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
    tiny_config.total = "2 steps"
    tiny_config.dataset.update(name="folder", data_dir=str(tmp_path / "photos"), pipeline="streaming")
    train_and_evaluate(tiny_config, tmp_path / "run")
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    store = open_store(f"sqlite:///{tmp_path}/feedback.db")
    for image in photos["cat"][:30]:  # of which 8 are in the test split
        store.add(Correction(encoded(image), "answer", "weights", "cat", 0.9, "dog", "ann"))
    assert retrain(tmp_path, "--total=2 steps", f"--data_dir={tmp_path}/moved") == 0
    record = json.loads((tmp_path / "run2" / "corrections" / "corrections.json").read_text())
    assert sum(map(len, record["replaced"].values())) == 22 and len(record["left_out"]["test images"]) == 8
    assert run_dir.open_workdir(tmp_path / "run2").config.dataset.data_dir == str(tmp_path / "moved")


def answers_over_http(running, photos):
    """The class of each photo, and the id of the answer."""
    found = [running.predict((photo.name, photo.read_bytes())).json()["predictions"][0] for photo in photos]
    return [one["top"][0]["class"] for one in found], [one["id"] for one in found]


def test_the_same_photos_are_right_after_fifty_corrections(served, tmp_path, no_pictures):
    root = shutil.copytree(served, tmp_path, dirs_exist_ok=True)
    photos = sorted(root.glob("*.png"))
    with server(f"--workdir={root}/run") as running:

        def version():
            return requests.get(f"{running.url}/v1/model").json()["checkpoint"]["sha256"]

        load, first = Load(running, pause=0.03), version()  # beside a training in this process
        before, ids = answers_over_http(running, photos)
        assert len(photos) == 50 and before.count("4") <= 2
        for photo, id in zip(photos, ids, strict=True):
            with photo.open("rb") as file:
                said = requests.post(f"{running.url}/v1/feedback", data={"id": id, "label": "4"}, files={"file": file})
            assert said.json()["stored"]
        flags = ("--weight=20", "--total=200 steps", "--config.optimizer.learning_rate=2e-3")
        assert retrain(root, *flags, database=root / "run" / "feedback.db") == 0
        wait_until(lambda: version() != first)
        after, _ = answers_over_http(running, photos)
        assert after.count("4") >= 47 and after[:NEW].count("4") >= NEW - 2  # of photos that were in no training
        with np.load(root / "digits.npz") as arrays:
            was_right, is_right = right(root / "run", arrays), right(root / "run2", arrays)
        assert is_right.sum() > was_right.sum() + 20
        load.stop()
        assert not load.broken and {response.status_code for response in load.responses} == {200}
        assert len(load.responses) > 100
        code, log = running.stop()
    assert code == 0 and "Traceback" not in log
