"""Look at what users said of answers, take it out as an image folder, or forget it for good.

    vitcls feedback list --database=URL [--json]
    vitcls feedback export --database=URL --out=DIR
    vitcls feedback forget --database=URL --image=SHA256 | --client=ID

URL is sqlite:///PATH or postgresql://USER@HOST/DATABASE. The folder has an image once, in the class that most clients
named; images on which they are even are left out and named.
"""

import argparse
import datetime
import json
import pathlib
import re
import sys

from vitcls import cli
from vitcls.core import buckets
from vitcls.core.errors import UserError
from vitcls.feedback import folder
from vitcls.feedback.store import Row, Store, open_store
from vitcls.report.part import Part


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    store = open_store(flags.database, create=False)
    try:
        flags.run(store, flags)
    finally:
        store.close()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog=cli.program("feedback"), description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True, metavar="list|export|forget", dest="verb")
    for name, run, help in (
        ("list", _list, "one line for each correction, the oldest first"),
        ("export", _export, "write an image folder, by the majority of votes"),
        ("forget", _forget, "remove an image, or all that a client said, for good"),
    ):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=run)
        verb.add_argument("--database", required=True, metavar="URL", help="sqlite:///PATH or postgresql://...")
        if name == "list":
            verb.add_argument("--json", action="store_true", help="one JSON object per correction")
        elif name == "export":
            verb.add_argument("--out", required=True, metavar="DIR", help="a new directory")
        else:
            which = verb.add_mutually_exclusive_group(required=True)
            which.add_argument("--image", metavar="SHA256", help="of the file, as list shows it")
            which.add_argument("--client", metavar="ID", help="as list shows it")
    flags = parser.parse_args(argv)
    buckets.check_local(getattr(flags, "out", ""), "--out")
    return flags


def _list(store: Store, flags: argparse.Namespace) -> None:
    for row in store.rows():
        print(json.dumps(row._asdict()) if flags.json else _line(row))
    if not flags.json:
        found = store.summary()
        print(
            f"{found['images']:,} images of {found['bytes'] / 2**20:.1f} MiB, {found['corrections']:,} corrections, "
            f"{found['confirmations']:,} confirmations"
        )


def _line(row: Row) -> str:
    when = datetime.datetime.fromtimestamp(row.time).isoformat(" ", "seconds")
    said = "right" if row.label == row.predicted else f"is {row.label}"
    answer = f"{row.predicted} ({row.probability:.0%})"
    return f"{when}  {answer:<24} {said:<20} client {row.client}  model {row.model[:12]}  image {row.image}"


def _export(store: Store, flags: argparse.Namespace) -> None:
    out = pathlib.Path(flags.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already; name a new directory")
    votes = folder.count_votes(store.rows())
    if not votes.labels:
        raise UserError(f"{store.url} has no feedback that could be exported")
    with Part(out) as made:
        unusable = folder.write(store, votes.labels, made.new)
        made.replace()
    written = len(votes.labels) - len(unusable)
    print(f"{written:,} images of {len(set(votes.labels.values())):,} classes in {out}")
    for image in votes.ties:
        print(f"left out, as the votes are even: {image}")
    for image in unusable:
        print(f"left out, as it is no image that can be read: {image}")


def _forget(store: Store, flags: argparse.Namespace) -> None:
    if flags.image is None:
        count = store.forget_client(flags.client)
        if not count:
            raise UserError(f"--client={flags.client} has said nothing here; vitcls feedback list shows who has")
        print(f"{count:,} corrections of {flags.client} are gone")
        return
    if not re.fullmatch("[0-9a-f]{64}", flags.image):
        raise UserError(f"--image={flags.image} is no SHA-256; vitcls feedback list shows them")
    count = store.forget_image(flags.image)
    gone = f"the image and {count:,} corrections of it are gone" if count else "nothing was said of this image"
    print(f"{gone}; of its receipts, if there were any, nothing is left")


if __name__ == "__main__":
    sys.exit(cli.run(main))
