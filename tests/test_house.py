"""The house keeps its order: imports go down only, the help path stays light, names resolve, and the README tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from depthseg import catalog, cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "depthseg"
README = ROOT / "README.md"

# A module may import modules of its own layer and of those above it in this list. `catalog.load` goes the other way, by dotted
# names in the table of names; a test below resolves them all.
LAYERS = {
    "ground": "depthseg errors plan pins catalog stages",
    "data": "schema masks prompts refine data selection journal sink formats metrics sa1b augment packs "
    "tables truth protocols predictions ap fates score published page report gallery compare album outlines export",
    "tensors": "backends edges models losses numerics",
    "stages": "fast_sam detect depth tasks weights pretrained",
    "segment": "reference peers exactness views predictor segment asking",
    "training": "learner curves preflight validation",
    "verbs": "evaluate train bench",
    "edge": "options terminal config doctor segment_cli data_cli train_cli bench_cli weights_cli models_cli table_cli eval_cli convert_cli "
    "cli __main__",
}
LEVEL = {module: level for level, names in enumerate(LAYERS.values()) for module in names.split()}
FOREIGN = {  # third parties that each layer may use, beside the standard library and what the layers above it may
    "ground": set(),
    "data": {"numpy", "PIL", "pycocotools", "scipy", "lvis"},
    "tensors": {"torch", "torchvision", "timm", "safetensors", "transformers", "openvino"},
    "stages": {"filelock", "transformers", "ultralytics", "groundingdino", "huggingface_hub"},
    "segment": set(),
    "training": {"tensorboard", "matplotlib"},
    "verbs": set(),
    "edge": {"typer", "rich"},
}
HEAVY = ("torch", "numpy", "PIL", "transformers")
VERBS = (
    "segment",
    "detect",
    "eval",
    "compare",
    "report",
    "convert",
    "depth",
    "train",
    "bench",
    "models",
    "weights",
    "data",
    "config",
    "doctor",
)


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The name in LAYERS of a file: its own, or that of its folder."""
    return path.parent.name if path.parent != PACKAGE or path.name == "__init__.py" else path.stem


