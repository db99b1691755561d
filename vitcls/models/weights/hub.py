"""Published weights by name, `timm/MODEL.TAG`: fetched once from the Hugging Face Hub into the cache, and checked."""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil

from vitcls.core import extras
from vitcls.core.cache import cache_dir
from vitcls.core.errors import UserError

FILE = "model.safetensors"
_NAME = re.compile(r"timm/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_name(weights: str) -> bool:
    """Whether it is a name on the Hub, and no file or directory that is here."""
    return _NAME.fullmatch(weights) is not None and not os.path.exists(weights)


def pads_as_tensorflow(name: str) -> bool:
    """Whether timm's network of that name does, whose weights are those that TensorFlow's authors published."""
    return name.startswith("timm/tf_")


def located(weights: str) -> str:
    """The file of weights: what a name on the Hub was fetched to, and anything else as it is.

    Raises UserError where it cannot be fetched, or is not what the Hub says that it is.
    """
    if not is_name(weights):
        return weights
    kept = cache_dir() / "hub" / weights.replace("/", "--")
    path, record = kept / FILE, kept / "sha256"
    if not record.exists():
        _fetch(weights, kept)
    if sha256_of(path) != record.read_text(encoding="utf-8").strip():
        raise UserError(f"{path} is not what was fetched; delete {kept} to fetch it again")
    return str(path)


def sha256_of(path: os.PathLike | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(name: str, kept: pathlib.Path) -> None:
    """Fetches a file into a directory of the cache; its SHA-256, which is written last, says that it is whole."""
    with extras.needed(f"{name} on the Hugging Face Hub", "hub"):
        import huggingface_hub as hub
    url = hub.hf_hub_url(name, FILE, endpoint=os.environ.get("HF_ENDPOINT"))
    elsewhere = f"download {url} and give the file as the weights"
    coming = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        found = hub.get_hf_file_metadata(url)
        if not _SHA256.fullmatch(found.etag or ""):
            raise UserError(f"the Hub does not say which SHA-256 {url} has; {elsewhere}")
        hub.hf_hub_download(
            name, FILE, revision=found.commit_hash, local_dir=coming, endpoint=os.environ.get("HF_ENDPOINT")
        )
        if sha256_of(coming / FILE) != found.etag:
            raise UserError(f"{url} was changed on its way here (its SHA-256 is not {found.etag[:12]}...); try again")
        kept.mkdir(parents=True, exist_ok=True)
        os.replace(coming / FILE, kept / FILE)
        (kept / "sha256").write_text(found.etag + "\n", encoding="utf-8")
    except UserError:
        raise
    except Exception as error:  # of HTTP, the Hub or the disk
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} could not be fetched ({said}); {elsewhere}") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(coming)
