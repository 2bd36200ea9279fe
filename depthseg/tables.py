"""The tables of the papers, laid out from the reports of single evaluations: a row for each model, columns for each data set.

Knows no model and runs none. A cell of a table is one model on one data set with one kind of prompt: an ordinary report.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from depthseg import page, published
from depthseg.plan import TABLES


class Layout(NamedTuple):
    """A table as text."""

    title: str
    head: list[str]
    rows: list[list[str]]  # models, then published figures where all cells of a column are about the whole data set
    notes: list[str]  # sentences below it

    def markdown(self) -> str:
        last = len(self.head) - 1
        table = page.table(self.head, self.rows, words=(0, last)).markdown
        return "\n\n".join([f"# {page.plain(self.title)}", table, *(f"- {page.plain(note)}" for note in self.notes)]) + "\n"


def layout(number: int, cells: Mapping[tuple[str, str], dict], models: Sequence[str]) -> Layout:
    """Table `number` of reports by (column, model), columns in the order in which they occur; a cell that is not there stays open."""
    columns = list(dict.fromkeys(column for column, _ in cells))
    some = {column: next(report for (c, _), report in cells.items() if c == column) for column in columns}
    metrics = {column: _metrics(report) for column, report in some.items()}
    head = ["model", *(f"{column} {page.metric_name(name)}" for column in columns for name in metrics[column]), "source"]
    rows = []
    for model in models:
        values = [(cells.get((column, model)) or {}).get("metrics", {}).get(name) for column in columns for name in metrics[column]]
        rows.append([model, *map(page.score, values), "this run"])
    printed: dict[tuple[str, str], dict[str, dict]] = {}
    for column, report in some.items():
        for row in (report["published"] or {}).get("rows", ()):
            printed.setdefault((row["model"], row["source"]), {})[column] = row["values"]
    for (model, source), known in printed.items():
        values = [known.get(column, {}).get(name) for column in columns for name in metrics[column]]
        if any(v is not None for v in values):
            rows.append([model, *map(page.score, values), source])
    notes = []
    for column, report in some.items():
        data, state = report["dataset"], report["state"]
        left = f", {state['left_out']:,} left out" if state["left_out"] else ""
        notes.append(f"{column}: {state['done']:,} images of {PurePath(data['annotations']).name}{left}.")
    for (column, model), report in cells.items():
        if failed := report["state"]["failed"]:
            notes.append(f"{model} on {column}: {len(failed)} images FAILED and are not in the scores.")
    notes += dict.fromkeys(" ".join(report["protocol_in_words"]) for report in cells.values())
    return Layout(f"Table {number}: {_TITLES[TABLES[number]]}", head, rows, notes)


_TITLES = {"detector": "boxes of a detector", "point": "clicks", "box": "true boxes"}


def _metrics(report: dict) -> list[str]:
    return [f"miou_{n}" for n in report["clicks"]] if report["prompt"] == "point" else list(published.METRICS[report["prompt"]])
