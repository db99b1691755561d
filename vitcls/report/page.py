"""index.html: one file that needs nothing else; every text in it is escaped."""

import base64
import pathlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from vitcls.metrics.table import METRICS

_DETAILS = (  # that are no metrics of predictions
    ("parameters", "Parameters", "{:,}"),
    ("flops_per_image", "Cost of one image, forward", "{:,.0f} FLOPs (2 per multiply-add)"),
    ("latency_ms", "Latency of one image", "{0[median]:.2f} ms median, {0[p95]:.2f} ms p95"),
    ("images_per_second", "Inference on all devices", "{:,.0f} images/s"),
    ("feature_seconds", "Features of the training and validation images", "{:,.1f} s, once"),
    ("train_seconds", "Training", "{:,.1f} s (without compilation, evaluation and saving)"),
)
_HALF_WIDTH = ("roc", "reliability")  # plots that stand side by side
# Pictures whose colours a dark page must not turn around.
_PHOTOS = ("mistakes", "disagreements", "examples", "explained", "contact_sheet", "duplicates", "label_errors")
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --line: #e5e7eb; --paper: #f6f7f9; --card: #fff;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #2b323d; --paper: #0f1217; --card: #191919; --accent: #56b4e9; }
  img.drawing { filter: invert(.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.soft { color: var(--soft); }
.lead { margin: .4rem 0 1.75rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .75rem; }
.card, figure, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: .9rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.25; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.card span { display: block; font-weight: 600; font-size: .85rem; }
.card small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: 1rem; }
figure { grid-column: 1 / -1; min-width: 0; margin: 0; padding: 1rem; }
figure.half { grid-column: auto; }
figure .frame { overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure img.photo { border-radius: 8px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .6rem; }
figcaption b { color: var(--ink); }
.panel { overflow: auto; max-height: 34rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; background: var(--card); color: var(--soft); vertical-align: bottom;
  overflow-wrap: normal; }
tbody th { font-weight: 400; color: var(--soft); width: 14rem; }
.classes th, .classes td { padding: .4rem .6rem; }
.classes td { overflow-wrap: normal; }
.classes tbody th { color: var(--ink); min-width: 11rem; }
.number { text-align: right; }
td small, td .value { white-space: nowrap; }
ul { margin: 0; padding: .8rem 1rem .8rem 2rem; font-size: .88rem; }
@media (max-width: 720px) {
  main { padding-top: 1.5rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  .plots { grid-template-columns: 1fr; }
  figure { padding: .6rem; }
  figure:not(.half) img { max-width: none; width: 44rem; }
  tbody th { width: 8rem; }
}
@media print { .panel { max-height: none; } figure, .card { break-inside: avoid; } }
"""


def render(
    metrics: dict[str, Any], facts: dict[str, Any], plots: Sequence[tuple[str, str, pathlib.Path | None]]
) -> str:
    """The page as text.

    Args:
      metrics: what metrics.json holds.
      facts: rows for the end of the page; 'Model' heads it, and 'Skipped files' is a list with a section of its own.
      plots: (title, caption, PNG file or None where there was nothing to draw), in order.
    """
    rows = [(key, str(value)) for key, value in facts.items() if key != "Skipped files"]
    title = f"{facts.get('Model', 'Model')} on {metrics['dataset']}"
    lead = f"{metrics['num_examples']:,} images of the {metrics['split']} split, {len(metrics['per_class']):,} classes"
    parts = [
        f'<h1>{escape(title)}</h1>\n<p class="soft lead">{escape(lead)}</p>',
        _cards(metrics),
        figures(plots),
        f"<h2>By class</h2>\n{_class_table(metrics['per_class'])}",
        f"<h2>More numbers</h2>\n{_key_values(_details(metrics))}",
        f"<h2>The run</h2>\n{_key_values(rows)}",
        _skipped(facts.get("Skipped files", [])),
    ]
    return document(f"{title}: {metrics['accuracy']:.2%}", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page in the style of all reports, of parts that are HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n"
    )


def _cards(metrics: dict[str, Any]) -> str:
    cards = (
        f'<div class="card"><span>{escape(metric.label)}</span><b>{metric.show(metrics[name])}</b>'
        f"<small>{escape(metric.meaning)}</small></div>"
        for name, metric in METRICS.items()
        if metric.meaning and name in metrics
    )
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def figures(plots: Sequence[tuple[str, str, pathlib.Path | None]]) -> str:
    """(title, caption, PNG file or None where there was nothing to draw), in order, as HTML."""
    drawn = (
        _figure(title, caption, path)
        if path
        else f'<figure class="missing"><figcaption><b>{escape(title)}</b>: nothing to draw, {escape(caption)}'
        "</figcaption></figure>"
        for title, caption, path in plots
    )
    return '<div class="plots">\n' + "\n".join(drawn) + "\n</div>"


def _figure(title: str, caption: str, path: pathlib.Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    width = ' class="half"' if path.stem in _HALF_WIDTH else ""
    kind = "photo" if path.stem.partition("-")[0] in _PHOTOS else "drawing"
    return (
        f'<figure{width}><div class="frame"><img class="{kind}" src="data:image/png;base64,{data}" '
        f'alt="{escape(title)}: {escape(caption)}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _details(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (metric.label, f"{metric.show(metrics[name])} ({metric.unit.partition(' ')[0]})")
        for name, metric in METRICS.items()
        if not metric.meaning and name in metrics
    ]
    rows += [(label, form.format(metrics[key])) for key, label, form in _DETAILS if key in metrics]
    for name, values in metrics.get("corrupted_accuracy", {}).items():
        by_severity = ", ".join(f"{value:.2%}" for value in values)
        rows.append((f"Accuracy under {name.replace('_', ' ')}", f"{by_severity} (severity 1 to 5)"))
    return rows + [(name, f"{weight:.4f} (learned)") for name, weight in metrics["learned_weights"].items()]


def _key_values(rows: Sequence[tuple[str, str]]) -> str:
    body = "\n".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return f'<div class="panel"><table><tbody>\n{body}\n</tbody></table></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """A table whose first column names its rows; a cell may be a pair, of which the second stands small below."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="panel classes" tabindex="0"><table><thead><tr>{columns}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(text: str | tuple[str, str]) -> str:
    if isinstance(text, str):
        return escape(text)
    return f'<span class="value">{escape(text[0])}</span><br><small class="soft">{escape(text[1])}</small>'


def _class_table(per_class: Sequence[dict[str, Any]]) -> str:
    columns = (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"), ("auc", "AUC"))
    head = "".join(f'<th scope="col" class="number">{label} [0–1]</th>' for _, label in columns)
    rows = []
    for row in per_class:
        numbers = "".join(
            f'<td class="number">{"–" if row[key] is None else format(row[key], ".4f")}</td>' for key, _ in columns
        )
        confused = escape(row["most_confused_with"] or "–")
        rows.append(
            f'<tr><th scope="row">{escape(row["name"])}</th><td class="number">{row["num_examples"]:,}</td>{numbers}'
            f"<td>{confused}</td></tr>"
        )
    return (
        '<div class="panel classes" tabindex="0"><table><thead><tr><th scope="col">Class</th>'
        f'<th scope="col" class="number">Images</th>{head}<th scope="col">Most often taken for</th></tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _skipped(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    count = "1 file was" if len(lines) == 1 else f"{len(lines):,} files were"
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>{count} skipped</h2>\n<div class="panel"><ul>\n{items}\n</ul></div>'
