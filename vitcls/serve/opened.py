"""From flags to a service: what is served, and where receipts and feedback go."""

import os
import pathlib
from collections.abc import Callable

from vitcls.core import buckets
from vitcls.feedback.store import open_store
from vitcls.serve import drift, model, promotion
from vitcls.serve.drift import Drift
from vitcls.serve.limits import Limits
from vitcls.serve.receipts import Receipts
from vitcls.serve.service import Service, Source


def open_service(flags, database: str) -> Service:
    """Raises UserError for a database that cannot be used; what is wrong with the model is told by Service.run."""
    store = open_store(database)
    source, load = _what(flags)
    return Service(source, load, _drift, store=store, kept=Receipts(store), limits=Limits())


def _drift(source: str, served: model.Served) -> Drift:
    """Of a run against its test images; takes as long as it takes to open its data."""
    run = not buckets.is_url(source) and served.explainer is not None
    step = str(served.about["checkpoint"]["step"])
    return Drift(len(served.class_names), drift.reference(pathlib.Path(source), step) if run else None)


def _what(flags) -> tuple[Callable[[], Source], Callable[[str], model.Served]]:
    """What is to be served now, asked again and again, and how it is opened."""
    if flags.artefact:
        file = Source(os.path.abspath(flags.artefact))
        return (lambda: file), model.of_artefact
    if flags.checkpoint or buckets.is_url(flags.workdir):  # nothing is promoted there
        run = Source(flags.workdir if buckets.is_url(flags.workdir) else os.path.abspath(flags.workdir))
        return (lambda: run), lambda source: model.of_workdir(source, flags.checkpoint)
    workdir = pathlib.Path(flags.workdir).absolute()
    return (lambda: Source(str(promotion.current(workdir)), promotion.since(workdir))), model.of_workdir
