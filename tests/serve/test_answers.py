"""What a server says is what `vitcls predict` says, of each image, whatever comes beside it."""

import contextlib
import hashlib
import http.client
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jsonschema
import numpy as np
import pytest
import requests

from tests.serve.running import base64_of, png, server
from vitcls import calibrate, cli
from vitcls.feedback.store import open_store
from vitcls.serve import model
from vitcls.serve.explanations import Explain


def same(found, said):
    """Probabilities of one image in batches of other sizes differ in the last bits."""
    assert [one["class"] for one in found["top"]] == [one["class"] for one in said["top"]]
    assert [one["probability"] for one in found["top"]] == pytest.approx(
        [one["probability"] for one in said["top"]], abs=1e-5
    )


def test_answers_are_those_of_predict(served, answers):
    """In all three kinds of requests, one image or several."""
    files = [pathlib.Path(said["file"]) for said in answers[:5]]
    several = served.predict(*[(file.name, file.read_bytes()) for file in files]).json()["predictions"]
    assert [found["file"] for found in several] == [file.name for file in files]
    url, image = f"{served.url}/v1/predict", files[0].read_bytes()
    (raw,) = requests.post(url, data=image, headers={"Content-Type": "image/png"}).json()["predictions"]
    (bare,) = requests.post(url, data=image).json()["predictions"]
    (one,) = requests.post(url, json={"image": base64_of(image)}).json()["predictions"]
    many = requests.post(url, json={"images": [base64_of(file.read_bytes()) for file in files]}).json()["predictions"]
    for found, said in zip(
        [*several, *many, raw, bare, one], [*answers[:5], *answers[:5], *[answers[0]] * 3], strict=True
    ):
        same(found, said)
    assert {raw["id"], bare["id"], one["id"], several[0]["id"], many[0]["id"]} == {raw["id"]}
    assert len({found["id"] for found in several}) == 5


def test_a_bad_image_fails_alone(served, answers):
    good = pathlib.Path(answers[0]["file"]).read_bytes()
    response = served.predict(("good.png", good), ("bad.png", b"no image"), ("empty.png", b""), ("cut.png", good[:60]))
    assert response.status_code == 200
    first, *bad = response.json()["predictions"]
    same(first, answers[0])
    words = ["the file is not an image", "the file is empty", "the file cannot be decoded"]
    assert all(one["error"].startswith(said) for one, said in zip(bad, words, strict=True))
    assert [one["file"] for one in bad] == ["bad.png", "empty.png", "cut.png"]
    assert served.predict(("bad.png", b"no image")).status_code == 422
    large = served.predict(("good.png", good), ("large.png", b"x" * 11 * 2**20)).json()["predictions"]
    assert "id" in large[0] and large[1]["error"] == "the file has 11.0 MiB; at most 10 are taken"
    several = requests.post(f"{served.url}/v1/predict", json={"images": [base64_of(good), "!!!", 5, None]})
    assert ["error" in one for one in several.json()["predictions"]] == [False, True, True, True]


