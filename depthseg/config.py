"""Settings: what an option is where the command line does not say.

The first that says something wins: the flag; DEPTHSEG_SEGMENT_BATCH, for one command; DEPTHSEG_BATCH, for all; the file of --config;
depthseg.toml in the current folder or, without one, [tool.depthseg] in its pyproject.toml; the default. In a file, a key above the tables
is for every command that has the option, and one in a table, like [segment], for that command; `depth` and `weights` are options where they
have a value, and tables where they have keys. Paths start from the current folder, as on the command line. Typer does the choosing: an
option is told its variables, and the context (`default_map`) what the files say, checked, and written as on the command line.
"""

import copy
import difflib
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from depthseg import options as opt
from depthseg.errors import DepthsegError
from depthseg.terminal import say, table

HERE = ("depthseg.toml", "pyproject.toml")  # in the current folder; the first that is there counts
FOLDER_OF_WEIGHTS = "DEPTHSEG_WEIGHTS"  # read by catalog.cache, hence not --weights of every command
ONE_CALL = {"debug"}  # options that make sense for a single call only

Words = tuple[str, ...]  # that call a command: ("segment",) or ("weights", "list")


def load(ctx: typer.Context, param: typer.CallbackParam, value: Path | None) -> Path | None:
    """What --config does, also where it is not given: every option of every command learns its variables and what the files say."""
    if ctx.resilient_parsing or (ctx.parent and value is None):  # a word is being completed; the root has done it already
        return value
    root: Any = ctx.find_root()
    known = {words: _options(command) for words, command in _commands(root.command)}
    for words, options in known.items():
        for key, option in options.items():
            names = [f"DEPTHSEG_{'_'.join([*words, key])}".upper(), f"DEPTHSEG_{key}".upper()]
            option.envvar = [name for name in names if name != FOLDER_OF_WEIGHTS]
            option.show_envvar = False  # two for each option would bury the help
            if (given := option.value_from_envvar(root)) is not None:
                _check(root, option, given, f"the variable {_variable(option)}")

    values: dict[Words, dict[str, Any]] = {words: {} for words in known}
    origins: dict[tuple[Words, str], Path] = {}
    for file in reversed(_files(value)):
        for (words, key), given in _spread(_read(file), known, file).items():
            option = known[words][key]
            values[words][option.name] = _check(root, option, given, f"'{key}' in {file}", in_file=True)
            origins[words, option.name] = file
    root.meta[__name__] = values, origins  # for `config show`
    root.default_map = {}
    for words, own in values.items():
        inner = root.default_map
        for word in words[:-1]:
            inner = inner.setdefault(word, {})
        inner[words[-1]] = own

    for words, command in _commands(root.command):
        if ctx.parent is None:  # so that --config may also stand after the command
            late: Any = copy.copy(param)
            late.expose_value, late.is_eager, late.envvar, late.rich_help_panel = False, True, None, opt.RUN
            command.params.append(late)
        elif command is ctx.command:
            ctx.default_map = values[words]
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="DEPTHSEG_CONFIG",
        show_envvar=False,
        callback=load,
        help="TOML file of options, over ./depthseg.toml and ./pyproject.toml; none reads no file. "
        "Variables, like DEPTHSEG_BATCH=8, come before files; `depthseg config show` tells.",
        metavar="FILE",
    ),
]


def _commands(group: Any, *words: str) -> Iterator[tuple[Words, Any]]:
    """Every command below a group, with the words that call it."""
    for name, below in group.commands.items():
        if hasattr(below, "commands"):
            yield from _commands(below, *words, name)
        else:
            yield (*words, name), below


def _options(command: Any) -> dict[str, Any]:
    """The options of a command that can be set, by their long name with underscores."""
    options = [p for p in command.params if p.param_type_name == "option" and p.expose_value]
    named = {max(option.opts, key=len).strip("-").replace("-", "_"): option for option in options}
    return {key: option for key, option in named.items() if key not in ONE_CALL}


def _variable(option: Any) -> str | None:
    """The environment variable that an option takes its value from, if one is set."""
    return next((name for name in option.envvar if os.environ.get(name)), None)


def _files(chosen: Path | None) -> list[Path]:
    if str(chosen) == "none":
        return []
    here = [path for path in map(Path, HERE) if path.is_file()]
    return [*([chosen] if chosen else []), *here[:1]]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DepthsegError(f"cannot read the settings in {file} ({error.strerror})", "Check --config.") from None
    except ValueError as error:  # also what is no UTF-8
        raise DepthsegError(f"{file} is no TOML: {error}", "Correct it, or go without it: depthseg --config none ...") from None
    return found.get("tool", {}).get("depthseg", {}) if file.name == "pyproject.toml" else found


