"""The whole of it: a class that was mislabelled in training is served, corrected by users, retrained and promoted."""

import shutil

import requests

from tests.retrain.test_retrain import NEW, retrain, right, served  # noqa: F401 (a fixture: the run and its photos)
from tests.serve.running import server
from tests.serve.test_life import Load, wait_until


def answers(running, photos):
    """The class of each photo, and the id of the answer."""
    found = [running.predict((photo.name, photo.read_bytes())).json()["predictions"][0] for photo in photos]
    return [one["top"][0]["class"] for one in found], [one["id"] for one in found]


def test_the_same_photos_are_right_after_fifty_corrections(served, tmp_path, no_pictures):  # noqa: F811
    root = shutil.copytree(served, tmp_path, dirs_exist_ok=True)
    photos = sorted(root.glob("*.png"))
    with server(f"--workdir={root}/run") as running:

        def version():
            return requests.get(f"{running.url}/v1/model").json()["checkpoint"]["sha256"]

        load, first = Load(running), version()
        before, ids = answers(running, photos)
        assert len(photos) == 50 and before.count("4") <= 2
        for photo, id in zip(photos, ids, strict=True):
            with photo.open("rb") as file:
                said = requests.post(f"{running.url}/v1/feedback", data={"id": id, "label": "4"}, files={"file": file})
            assert said.json()["stored"]
        flags = ("--weight=20", "--total=200 steps", "--config.optimizer.learning_rate=2e-3")
        assert retrain(root, *flags, database=root / "run" / "feedback.db") == 0
        wait_until(lambda: version() != first)
        after, _ = answers(running, photos)
        assert after.count("4") >= 47 and after[:NEW].count("4") >= NEW - 2  # of photos that were in no training
        was_right, is_right = right(root / "run"), right(root / "run2")
        assert is_right.sum() > was_right.sum() + 20
        load.stop()
        assert not load.broken and {response.status_code for response in load.responses} == {200}
        assert len(load.responses) > 100
        code, log = running.stop()
    assert code == 0 and "Traceback" not in log
