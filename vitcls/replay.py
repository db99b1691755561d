"""Compute an answer of a server again, to the bit, or say what has changed.

vitcls replay ID [--workdir=DIR] [--database=URL] [--image=FILE]

ID is what the server gave with its answer; the receipt is in its database: URL, else DIR/feedback.db, else one of those
that this machine has served. DIR is where the run is now, if it has moved. The image is the file that was sent, or the
one that came with feedback on the answer. Exit code 0: the same bits; 1: not.
"""

import contextlib
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from vitcls import cli
from vitcls.core import buckets, extras
from vitcls.core.errors import RunError, UserError
from vitcls.training.files import CONFIG_FILE


def replay(id: str, databases: Sequence[str], image: pathlib.Path | None = None, workdir: str = "") -> list[str]:
    """Lines that say of each receipt of an answer, in the first of some databases, that the outputs are the same bits.

    Raises UserError where there is no receipt or no image, RunError, which says what has changed, where they differ.
    """
    from vitcls.feedback.store import open_store

    with extras.needed("vitcls replay", "serve"):
        from vitcls.serve import receipts

    passed_over = ""
    for database in databases:
        with contextlib.ExitStack() as opened:
            try:
                store = opened.enter_context(contextlib.closing(open_store(database, create=False)))
                found = receipts.find(store, id)
            except (UserError, RunError) as error:
                if len(databases) == 1:
                    raise
                passed_over = f"; passed over: {error}"
                continue
            if found:
                data = _image(store, found[0], image)
                return [_again(receipt, data, workdir) for receipt in found]
    where = databases[0] if len(databases) == 1 else f"{len(databases)} databases, the newest of them {databases[0]}"
    raise UserError(
        f"no answer has the id {id} in {where}; they keep the newest; --database=URL names another{passed_over}"
    )


def _image(store, receipt, image: pathlib.Path | None) -> bytes:
    """The file of an answer; raises UserError where it is not at hand."""
    from vitcls.serve import receipts

    if image is None:
        try:
            return store.image(receipt.image_sha256)
        except KeyError:
            raise UserError("only images of feedback are kept; give the file with --image=FILE") from None
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UserError(f"--image={image} cannot be read: {error.strerror}") from None
    if receipts.sha256(data) != receipt.image_sha256:
        raise UserError(f"--image={image} is not the file of this answer (SHA-256 {receipt.image_sha256})")
    return data


def _opened(receipt, workdir: str):
    """The model of a receipt, from where it was or is now; raises RunError where its weights are no more."""
    from vitcls.serve import model

    whys = []
    for path in filter(None, (workdir, receipt.source)):
        try:
            is_run = buckets.is_url(path) or pathlib.Path(path, CONFIG_FILE).exists()
            served = model.of_workdir(path, str(receipt.step)) if is_run else model.of_artefact(path)
        except UserError as error:
            whys.append(str(error))
            continue
        if served.version == receipt.model:
            return served
        whys.append(f"those in {path} are others ({served.version[:12]}, then {receipt.model[:12]})")
    raise RunError(f"{receipt.id}: the weights that answered are no more: {'; '.join(whys)}")


def _again(receipt, data: bytes, workdir: str) -> str:
    from vitcls.serve import receipts

    served = _opened(receipt, workdir)
    changed = []
    if served.preprocessing_json != receipt.preprocessing:
        changed.append("preprocessing, calibration or threshold are others")
    if receipts.device() != receipt.device:
        changed.append(f"the device is another ({receipts.device()}, then {receipt.device})")
    outputs = served.answer(served.decode(data)[None], receipt.batch_size).outputs[0]
    then = np.frombuffer(receipt.outputs, np.float32)
    where = f"in a batch of {receipt.batch_size}"
    if np.array_equal(outputs.view(np.uint32), then.view(np.uint32)):
        though = f", though {'; '.join(changed)}" if changed else ""
        return f"{receipt.id}: the same {len(then)} outputs to the bit, {where}: {receipt.predicted}{though}"
    apart = f"differ by up to {np.abs(outputs - then).max():.2g}" if outputs.shape == then.shape else "are others"
    why = "; ".join(changed) or "nothing that a receipt knows of has changed"
    raise RunError(f"{receipt.id}: the outputs {where} {apart}: {why}")


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("replay"), description=__doc__.splitlines()[0])
    parser.add_argument("id", metavar="ID", help="of the answer")
    parser.add_argument("--workdir", default="", metavar="DIR", help="what was served")
    parser.add_argument("--database", default="", metavar="URL", help="of the receipts, if not in the workdir")
    parser.add_argument("--image", type=pathlib.Path, metavar="FILE", help="the file that was sent")
    cli.add_import_argument(parser)
    flags = parser.parse_args(argv)
    cli.start_jax()
    print("\n".join(replay(flags.id, _databases(flags), flags.image, flags.workdir)))


def _databases(flags) -> list[str]:
    """The URLs of those in which the receipt may be; raises UserError where there is none."""
    from vitcls.serve import databases

    if flags.database:
        return [flags.database]
    if flags.workdir:
        file = databases.of_workdir(pathlib.Path(flags.workdir))
        if not file.exists():
            raise UserError(f"{flags.workdir} has no {file.name}; serve it, or give --database=URL")
        return [databases.url(file)]
    known = databases.known()
    if not known:
        raise UserError("no server has run on this machine; give --workdir=DIR or --database=URL")
    return known


if __name__ == "__main__":
    sys.exit(cli.run(main))
