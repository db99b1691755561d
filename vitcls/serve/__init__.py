"""A trained run behind HTTP: micro-batches, receipts, a page, feedback and what drifts.

__main__.py  the command         app.py           the routes          service.py   what they do
model.py     what is served      batcher.py       micro-batches       bodies.py    images out of requests
limits.py    what is refused     receipts.py      what was answered   gauges.py    /metrics
opened.py    from flags to it    explanations.py  where it looks      page/        HTML, CSS and JavaScript
promotion.py which run is served for a workdir
"""
