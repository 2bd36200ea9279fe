"""`depthseg eval --table`: the cells of one of the papers' tables, one ordinary evaluation each, and the table that they make.

A cell lies in DIR/table3/coco/nano, and DIR/table3/table.md beside them. What was done with the same options, weights and files is not
done again, and a run that was stopped in a cell goes on there; another data set with the same -o adds its columns.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.errors import DepthsegError
from depthseg.plan import TABLES, Plan
from depthseg.terminal import downloads, progress, say, table, write_json

DONE = "cell.json"  # what decided a cell that is whole


def plans(plan: Plan, models: str, pull: bool) -> list[Plan]:
    """The plan for each model of the list, all of them checked before the first is run. Depth goes to those that take it."""
    names = list(dict.fromkeys(name.strip() for name in models.split(",") if name.strip()))
    if not names:
        raise DepthsegError("no model is named for the table", "Add --models a,b,c.")
    if plan.weights and len(names) > 1:
        raise DepthsegError("one checkpoint cannot be that of several models", "Leave --weights out, or name one model.")
    rows = {name: catalog.row(catalog.MODELS, name, "model") for name in names}
    out = [replace(plan, model=name, depth=plan.depth if row.args.get("depth") else "auto") for name, row in rows.items()]
    for one in out:
        opt.check_files(one, None, pull)
    return out


def run(number: int, chosen: list[Plan], data: Any, ask: Any, out: Path, pull: bool, command: str, overwrite: bool, own: bool) -> Any:
    """Evaluate the cells that are not done; the table of all that lie in `out`, and whether an image failed.

    own: the plans name boxes or a detector; otherwise table 1 takes the published boxes.
    """
    from depthseg import asking, tables
    from depthseg import evaluate as single

    home = out / f"table{number}"
    for column, boxes in _columns(number, chosen[0], data, pull, own):
        for plan in chosen:
            plan = replace(plan, boxes=boxes)
            folder = home / column / plan.model
            key = _key(plan, ask, data)
            if not overwrite and _read(folder / DONE) == key and _read(folder / "report.json"):
                say(f"{column}, {plan.model}: done already")
                continue
            say(f"{column}, {plan.model}:")
            (folder / DONE).unlink(missing_ok=True)
            with downloads() as fetched:
                segmenter = asking.segmenter_for(data, plan, ask, pull, fetched)
            for note in segmenter.notes:
                say(note)
            with progress("images") as show:
                single.run(data, segmenter, ask, folder, command=command, overwrite=overwrite, progress=show)
            write_json(folder / DONE, key)
    found = {}
    for lies in sorted(p for p in home.iterdir() if p.is_dir()):
        kind, _, detector = lies.name.partition("-")
        for plan in chosen:
            if (report := _read(lies / plan.model / "report.json")) and (lies / plan.model / DONE).exists():
                found[f"{kind.upper()} {detector}".strip(), plan.model] = report
    made = tables.layout(number, found, [plan.model for plan in chosen])
    (home / "table.md").write_text(made.markdown(), encoding="utf-8")
    told = {"schema_version": 1, "table": number, **made._asdict(), "folder": str(home)}
    write_json(home / "table.json", told)
    return told, any(report["state"]["failed"] for report in found.values())


def show(told: dict[str, Any], as_json: bool) -> None:
    """Print the table."""
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(told["title"])
    table(told["head"], told["rows"])
    for note in told["notes"]:
        typer.echo(note)
    typer.echo(Path(told["folder"]) / "table.md")


def _columns(number: int, plan: Plan, data: Any, pull: bool, own: bool) -> Iterator[tuple[str, str | None]]:
    """Name and boxes of the columns of this data set: one, but in table 1 one for each file of published boxes unless others are named."""
    if TABLES[number] != "detector":
        yield data.kind, None
    elif own:
        yield f"{data.kind}-{Path(plan.boxes).stem.removeprefix(data.kind + '_') if plan.boxes else plan.detector}", plan.boxes
    else:
        from depthseg import weights

        files = {}
        for name, row in catalog.BOXES.items():
            if name.startswith(data.kind):
                with downloads() as fetched:
                    files[name] = str(weights.locate(row, name, pull, fetched))
        yield from ((f"{data.kind}-{name.removeprefix(data.kind + '_')}", file) for name, file in files.items())


def _key(plan: Plan, ask: Any, data: Any) -> dict[str, Any]:
    """What decides a cell: options, and the sizes and times of the files that it is made from."""
    from depthseg import __version__
    from depthseg.data import stamp

    weights = Path(plan.weights) if plan.weights else catalog.find(catalog.MODELS[plan.model])
    files = [weights, *(Path(f) for f in (plan.boxes, plan.detector_weights) if f)]
    if (maps := Path(plan.depth)).is_dir():
        files += sorted(maps.rglob("*"))
    stamps = [(t.image.key, stamp(t.image)) for t in data.truths], [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f]
    made = {"version": __version__, "annotations": data.sha256, "files": hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]}
    return json.loads(json.dumps({**made, "plan": plan.decisive(), "asked": asdict(ask)}))


def _read(file: Path) -> Any:
    """The JSON of a file, None if there is none."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
