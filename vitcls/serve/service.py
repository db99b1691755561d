"""What the routes do: predictions, feedback, explanations, and taking up another model."""

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vitcls import predict
from vitcls.core import errors
from vitcls.data import images as image_files
from vitcls.data.images import BadImage
from vitcls.feedback.store import Correction, Quota, Store
from vitcls.serve import explanations, receipts
from vitcls.serve.batcher import SIZES, Answer, Batcher, Busy
from vitcls.serve.bodies import Body, Upload
from vitcls.serve.drift import KINDS, Drift
from vitcls.serve.gauges import Gauges
from vitcls.serve.limits import Limits, Refused
from vitcls.serve.model import Served
from vitcls.serve.receipts import Receipt, Receipts

_RECENT_BYTES = 64 * 2**20  # of files that feedback may name by an id alone
_SMALL = 2**14  # pixels of an image that is decoded at once, if its file is small too
_LOOK = 2.0  # seconds between two looks at what is to be served
_LONGEST_PAUSE = 60.0  # before what could not be loaded is tried again
_logger = logging.getLogger("vitcls")


class Source(NamedTuple):
    """What is to be served."""

    name: str  # a workdir or a file
    since: str | None = None  # when it was promoted, or what was promoted was withdrawn (ISO 8601, UTC)


class _Unfit(errors.UserError):
    """A model that cannot take the place of the one that is served, however often it is tried."""


