"""What /openapi.json says of the routes: the bodies that bodies.py reads, and the answers of service.py."""

from collections.abc import Collection
from typing import Any

Schema = dict[str, Any]


def _object(properties: dict[str, Schema], optional: Collection[str] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> Schema:
    return {"type": [kind, "null"]}


_TEXT, _NUMBER, _COUNT, _YES = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
_TIME: Schema = {"type": ["string", "null"], "format": "date-time"}
_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_FEEDBACK = {
    "id": {"type": "string", "description": "of the answer"},
    "right": {"description": "the answer is right; else give its label", "enum": [True, "true"]},
    "label": {"type": "string", "description": "the right class"},
}

_ERROR = _object({"error": _TEXT})
_CLASS = _object({"class": _TEXT, "probability": _SHARE})
_PREDICTION = _object({"file": _TEXT, "id": _TEXT, "top": _list(_CLASS), "unknown": _YES}, optional=("file", "unknown"))
_PREDICTIONS = _list({"anyOf": [_PREDICTION, _object({"file": _TEXT, "error": _TEXT}, optional=("file",))]})
_CURVE = _object({"value": _NUMBER, "low": _NUMBER, "high": _NUMBER})
_ALARM = _object({"time": _TIME, "answers": _COUNT, "count": _COUNT})

_ANSWERS: dict[str, Schema] = {
    "predict": _object({"predictions": _PREDICTIONS, "since": _TIME}),
    "feedback": _object({"stored": _YES, "label": _TEXT, "client": _TEXT}),
    "explain": _object(
        {
            "method": _TEXT,
            "methods": _list(_TEXT),
            "class": _TEXT,
            "probability": _SHARE,
            "deletion": _NUMBER,
            "random_deletion": _CURVE,
            "insertion": _NUMBER,
            "random_insertion": _CURVE,
            "p_value": _SHARE,
            "better_than_random": _YES,
            "overlay_png": _BASE64,
        }
    ),
    "model": _object(
        {
            "model": _TEXT,
            "dataset": _TEXT,
            "classes": _list(_TEXT),
            "image_shape": _list(_COUNT),
            "checkpoint": _object({"step": _COUNT, "sha256": _TEXT}),
            "calibrated": _YES,
            "test": _object({"accuracy": _SHARE, "num_examples": _COUNT}, optional=("accuracy", "num_examples")),
            "weights": _TEXT,
            "pruned": _SHARE,
            "since": _TIME,
            "explains": _YES,
            "limits": _object({"images": _COUNT, "image_bytes": _COUNT, "pixels": _COUNT}),
        },
        optional=("weights", "pruned"),  # of an exported program
    ),
    "learned": _object(
        {
            "images": _COUNT,
            "bytes": _COUNT,
            "corrections": _COUNT,
            "confirmations": _COUNT,
            "by_class": {"type": "object", "additionalProperties": _COUNT},
            "newest": _or_null("number") | {"description": "seconds since 1970"},
        }
    ),
    "drift": {
        "type": "object",
        "description": "empty while its reference is measured",
        "properties": {
            "answers": _COUNT,
            "feedback": _COUNT,
            "unknown_share": _or_null("number"),
            "correction_share": _or_null("number"),
            "class_counts": _list(_COUNT),
            "recent_classes": {"type": ["array", "null"], "items": _NUMBER},
            "reference_classes": {"type": ["array", "null"], "items": _NUMBER},
            "measured_against": {"type": "object", "additionalProperties": _TEXT},
            "alarms": {"type": "object", "additionalProperties": _ALARM},
            "false_alarms": _TEXT,
        },
    },
    "alive": _object({"alive": _YES}),
    "ready": _object({"ready": _YES}),
}


def answer(route: str, *others: int) -> dict[int | str, Any]:
    """For FastAPI's `responses`: what a route says with status 200 and under the `others`; all else are errors."""
    schemas = {
        200: ("done", _ANSWERS[route]),
        **dict.fromkeys(others, ("no", _ANSWERS[route])),
        "default": ("why not", _ERROR),
    }
    return {
        status: {"description": words, "content": {"application/json": {"schema": schema}}}
        for status, (words, schema) in schemas.items()
    }


def _body(form: dict[str, Schema], words: dict[str, Schema], *, several: bool) -> dict[str, Any]:
    """An image, or `several`, with some words beside, in all the kinds that are read."""
    json = {"image": _BASE64} | ({"images": _list(_BASE64)} if several else {})
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form | words}},
        "application/json": {"schema": {"type": "object", "properties": json | words}},
    }
    if words:
        content["application/x-www-form-urlencoded"] = {"schema": {"type": "object", "properties": words}}
    else:
        content |= {"image/*": {"schema": _FILE}, "application/octet-stream": {"schema": _FILE}}
    return {"requestBody": {"required": True, "content": content}}


IMAGES = _body({"file": _list(_FILE)}, {}, several=True)
IMAGE = _body({"file": _FILE}, {}, several=False)
FEEDBACK = _body({"file": _FILE}, _FEEDBACK, several=False)