def _spread(values: dict[str, Any], known: dict[Words, dict[str, Any]], file: Path, at: Words = ()) -> dict[tuple[Words, str], Any]:
    """Command and option -> value, of a file or of the table `at` of it; an inner table wins over what stands above it."""
    below = {words: options for words, options in known.items() if words[: len(at)] == at}
    tables = {words[len(at)] for words in below if len(words) > len(at)}
    found: dict[tuple[Words, str], Any] = {}
    for key, value in sorted(values.items(), key=lambda item: isinstance(item[1], dict)):  # tables last
        name = key.replace("-", "_")
        having = [words for words, options in below.items() if name in options]
        if isinstance(value, dict) and key in tables:
            found |= _spread(value, known, file, (*at, key))
        elif having:
            found |= {(words, name): value for words in having}
        else:
            where = f"[{'.'.join(at)}] of {file}" if at else str(file)
            names = tables if isinstance(value, dict) else {name for options in below.values() for name in options}
            raise DepthsegError(f"unknown key '{key}' in {where}", _nearest(name, names))
    return found


def _nearest(word: str, names: set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(names), n=1)
    return f"Did you mean {near[0]}?" if near else "What there is: depthseg --config none config show"


def _check(ctx: Any, option: Any, value: Any, where: str, in_file: bool = False) -> Any:
    """The value as the command line would give it, or an error that says where a value stands that the option does not take."""
    items = value if isinstance(value, list) else [value]
    wanted = ""
    if in_file and option.is_flag:
        wanted = "" if isinstance(value, bool) else "it is true or false"
    elif in_file and isinstance(value, list) != option.multiple:
        wanted = "it is a list" if option.multiple else "it is one value, no list or table"
    elif in_file:
        wanted = "" if all(type(item) in (str, int, float) for item in items) else "it is made of strings or numbers"
        value = [str(item) for item in items] if option.multiple else str(value)
    try:
        if not wanted:
            option.process_value(ctx, value)
            return value
    except typer.BadParameter as error:
        wanted = error.message
    raise DepthsegError(f"{where} does not fit {max(option.opts, key=len)}: {wanted}", "The command's --help says what it takes.")


app = typer.Typer(help="Settings: what each option is, and where that comes from.", no_args_is_help=True)


@app.command("show", context_settings={"ignore_unknown_options": True})
def show(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(help="Only this command, as with these options.", metavar="[COMMAND [OPTIONS]]")
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Print every option, its value and where that comes from: flag, environment, file or default.

    [bold]depthseg config show[/bold]\n
    [bold]depthseg --config my.toml config show segment --batch 8[/bold]
    """
    root = ctx.find_root()
    values, origins = root.meta[__name__]
    given = words or []
    every = dict(_commands(root.command))
    chosen = {called: command for called, command in every.items() if all(a == b for a, b in zip(called, given))}
    if not chosen:
        raise DepthsegError(f"no command is called '{' '.join(given)}'", _nearest(given[0], {" ".join(called) for called in every}))
    found: dict[str, dict[str, Any]] = {}
    for called, command in chosen.items():
        for param in command.params:
            param.required = False  # a run would ask for it, here it has no value yet
        inner = command.make_context(called[-1], given[len(called) :], parent=root, default_map=values[called])
        found[" ".join(called)] = {
            key: {"value": inner.params[option.name], **_source(inner, option, origins.get((called, option.name)))}
            for key, option in _options(command).items()
        }
    read = {name for command in every.values() for option in _options(command).values() for name in option.envvar}
    for name in sorted({n for n in os.environ if n.startswith("DEPTHSEG_")} - read - {FOLDER_OF_WEIGHTS, "DEPTHSEG_CONFIG"}):
        say(f"warning: no option reads {name}")
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "commands": found}, default=str))
        return
    rows = []
    for name, options in found.items():
        for key, about in options.items():
            value = "" if about["value"] is None else json.dumps(about["value"], default=str)
            rows.append([name, f"--{key.replace('_', '-')}", value, " ".join(filter(None, (about["source"], about["name"])))])
    table(["command", "option", "value", "from"], rows)


def _source(ctx: typer.Context, option: Any, file: Path | None) -> dict[str, str | None]:
    """Where the value of an option comes from, and the name of the variable or file."""
    source = ctx.get_parameter_source(option.name)
    kind = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file"}.get(source.name if source else "", "default")
    return {"source": kind, "name": {"environment": _variable(option), "file": str(file)}.get(kind)}
