"""The report of a run: metrics.json, plots, and one page that holds them all."""

from vitcls.report.write import write

__all__ = ["write"]