class Service:
    """A model behind its routes; all state belongs to the event loop."""

    def __init__(
        self,
        source: Callable[[], Source],
        load: Callable[[str], Served],
        drift: Callable[[str, Served], Drift],
        *,
        store: Store,
        kept: Receipts,
        limits: Limits,
    ):
        """`source` says what is to be served now, and is asked again and again; `load` opens it, `drift` watches it."""
        self._source_now, self._load, self._make_drift = source, load, drift
        self._store, self._receipts, self.limits = store, kept, limits
        self._drift: Drift | None = None  # not yet, while its reference is measured
        self.gauges = Gauges()
        self.draining, self.started = False, asyncio.Event()
        self._batcher: Batcher | None = None
        self._source = Source("")
        self._decoders = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")
        self._side = concurrent.futures.ThreadPoolExecutor(4, "side")  # databases, models that are loaded, explanations
        self._explaining = asyncio.Lock()
        self._explainer: tuple[Served, explanations.Explain] | None = None
        self._recent = _Recent(_RECENT_BYTES)

    # Models.

    @property
    def ready(self) -> bool:
        return self._batcher is not None and not self.draining

    @property
    def batcher(self) -> Batcher:
        """Raises Refused until the model is compiled."""
        if self._batcher is None:
            raise Refused(503, "the model is being loaded; try again soon", {"Retry-After": "5"})
        return self._batcher

    async def run(self) -> None:
        """Loads and compiles, then answers batches and takes up what is promoted, until it is cancelled."""
        self._source = self._source_now()
        model = await self._compiled(self._source)
        self._batcher = Batcher(model, capacity=self.limits.waiting, observe=self.gauges.batch)
        self.gauges.model(model.version)
        self.started.set()
        _logger.info("ready: %s, step %d", model.about["model"], model.about["checkpoint"]["step"])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._batcher.run())
            tasks.create_task(self._follow())
            tasks.create_task(self._watch(model))

    async def _compiled(self, source: Source) -> Served:
        def load() -> Served:
            model = self._load(source.name)
            model.warm_up(SIZES)
            return model

        return await self._aside(load)

    async def _watch(self, model: Served) -> None:
        """Begins to watch what is asked of a model."""
        self._drift = None
        try:
            drift = await self._aside(self._make_drift, self._source.name, model)
        except Exception as error:  # a server without it is better than none
            _logger.warning("drift is not watched: %s", " ".join(str(error).split()))
            return
        if self.batcher.model is model:
            self._drift = drift

    async def _follow(self) -> None:
        """Takes up another model as soon as it is compiled; requests go on meanwhile, each batch with one model."""
        failed, pause, again, warned = None, 0.0, 0.0, ""
        while True:
            await asyncio.sleep(_LOOK)
            try:
                source = await self._aside(self._source_now)
                if source != failed:
                    failed, pause, again = None, _LOOK, 0.0
                if source == self._source or time.monotonic() < again:
                    continue
                failed, pause, again = source, min(2 * pause, _LONGEST_PAUSE), time.monotonic() + pause
                await self._take_up(source)
                failed, warned = None, ""
            except Exception as error:  # what is served goes on
                if isinstance(error, _Unfit):
                    again = math.inf
                warning = " ".join(str(error).split())
                if warning != warned:
                    _logger.warning("what was promoted cannot be served: %s", warning)
                warned = warning

    async def _take_up(self, source: Source) -> None:
        model, before = await self._compiled(source), self.batcher.model
        if (model.image_shape, model.decoding) != (before.image_shape, before.decoding):
            raise _Unfit(f"{source.name} wants images of {model.image_shape}, not {before.image_shape}")
        self.batcher.model, self._source = model, source
        self.gauges.model(model.version, before.version)
        _logger.info("now served: step %d of %s", model.about["checkpoint"]["step"], source.name)
        await self._watch(model)

    async def _aside(self, call: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._side, call, *arguments)

    # Predictions.

    async def predict(self, uploads: list[Upload]) -> list[dict[str, Any]]:
        """What `vitcls predict --json` says of each file, with an id; or why it is no image. Raises Refused."""
        try:
            with self.batcher.room(len(uploads)):
                self.gauges.waiting(self.batcher.admitted)
                if len(uploads) == 1:
                    return [await self._predict_one(uploads[0])]
                return await asyncio.gather(*map(self._predict_one, uploads))
        except Busy:
            raise Refused(503, "too many images are waiting; try again soon", {"Retry-After": "1"}) from None
        finally:
            self.gauges.waiting(self.batcher.admitted)

    async def _predict_one(self, upload: Upload) -> dict[str, Any]:
        named = {"file": upload.name} if upload.name else {}
        try:
            answer, receipt = await self._answer(upload)
        except BadImage as error:
            self.gauges.bad_image()
            return named | {"error": f"the file {error}"}
        self._receipts.add(receipt)
        self._recent.put(receipt.id, upload.data)
        if self._drift is not None:
            self._drift.observe(answer.best, receipt.probability, answer.unknown, answer.distance)
        unknown = {} if answer.unknown is None else {"unknown": answer.unknown}
        return named | {"id": receipt.id} | predict.said(answer.probabilities, answer.model.class_names) | unknown

    async def _answer(self, upload: Upload) -> tuple[Answer, Receipt]:
        batcher = self.batcher
        model = batcher.model
        if len(upload.data) <= image_files.WORTH_A_THREAD and self._pixels(upload) <= _SMALL:
            image, digest = _decode(model, upload.data)  # here: the way to a thread and back takes longer
        else:
            loop = asyncio.get_running_loop()
            image, digest = await loop.run_in_executor(self._decoders, self._decoded, model, upload)
        answer = await batcher.answer(image)
        return answer, receipts.make(answer, digest)

    def _decoded(self, model: Served, upload: Upload) -> tuple[np.ndarray, str]:
        """The image and the SHA-256 of a file; raises BadImage."""
        self._pixels(upload)
        return _decode(model, upload.data)

    def _pixels(self, upload: Upload) -> int:
        """How many a file claims; raises BadImage."""
        if upload.refused:
            raise BadImage(upload.refused)
        width, height, _ = image_files.examine(upload.data, self.limits.pixels)
        return width * height

    # Feedback.

    async def feedback(self, body: Body, address: str) -> dict[str, Any]:
        """Stores what somebody at an address says of an answer, once; raises Refused."""
        client = self._receipts.client(address)
        id, label = body.fields.get("id"), body.fields.get("label")
        right = body.fields.get("right") in (True, "true")
        if not isinstance(id, str) or right == isinstance(label, str):
            raise Refused(400, "feedback has the id of an answer, and either right=true or its right label as text")
        receipt = await self._receipt(id, body.uploads)
        label = receipt.predicted if right else label
        names = self.batcher.model.class_names
        if label not in names:
            raise Refused(422, str(errors.unknown("class", label, names)))
        correction = Correction(
            await self._image_of(receipt, body.uploads),
            receipt.id,
            receipt.model,
            receipt.predicted,
            receipt.probability,
            label,
            client,
        )
        try:
            new = await self._aside(self._store.add, correction)
        except Quota as error:
            raise Refused(429, str(error), {"Retry-After": "3600"}) from None
        if new:
            self.gauges.feedback(label == receipt.predicted)
            if self._drift is not None and receipt.model == self.batcher.model.version:
                self._drift.feedback(label == receipt.predicted)
        return {"stored": new, "label": label, "client": client}

    async def _receipt(self, id: str, uploads: list[Upload]) -> Receipt:
        """That of an answer; one that another process has just given may not be written yet, but can be made again."""
        if not id.isascii():  # half characters could not be looked up
            raise Refused(404, "no answer has this id")
        found = await self._aside(self._receipts.find, id)
        if not found and uploads:
            with contextlib.suppress(BadImage, Busy), self.batcher.room(1):
                found = [(await self._answer(uploads[0]))[1]]
        elif not found:
            await asyncio.sleep(2 * receipts.PERIOD)
            found = await self._aside(self._receipts.find, id)
        if not found or found[0].id != id:
            raise Refused(404, "no answer has this id")
        return found[0]

    async def _image_of(self, receipt: Receipt, uploads: list[Upload]) -> bytes:
        """The file of an answer: sent again, or remembered."""
        data = uploads[0].data if uploads and not uploads[0].refused else self._recent.get(receipt.id)
        if data is None:
            raise Refused(409, "the image is not remembered any more; send it with the feedback")
        if receipts.sha256(data) != receipt.image_sha256:
            raise Refused(422, "the image is not the one of this answer")
        return data

    async def learned(self) -> dict[str, Any]:
        """What was said so far."""
        return await self._aside(self._store.summary)

    def drift(self) -> dict[str, Any]:
        """How the images of late differ from those of the training; {} while that is not known yet."""
        return self._drift.state() if self._drift is not None else {}

    def drift_values(self) -> dict[str, float]:
        """The numbers of it: shares, and alarms by kind."""
        state = self.drift()
        shares = {key: state[key] for key in ("unknown_share", "correction_share") if state.get(key) is not None}
        alarms = state.get("alarms", {})
        return shares | {f"alarms_{kind}": alarms.get(kind, {}).get("count", 0) for kind in KINDS if state}

    @property
    def since(self) -> str | None:
        """When the run that is served was promoted or given back; None where none ever was."""
        return self._source.since

    def about(self) -> dict[str, Any]:
        """What is served, and within which bounds."""
        model = self.batcher.model
        limits = self.limits
        return model.about | {
            "since": self.since,
            "explains": model.explainer is not None,
            "limits": {"images": limits.images, "image_bytes": limits.image_bytes, "pixels": limits.pixels},
        }

    # Explanations.

    async def explain(self, upload: Upload, method: str, label: str) -> dict[str, Any]:
        """A map over the image and what supports it; one at a time. Raises Refused."""
        model = self.batcher.model
        if model.explainer is None:
            raise Refused(501, "an exported program cannot be looked into; serve the workdir for explanations")
        if self._explaining.locked():
            raise Refused(503, "another explanation is being made; try again soon", {"Retry-After": "5"})
        async with self._explaining:
            try:
                return await self._aside(self._explained, model, upload, method, label)
            except BadImage as error:
                raise Refused(422, f"the file {error}") from None
            except errors.UserError as error:
                raise Refused(422, str(error)) from None

    def _explained(self, model: Served, upload: Upload, method: str, label: str) -> dict[str, Any]:
        pixels, _ = self._decoded(model, upload)
        if self._explainer is None or self._explainer[0] is not model:
            self._explainer = model, explanations.Explain(model)
        return self._explainer[1](pixels, method, label)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._receipts.flush()
        self._store.close()


def _decode(model: Served, data: bytes) -> tuple[np.ndarray, str]:
    return model.decode(data), receipts.sha256(data)


class _Recent:
    """The files of the newest answers, up to some bytes."""

    def __init__(self, most: int):
        self._most, self._bytes = most, 0
        self._files: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    def put(self, id: str, data: bytes) -> None:
        self._bytes += len(data) - len(self._files.pop(id, b""))
        self._files[id] = data
        while self._bytes > self._most:
            self._bytes -= len(self._files.popitem(last=False)[1])

    def get(self, id: str) -> bytes | None:
        return self._files.get(id)
