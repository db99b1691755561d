"""What /metrics says, in the words of Prometheus; of all processes that share PROMETHEUS_MULTIPROC_DIR."""

import os
import time
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess

from vitcls.serve.batcher import SIZES

_LATENCIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Gauges:
    """Counters of one process."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        here = {"registry": self.registry}
        self._requests = prometheus.Counter(
            "vitcls_requests", "Requests by route and status.", ["route", "status"], **here
        )
        self._seconds = prometheus.Histogram(
            "vitcls_request_seconds", "From the first byte to the answer.", ["route"], buckets=_LATENCIES, **here
        )
        self._batches = prometheus.Counter(
            "vitcls_batches", "Batches by the size that was computed.", ["batch_size"], **here
        )
        self._images = prometheus.Counter("vitcls_images", "Images that were answered.", **here)
        self._bad = prometheus.Counter("vitcls_bad_images", "Files that were no usable image.", **here)
        self._waiting = prometheus.Gauge(
            "vitcls_images_waiting", "Images on their way.", multiprocess_mode="livesum", **here
        )
        self._feedback = prometheus.Counter("vitcls_feedback", "Feedback by what it said.", ["said"], **here)
        self._model = prometheus.Gauge(
            "vitcls_model_info", "1 for what is served.", ["sha256"], multiprocess_mode="max", **here
        )
        self._drift = prometheus.Gauge(
            "vitcls_drift", "What drifts, by kind.", ["kind"], multiprocess_mode="mostrecent", **here
        )
        for size in SIZES:  # so that each is seen from the start
            self._batches.labels(size)

    def request(self, route: str, status: int, since: float) -> None:
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(time.perf_counter() - since)

    def batch(self, images: int, size: int) -> None:
        self._batches.labels(size).inc()
        self._images.inc(images)

    def bad_image(self) -> None:
        self._bad.inc()

    def waiting(self, images: int) -> None:
        self._waiting.set(images)

    def feedback(self, right: bool) -> None:
        self._feedback.labels("right" if right else "wrong").inc()

    def model(self, version: str, before: str | None = None) -> None:
        if before is not None:
            self._model.labels(before).set(0)
        self._model.labels(version).set(1)

    def drift(self, values: dict[str, Any]) -> None:
        for kind, value in values.items():
            self._drift.labels(kind).set(value)

    def text(self) -> bytes:
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return prometheus.generate_latest(registry)
