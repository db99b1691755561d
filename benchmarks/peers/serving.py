"""Other ways to put the same classifier behind HTTP: one request at a time in FastAPI, and LitServe's batches.

    python -m benchmarks.peers.serving one_by_one|litserve --workdir=DIR --port=N

Both decode and answer as `vitcls predict` does, and answer `POST /v1/predict` of {"image": base64}.
"""

import argparse
import base64
import pathlib
import sys

import numpy as np

from vitcls import predict
from vitcls.serve import model as models

_BATCH, _WINDOW = 32, 0.003  # as vitcls serve


def words(model: models.Served, probabilities: np.ndarray) -> dict:
    return {"predictions": [predict.said(probabilities, model.class_names)]}


def one_by_one(workdir: pathlib.Path, port: int) -> None:
    """A route as tutorials have it: a function in FastAPI's threads, one image at a time."""
    import uvicorn
    from fastapi import FastAPI

    model, app = models.of_workdir(workdir), FastAPI()
    model.warm_up((1,))

    @app.post("/v1/predict")
    def answer(request: dict) -> dict:
        return words(model, model.answer(model.decode(base64.b64decode(request["image"]))[None], 1).probabilities[0])

    uvicorn.run(app, port=port, log_level="error", access_log=False)


def litserve(workdir: pathlib.Path, port: int) -> None:
    """Its batches, of the same size and window; the model is in a process of its own."""
    import litserve as ls

    from benchmarks.peers.litserve_api import Classifier

    api = Classifier(workdir, max_batch_size=_BATCH, batch_timeout=_WINDOW, api_path="/v1/predict")
    ls.LitServer(api, accelerator="cpu").run(port=port, log_level="error", generate_client_file=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("one_by_one", "litserve"))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    flags = parser.parse_args()
    {"one_by_one": one_by_one, "litserve": litserve}[flags.kind](flags.workdir, flags.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
