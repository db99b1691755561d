"""A server's life: drained by SIGTERM, killed under load, in several processes, and given another model."""

import json
import pathlib
import shutil
import signal
import time

import psutil
import pytest
import requests

from tests.serve.running import Load, png, server, wait_until
from vitcls.feedback.store import open_store
from vitcls.serve import promotion


class Feedback(Load):
    """Corrects each answer, and remembers what the server has said that it keeps."""

    def ask(self, session, image):
        id = session.post(f"{self.running.url}/v1/predict", data=image).json()["predictions"][0]["id"]
        response = session.post(f"{self.running.url}/v1/feedback", data={"id": id, "label": "class 1"})
        assert response.json()["stored"]
        self.responses.append(image)


@pytest.mark.by_turns
def test_sigterm_lets_requests_end(trained, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db") as running:
        loads = [Load(running, seed=i) for i in range(4)]
        time.sleep(1)
        code, log = running.stop()
        for load in loads:
            load.join()
        assert code == 0 and "Traceback" not in log
        # An answer is never cut: what breaks is a connection that asked after the server had gone.
        for load in loads:
            assert load.responses and all(response.status_code == 200 for response in load.responses)
            assert all(isinstance(error, requests.ConnectionError) for error in load.broken)


@pytest.mark.by_turns
def test_feedback_that_was_kept_survives_kill_9(trained, tmp_path):
    database = f"sqlite:///{tmp_path}/f.db"
    kept = []
    for seed in range(2):
        with server(f"--workdir={trained}", f"--database={database}") as running:
            loads = [Feedback(running, seed=10 * seed + i) for i in range(2)]
            time.sleep(1.5)
            running.process.send_signal(signal.SIGKILL)
            for load in loads:
                load.join()
                kept += load.responses
    store = open_store(database)
    images = {store.image(row.image) for row in store.rows()}
    store.close()
    assert len(kept) > 10 and set(kept) <= images


@pytest.mark.by_turns
def test_two_processes_are_one_server(trained, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db", "--workers=2") as running:
        workers = psutil.Process(running.process.pid).children()
        assert len(workers) == 2
        for i in range(40):  # each on a connection of its own
            assert running.predict(("a.png", png(i))).status_code == 200
        assert running.metric('vitcls_requests_total{route="/v1/predict",status="200"}') == 40
        workers[0].kill()
        wait_until(lambda: len(set(psutil.Process(running.process.pid).children()) - {workers[0]}) == 2)
        running.wait()
        assert running.predict(("a.png", png())).status_code == 200
        workers = psutil.Process(running.process.pid).children()
        code, log = running.stop()
        assert code == 0 and "worker 0 has ended with exit code -9; starting another" in log
        assert not any(worker.is_running() for worker in workers)


@pytest.mark.by_turns
def test_feedback_may_meet_another_process(trained, tmp_path):
    """At once, when the receipt of the answer is in the memory of the one that gave it; nobody forges who speaks."""
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db", "--workers=2") as running:
        clients = set()
        for i in range(60):
            (answer,) = running.predict(("a.png", png(i))).json()["predictions"]
            said = requests.post(
                f"{running.url}/v1/feedback",
                data={"id": answer["id"], "label": "class 1"},
                files={"file": png(i)} if i % 6 else None,  # without the file it takes until the receipt is written
                headers={"X-Forwarded-For": f"1.2.3.{i}"},
            )
            assert said.status_code in (200, 409) if i % 6 == 0 else said.status_code == 200, said.text
            clients |= {said.json().get("client")} - {None}
        assert len(clients) == 1


def test_a_proxy_that_is_named_says_who_speaks(trained, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db", "--proxy=127.0.0.1") as running:
        (answer,) = running.predict(("a.png", png())).json()["predictions"]
        clients = {
            requests.post(
                f"{running.url}/v1/feedback",
                data={"id": answer["id"], "right": "true"},
                headers={"X-Forwarded-For": f"1.2.3.{i}"},
            ).json()["client"]
            for i in range(3)
        }
        assert len(clients) == 3


@pytest.mark.by_turns
def test_processes_end_with_the_one_that_started_them(trained, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db", "--workers=2") as running:
        workers = psutil.Process(running.process.pid).children()
        running.process.kill()
        wait_until(lambda: not any(worker.is_running() for worker in workers))


@pytest.fixture
def challenger(trained, tmp_path):
    """Another run of the same classes, whose answers are others."""
    from tests.conftest import make_tiny_config
    from vitcls.train import train_and_evaluate

    config = make_tiny_config()
    config.seed = 7
    train_and_evaluate(config, tmp_path / "challenger")
    return tmp_path / "challenger"


@pytest.mark.by_turns
@pytest.mark.usefixtures("no_pictures")
def test_a_promoted_model_is_taken_up_and_given_back_without_an_error(trained, challenger, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")

    def sha():
        return requests.get(f"{running.url}/v1/model").json()["checkpoint"]["sha256"]

    with server(f"--workdir={workdir}") as running:
        first, loads = sha(), [Load(running, seed=i) for i in range(2)]
        ids = running.predict(("a.png", png())).json()["predictions"][0]["id"]
        promotion.promote(workdir, challenger)
        wait_until(lambda: sha() != first)
        assert requests.get(f"{running.url}/v1/model").json()["since"].startswith("20")
        assert running.predict(("a.png", png())).json()["predictions"][0]["id"] != ids
        promotion.rollback(workdir)
        wait_until(lambda: sha() == first)
        assert running.predict(("a.png", png())).json()["predictions"][0]["id"] == ids
        away = (challenger / "checkpoints").rename(challenger / "away")
        promotion.promote(workdir, challenger)
        time.sleep(4)
        assert sha() == first  # what cannot be opened is not served
        away.rename(challenger / "checkpoints")  # as a disk that comes back
        wait_until(lambda: sha() != first)
        for load in loads:
            load.stop()
            assert not load.broken and {response.status_code for response in load.responses} == {200}
        code, log = running.stop()
    assert code == 0 and log.count("now served: step 12 of") == 3 and log.count("cannot be served") == 1


def test_feedback_is_of_an_answer(served):
    image = png(77)
    url = f"{served.url}/v1/feedback"
    (answer,) = served.predict(("a.png", image)).json()["predictions"]
    best = answer["top"][0]["class"]
    other = next(name for name in ("class 0", "class 1") if name != best)

    def say(image=None, **fields):
        response = requests.post(url, data=fields, files={"file": image} if image else None)
        return response.status_code, response.json()

    status, said = say(id=answer["id"], label=other)
    assert status == 200 and said["stored"] and said["label"] == other and len(said["client"]) == 16
    assert say(id=answer["id"], label=other)[1]["stored"] is False
    assert say(image, id=answer["id"], right="true")[1] == said | {"label": best}
    counts = requests.get(url).json()
    assert (counts["images"], counts["corrections"], counts["confirmations"]) == (1, 0, 1)
    assert say(id="0" * 32, label=other) == (404, {"error": "no answer has this id"})
    assert say(png(78), id=answer["id"], label=other)[0] == 422
    status, said = say(id=answer["id"], label="clas 1")
    assert status == 422 and "did you mean 'class 1'?" in said["error"]
    assert say(label=other)[0] == 400 and say(id=answer["id"])[0] == 400
    assert say(id=answer["id"], label=other, right="true")[0] == 400
    response = requests.post(url, json={"id": answer["id"], "right": True})
    assert response.status_code == 200 and response.json()["stored"] is False
    path = pathlib.Path(served.database.removeprefix("sqlite:///"))
    assert path.exists() and str(path) not in json.dumps(counts)


@pytest.mark.by_turns
def test_what_drifts_is_told(trained, tmp_path):
    """One and the same image again and again is not what the test split is like."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    with server(f"--workdir={workdir}") as running:
        wait_until(lambda: requests.get(f"{running.url}/v1/drift").json())
        drift = requests.get(f"{running.url}/v1/drift").json()
        assert drift["measured_against"]["classes"] == "24 test images" and drift["alarms"] == {}
        assert running.metric('vitcls_drift{kind="alarms_classes"}') == 0
        for _ in range(100):
            assert running.predict(*[("a.png", png(3))] * 16).status_code == 200
        drift = requests.get(f"{running.url}/v1/drift").json()
        assert drift["answers"] == 1600 and "classes" in drift["alarms"]
        assert running.metric('vitcls_drift{kind="alarms_classes"}') >= 1
        code, log = running.stop()
    assert code == 0 and "drift: classes, after" in log