def imports(tree: ast.AST):
    """Dotted names that a syntax tree imports, wherever they stand; `from depthseg import x` counts as depthseg.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            if node.module == "depthseg":
                yield from (f"depthseg.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path):
    here = room(path)
    assert here in LEVEL, f"give {path.name} a place in LAYERS"
    layer = list(LAYERS)[LEVEL[here]]
    allowed = set().union(*(names for (name, names) in FOREIGN.items() if list(LAYERS).index(name) <= LEVEL[here]))
    for name in imports(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top != "depthseg":
            assert top in sys.stdlib_module_names or top in allowed, f"{here} ({layer}) imports {top}"
            continue
        target = rest.partition(".")[0] or "depthseg"
        if target.startswith("__version__"):
            continue
        assert target in LEVEL, f"give {name} a place in LAYERS"
        assert LEVEL[target] <= LEVEL[here], f"{here} ({layer}) imports {name}, which lies higher"
        assert layer != "verbs" or LEVEL[target] < LEVEL[here] or target == here, f"the verb {here} imports the verb {target}"


@pytest.mark.parametrize("name", LAYERS["edge"].split())
def test_the_command_line_imports_no_more_than_the_ground_at_its_top(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for name in imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])):
        top, _, rest = name.partition(".")
        light = top in sys.stdlib_module_names or top == "typer" or name == "depthseg.__version__"
        rest = rest.partition(".")[0]
        assert light or (top == "depthseg" and rest in [*LAYERS["ground"].split(), *LAYERS["edge"].split()]), (
            f"it imports {name} at its top"
        )


def test_only_the_command_line_prints_or_exits():
    for path in files():
        if path.stem in LAYERS["edge"].split():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("print", "exit", "quit", "sys.exit", "os._exit", "typer.echo"), f"{path.name}:{node.lineno}"


WRAPPER = """
import sys
from depthseg.cli import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set("HEAVY".split()))
print("loaded:", *loaded, "code:", code, file=sys.stderr)
""".replace("HEAVY", " ".join(HEAVY))


@pytest.mark.parametrize(
    "words, code",
    [
        ("--help", 0),
        ("--version", 0),
        *((f"{verb} --help", 0) for verb in VERBS),
        ("segment --no-such-option", 2),
        ("segment x -o y --model no-such-model", 2),
        ("segment x -o y --model efficientvit-sam-l0", 5),
        ("segment x -o y --boxes no-such-file.json", 2),
    ],
)
def test_the_help_path_is_light(words, code):
    done = subprocess.run([sys.executable, "-c", WRAPPER, *words.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"loaded: code: {code}", done.stderr
    assert code or done.stdout.strip()


def test_python_m_depthseg_is_the_command():
    done = subprocess.run([sys.executable, "-m", "depthseg", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["depthseg", sys.modules["depthseg"].__version__]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{kind}-{name}")
        for kind, table in (("model", catalog.MODELS), ("depth", catalog.DEPTHS), ("detector", catalog.DETECTORS))
        for name, row in table.items()
    ],
)
def test_every_name_resolves(row):
    assert callable(catalog.resolve(row))
    assert row.licence or row.file is row.hub is None, "weights without terms"


# ---- the README ----


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.is_file():
        pytest.skip("no README.md yet")
    return README.read_text("utf-8")


def tree_of(text: str) -> set[str] | None:
    """The paths that the README's tree names: a fenced block whose first line starts with depthseg/, indented by folders.

    A line is one or more names, each a file with an extension or a folder with a slash, then at least two spaces and a remark.
    Other lines (headings, remarks that go on) are passed over.
    """
    block = re.search(r"^```\w*\n(depthseg/.*?)^```", text, re.S | re.M)
    if not block:
        return None
    name = r"[\w./-]+(?:/|\.\w+)"
    paths, folders = set(), []
    for line in block[1].splitlines():
        found = re.fullmatch(rf"( *)((?:{name})(?:, {name})*)(?:  .*)?", line.rstrip())
        if not found:
            continue
        indent = len(found[1])
        folders = [(i, f) for i, f in folders if i < indent]
        for item in found[2].split(", "):
            paths.add("".join(f for _, f in folders) + item)
        if found[2].endswith("/"):
            folders.append((indent, found[2]))
    return paths


def test_the_trees_reader():
    lines = [
        "depthseg/   the package",
        "  ---- ground",
        "  a.py    a thing",
        "          that goes on.py",
        "  m/",
        "    b.py, c.py   two",
    ]
    text = "\n".join(["```", *lines, "tests/   all", "```", ""])
    assert tree_of(text) == {"depthseg/", "depthseg/a.py", "depthseg/m/", "depthseg/m/b.py", "depthseg/m/c.py", "tests/"}


def test_the_readmes_tree_is_the_folder(readme):
    named = tree_of(readme)
    if named is None:
        pytest.skip("README.md has no tree yet")
    gone = {path for path in named if not (ROOT / path).exists()}
    assert not gone, f"README.md names what is not there: {sorted(gone)}"
    there = {path.relative_to(ROOT).as_posix() for path in files() if path.name != "__init__.py"}
    assert there <= named, f"README.md's tree lacks {sorted(there - named)}"


def options_of(verb: str) -> set[str]:
    command = typer.main.get_command(cli.app).commands[verb]
    own = set().union(*(set(p.opts + p.secondary_opts) for p in command.params))
    below = [set(p.opts + p.secondary_opts) for c in getattr(command, "commands", {}).values() for p in c.params]
    return {"-h", "--help"}.union(own, *below)


def test_the_readmes_commands_have_their_options(readme):
    for verb, words in re.findall(r"depthseg (\w+)((?:\\\n|[^\n`|;&#])*)", readme):
        given = set(re.findall(r"(?<!\S)(-[a-zA-Z]\b|--[a-z][a-z0-9-]*)", words))
        if verb in VERBS:
            assert given <= options_of(verb), f"depthseg {verb} has no {sorted(given - options_of(verb))}"
        else:
            assert not given, f"README.md uses depthseg {verb}, which is no command"
    root = {name for p in typer.main.get_command(cli.app).params for name in p.opts}
    known = set().union(*map(options_of, VERBS), root)
    alone = set(re.findall(r"`(--[a-z][a-z0-9-]*)", readme))
    assert alone <= known, f"no command has {sorted(alone - known)}"