def load(served, answers, tmp_path, *flags):
    """What benchmarks.load counts."""
    triples = [[said["file"], said["top"][0]["class"], said["top"][0]["probability"]] for said in answers]
    file = tmp_path / "expected.json"
    file.write_text(json.dumps(triples))
    command = [sys.executable, "-m", "benchmarks.load", f"--port={served.port}", f"--expected={file}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.by_turns
def test_of_ten_thousand_concurrent_requests_no_answer_is_lost_or_swapped(served, answers, tmp_path):
    before = {size: served.metric(f'vitcls_batches_total{{batch_size="{size}"}}') for size in (1, 2, 4, 8, 16, 32)}
    found = load(served, answers, tmp_path, "--requests=10000", "--clients=200")
    assert (found["answers"], found["lost"], found["swapped"]) == (10_000, 0, 0)
    batches = {size: served.metric(f'vitcls_batches_total{{batch_size="{size}"}}') - before[size] for size in before}
    assert sum(batches.values()) < 3_000 and batches[32] > 100  # they went together
    assert sum(size * count for size, count in batches.items()) >= 10_000


def test_the_load_sees_what_is_swapped(served, answers, tmp_path):
    turned = [said | {"file": other["file"]} for said, other in zip(answers, answers[1:] + answers[:1], strict=True)]
    found = load(served, turned, tmp_path, "--requests=40", "--clients=2")
    assert found["swapped"] > 30


def test_a_client_that_goes_away_is_not_waited_for(served):
    for i in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/predict", body=png(i, size=(1500, 1500)))
        connection.close()
    assert served.predict(("a.png", png())).status_code == 200
    deadline = time.monotonic() + 10
    while served.metric("vitcls_images_waiting"):
        assert time.monotonic() < deadline


def test_what_it_says_of_itself(served, trained):
    about = requests.get(f"{served.url}/v1/model").json()
    assert about["classes"] == ["class 0", "class 1", "class 2"] and about["image_shape"] == [8, 8, 3]
    assert about["checkpoint"]["step"] == 12
    assert about["explains"] and not about["calibrated"]
    assert str(trained) not in json.dumps(about)
    assert requests.get(f"{served.url}/healthz").json() == {"alive": True}


def test_its_description_for_programs_is_what_it_does(served):
    described = requests.get(f"{served.url}/openapi.json").json()
    pytest.importorskip("openapi_spec_validator").validate(described)

    def check(path, response, method="post"):
        answers = described["paths"][path][method]["responses"]
        said = answers.get(str(response.status_code), answers["default"])["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), closed(said))
        return response.json()

    def takes(path, kind):
        return set(described["paths"][path]["post"]["requestBody"]["content"][kind]["schema"].get("properties", {}))

    for path in ("/healthz", "/readyz", "/v1/model", "/v1/feedback", "/v1/drift"):
        check(path, requests.get(served.url + path), "get")
    image, predict = base64_of(png(7)), f"{served.url}/v1/predict"
    (one,) = check("/v1/predict", requests.post(predict, files={"file": png(7)}))["predictions"]
    assert takes("/v1/predict", "application/json") == {"image", "images"}
    check("/v1/predict", requests.post(predict, json={"images": [image, "no"]}))
    assert check("/v1/predict", requests.post(predict, json={"image": "no"}))["predictions"][0]["error"]
    assert "error" in check("/v1/predict", requests.post(predict, json={}))
    assert "image/*" in described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert takes("/v1/feedback", "application/json") == {"image", "id", "right", "label"}
    words = {"id": one["id"], "right": True, "image": image}
    assert check("/v1/feedback", requests.post(f"{served.url}/v1/feedback", json=words))["label"]
    assert "error" in check("/v1/feedback", requests.post(f"{served.url}/v1/feedback", json={}))
    check("/v1/explain", requests.post(f"{served.url}/v1/explain", data=png(7)))
    with contextlib.closing(open_store(served.database)) as store:
        assert store.forget_image(hashlib.sha256(png(7)).hexdigest()) == 1


def closed(schema):
    """As it is, but that an object has no more than is named."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    return {"additionalProperties": False} | parts if "properties" in schema else parts


def test_an_explanation_has_its_evidence(served):
    response = requests.post(f"{served.url}/v1/explain?label=class 1", files={"file": png(3)})
    found = response.json()
    assert found["class"] == "class 1" and found["method"] in found["methods"] and 0 < found["p_value"] <= 1
    assert set(found["random_deletion"]) == {"value", "low", "high"}
    for query, words in (("label=4", "class '4' is not known"), ("method=no", "method 'no' is not known")):
        response = requests.post(f"{served.url}/v1/explain?{query}", files={"file": png(3)})
        assert response.status_code == 422 and words in response.json()["error"]
    assert requests.post(f"{served.url}/v1/explain", data=b"no").json() == {"error": "the file is not an image"}


def test_an_explanation_is_as_sure_as_the_calibrated_answer(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    assert cli.run(calibrate.main, [f"--workdir={run}", "--method=temperature"]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    plain, calibrated = (model.of_workdir(workdir) for workdir in (trained, run))
    sure = [one.answer([pixels], 1).probabilities.max() for one in (plain, calibrated)]
    assert Explain(calibrated)(pixels)["probability"] == pytest.approx(sure[1]) != pytest.approx(sure[0], rel=1e-3)


@pytest.mark.by_turns
@pytest.mark.parametrize(("format", "name"), [("stablehlo", "run.zip"), ("saved_model", "run")])
def test_an_exported_program_is_served_as_its_run(trained, answers, tmp_path, format, name):
    from vitcls.export.__main__ import export

    file = tmp_path / name
    export(trained, format, file)
    with server(f"--artefact={file}") as running:
        assert requests.get(f"{running.url}/v1/model").json()["explains"] is False
        for said in answers[:3]:
            image = pathlib.Path(said["file"])
            same(running.predict((image.name, image.read_bytes())).json()["predictions"][0], said)
        assert requests.post(f"{running.url}/v1/explain", files={"file": png()}).status_code == 501
