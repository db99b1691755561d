"""Images out of requests: a multipart form, an image as the body, or JSON with base64; each within its bounds."""

import base64
import binascii
import json
import urllib.parse
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vitcls.serve.limits import Limits, Refused

_FORMS = "multipart/form-data"
_WORDS = "application/x-www-form-urlencoded"  # words alone, as `curl -d` sends them
_WORDS_BYTES = 65_536
_FIELDS = 8  # of a form


class Upload(NamedTuple):
    """An image file as it came."""

    name: str
    data: bytes
    refused: str = ""  # why it is not looked at


class Body(NamedTuple):
    """Images, and what was said with them."""

    uploads: list[Upload]
    fields: dict[str, Any]


async def read(request: Request, limits: Limits) -> Body:
    """The body of a request; raises Refused for what is too much, or is none of the three kinds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORMS:
        return await _form(request, limits)
    data = await _all(request, limits)
    if kind == "application/json":
        return _json(data, limits)
    if kind == _WORDS:
        return _words(data)
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        return _bounded(Body([Upload("", data)] if data else [], {}), limits)
    raise Refused(415, f"send images as {_FORMS}, image/*, application/octet-stream or application/json")


async def _chunks(request: Request, limits: Limits):
    """The body as it comes, up to its bound."""
    most = limits.body_bytes
    if request.headers.get("content-length", "").isdecimal() and int(request.headers["content-length"]) > most:
        raise Refused(413, f"a request has at most {most:,} bytes")
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > most:
            raise Refused(413, f"a request has at most {most:,} bytes")
        yield chunk


async def _all(request: Request, limits: Limits) -> bytes:
    return b"".join([chunk async for chunk in _chunks(request, limits)])


def _words(data: bytes) -> Body:
    if len(data) > _WORDS_BYTES:
        raise Refused(413, f"words without images have at most {_WORDS_BYTES:,} bytes; send images as {_FORMS}")
    try:
        return Body([], dict(urllib.parse.parse_qsl(data.decode(errors="replace"), max_num_fields=_FIELDS)))
    except ValueError:
        raise Refused(400, f"a form has at most {_FIELDS} fields") from None


async def _form(request: Request, limits: Limits) -> Body:
    parser = MultiPartParser(
        request.headers,
        _chunks(request, limits),
        max_files=limits.images + 1,  # one too many is told below
        max_fields=_FIELDS,
        max_part_size=4096,
    )
    parser.spool_max_size = limits.body_bytes  # in memory: nothing touches the disk
    form: FormData | None = None
    try:
        form = await parser.parse()
        uploads, fields = [], {}
        for field, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = (value.filename or "").encode(errors="replace").decode()  # a charset may make half characters
                uploads.append(Upload(name, await value.read()))
            else:
                fields[field] = value
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read: {error.message}") from None
    except (UnicodeError, ValueError, KeyError, AttributeError, AssertionError):
        raise Refused(400, "the form cannot be read") from None
    finally:
        if form is not None:
            await form.close()
    return _bounded(Body(uploads, fields), limits)


def _json(data: bytes, limits: Limits) -> Body:
    """{"image": base64, ...} or {"images": [base64, ...], ...}."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refused(400, 'the JSON is to be an object, as {"image": "..."}')
    images = fields.pop("images", [])
    images = [*(images if isinstance(images, list) else [images])]
    images += [fields.pop("image")] if "image" in fields else []
    if len(images) > limits.images:
        raise Refused(413, f"a request has at most {limits.images} images")
    return _bounded(Body([_of_base64(image) for image in images], fields), limits)


def _of_base64(image: Any) -> Upload:
    try:
        return Upload("", base64.b64decode(image, validate=True))
    except (binascii.Error, ValueError, TypeError):
        return Upload("", b"", "is not base64")


def _bounded(body: Body, limits: Limits) -> Body:
    if len(body.uploads) > limits.images:
        raise Refused(413, f"a request has at most {limits.images} images")
    return body._replace(uploads=[_small(upload, limits) for upload in body.uploads])


def _small(upload: Upload, limits: Limits) -> Upload:
    if len(upload.data) <= limits.image_bytes:
        return upload
    most = limits.image_bytes >> 20
    return Upload(upload.name, b"", f"has {len(upload.data) / 2**20:.1f} MiB; at most {most} are taken")
