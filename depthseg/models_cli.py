"""`depthseg models`: what can be chosen and how large it is."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.terminal import listing, table


def models(
    names: Annotated[list[str] | None, typer.Argument(help="Measure these; without a name all are listed.", show_default=False)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Count parameters and multiply-adds of every segmentation model.")] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """List what can be chosen: models, depth estimators, detectors, their terms and whether their weights are here.

    [bold]depthseg models[/bold]\n
    [bold]depthseg models efficientvit-sam-l2 efficientvit-sam-l2-depth[/bold]   measured numbers beside the paper's
    """
    for name in names or []:
        catalog.row(catalog.MODELS, name, "model")
    if names or measure:
        _measured(names or list(catalog.MODELS), as_json)
    else:
        _listed(as_json)


def _measured(names: list[str], as_json: bool) -> None:
    from depthseg.bench import measure
    from depthseg.published import SIZES

    rows = []
    for name in names:
        got = measure(name)
        said = "; ".join(map(str, SIZES.get(name, ())))
        rows.append([name, str(catalog.MODELS[name].input), f"{got['params']:,}", f"{got['macs'] / 1e9:.2f} G", said])
    listing(["model", "input", "parameters", "encoder MACs", "published"], rows, as_json)


def _listed(as_json: bool) -> None:
    from depthseg import weights

    if as_json:
        known = {role: {name: {**asdict(e), "weights": weights.state(e)} for name, e in t.items()} for role, t in catalog.TABLES.items()}
        typer.echo(json.dumps({"schema_version": 1, **known}))
        return

    remarks: dict[str, list[str]] = {}
    for title, entries in (("model", catalog.MODELS), ("depth", catalog.DEPTHS), ("detector", catalog.DETECTORS)):
        rows = []
        for name, entry in entries.items():
            licence, _, remark = entry.licence.partition(": ")
            for text in filter(None, (remark, entry.note)):
                remarks.setdefault(text, []).append(name)
            size = f"{entry.millions:g} M" if entry.millions else ""
            macs = f"{entry.gmacs:g} G" if entry.gmacs else ""
            rows.append([name, str(entry.input or ""), size, macs, licence, weights.state(entry), entry.score])
        table([title, "input", "parameters", "encoder MACs", "licence", "weights", "published score"], rows)
    for text, which in remarks.items():
        typer.echo(f"{', '.join(dict.fromkeys(which))}: {text}")
