"""index.html: one file that needs nothing else; every text in it is escaped."""

import base64
import pathlib
from collections.abc import Sequence
from html import escape
from typing import Any

_CARDS = (
    ("accuracy", "Accuracy", "{:.2%}"),
    ("top5_accuracy", "Top-5 accuracy", "{:.2%}"),
    ("f1_macro", "F1, macro", "{:.4f}"),
    ("auc_ovr_macro", "AUC, macro", "{:.4f}"),
    ("ece", "Calibration error", "{:.2%}"),
    ("loss", "Loss", "{:.4f} nats"),
)
_DETAILS = (
    ("precision_macro", "Precision, macro", "{:.4f}"),
    ("recall_macro", "Recall, macro", "{:.4f}"),
    ("auc_ovr_macro_hard", "AUC of one-hot predictions, macro", "{:.4f}"),
    ("parameters", "Parameters", "{:,}"),
    ("flops_per_image", "FLOPs per image, forward", "{:,.0f}"),
    ("images_per_second", "Inference, images per second", "{:,.0f}"),
    ("train_seconds", "Training, seconds", "{:,.1f}"),
)
_STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --card: #f9fafb; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --card: #1f2937; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p.lead { color: var(--soft); margin: .25rem 0 1.5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.45rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
figure { margin: 0 0 1.5rem; } figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; align-items: start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; } th { color: var(--soft); font-weight: 600; }
td.key { color: var(--soft); white-space: nowrap; width: 1%; }
"""


def render(metrics: dict[str, Any], facts: dict[str, Any], plots: Sequence[tuple[str, str, pathlib.Path | None]]) -> str:
    """The page as text.

    Args:
      metrics: what metrics.json holds; facts: rows for the head, a list being files that were skipped.
      plots: (title, caption, PNG file or None where there was nothing to draw), in order.
    """
    skipped = facts.get("Skipped files", [])
    rows = {key: value for key, value in facts.items() if key != "Skipped files"}
    latency = metrics["latency_ms"]
    details = [(label, form.format(metrics[key])) for key, label, form in _DETAILS]
    details.insert(5, ("Latency of one image", f"{latency['median']:.2f} ms median, {latency['p95']:.2f} ms p95"))
    parts = [
        f"<h1>{escape(str(facts.get('Model', 'Model')))} on {escape(metrics['dataset'])}</h1>",
        f"<p class=lead>{metrics['num_examples']:,} images of the {escape(metrics['split'])} split, "
        f"{len(metrics['per_class'])} classes</p>",
        "<div class=cards>",
        *(f"<div class=card><b>{form.format(metrics[key])}</b><span>{label}</span></div>" for key, label, form in _CARDS),
        "</div>",
        *_figures(plots),
        "<h2>More numbers</h2>",
        _key_values(details),
        "<h2>By class</h2>",
        _class_table(metrics["per_class"]),
        "<h2>The run</h2>",
        _key_values([(key, str(value)) for key, value in rows.items()]),
    ]
    if skipped:
        items = "".join(f"<li>{escape(line)}</li>" for line in skipped)
        parts += [f"<h2>{len(skipped)} files were skipped</h2>", f"<ul>{items}</ul>"]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(metrics['dataset'])}: {metrics['accuracy']:.2%}</title><style>{_STYLE}</style></head>"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _figures(plots: Sequence[tuple[str, str, pathlib.Path | None]]) -> list[str]:
    parts = []
    for title, caption, path in plots:
        parts.append(f"<h2>{escape(title)}</h2>")
        if path is None:
            parts.append(f"<p class=lead>Nothing to draw: {escape(caption)}</p>")
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(title)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return parts


def _key_values(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td class=key>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
    return f"<div class=scroll><table>{body}</table></div>"


def _class_table(per_class: Sequence[dict[str, Any]]) -> str:
    columns = (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"), ("auc", "AUC"))
    head = "".join(f"<th class=number>{label}</th>" for _, label in columns)
    body = ""
    for row in per_class:
        numbers = "".join(
            f"<td class=number>{'–' if row[key] is None else format(row[key], '.4f')}</td>" for key, _ in columns
        )
        confused = escape(row["most_confused_with"] or "–")
        body += (
            f"<tr><td>{escape(row['name'])}</td><td class=number>{row['num_examples']:,}</td>{numbers}"
            f"<td>{confused}</td></tr>"
        )
    return (
        f"<div class=scroll><table><tr><th>Class</th><th class=number>Images</th>{head}"
        f"<th>Most often taken for</th></tr>{body}</table></div>"
    )
