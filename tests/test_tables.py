"""The papers' tables: their layout from reports, and the cells of `depthseg eval --table`."""

import json

import pytest

from depthseg import published, tables
from depthseg.plan import TABLES
from depthseg.protocols import PROTOCOLS, in_words


def report(prompt="box", values=(60.0, 50.0, 61.25, None), figures=True, failed=(), clicks=None):
    names = [f"miou_{n}" for n in clicks] if clicks else published.METRICS[prompt]
    rows = {"metrics": list(published.METRICS[prompt]), "rows": published.rows("coco", prompt, "vitdet" * (prompt == "detector"))}
    return {
        "prompt": prompt,
        "clicks": clicks,
        "metrics": dict(zip(names, values, strict=False)),
        "published": rows if figures else None,
        "dataset": {"annotations": "coco/val.json"},
        "state": {"done": 5000, "left_out": 0, "failed": list(failed)},
        "protocol_in_words": ["Protocol official."],
    }


def test_a_row_for_each_model_and_the_papers_beside_them():
    cells = {("COCO", "a"): report(), ("LVIS", "a"): report(figures=False), ("COCO", "b"): report(values=(70, 1, 2, 3), failed=[1])}
    made = tables.layout(3, cells, ["a", "b"])
    assert made.head[:3] == ["model", "COCO mIoU", "COCO mIoU, small"] and made.head[-1] == "source" and len(made.head) == 10
    assert made.rows[0] == ["a", "60.0", "50.0", "61.2", "–", "60.0", "50.0", "61.2", "–", "this run"]
    assert made.rows[1] == ["b", "70.0", "1.0", "2.0", "3.0", "–", "–", "–", "–", "this run"]
    paper = next(row for row in made.rows if row[0] == "EfficientViT-SAM-L2" and "Table 3" in row[-1])
    assert paper[1:9] == ["75.6", "69.7", "78.7", "81.7", "–", "–", "–", "–"]  # LVIS: not the whole set
    assert "b on COCO: 1 images FAILED and are not in the scores." in made.notes and "COCO: 5,000 images of val.json." in made.notes
    lines = made.markdown().splitlines()
    assert lines[0] == "# Table 3: true boxes" and lines[2].startswith("| model | COCO mIoU |")


def test_clicks_and_detectors_have_their_columns():
    made = tables.layout(2, {("COCO", "a"): report("point", (40, 50), clicks=[1, 3])}, ["a"])
    assert made.head == ["model", "COCO mIoU, 1 click", "COCO mIoU, 3 clicks", "source"]
    assert ["SAM-ViT-H", "58.4", "69.6"] in [row[:3] for row in made.rows]
    made = tables.layout(1, {("COCO vitdet", "a"): report("detector", (1, 2, 3, 4))}, ["a"])
    assert made.head[1] == "COCO vitdet AP" and made.rows[0][1:5] == ["1.0", "2.0", "3.0", "4.0"]


def test_efficientsams_figures_are_of_its_own_protocol():
    own, others = (published.rows("coco", "point", protocol=name) for name in ("efficientsam", "official"))
    assert {r["model"]: r["values"] for r in own}["EfficientSAM-S"] == {"miou_1": 50.0, "miou_3": 69.8}
    assert not {r["source"] for r in own} & {r["source"] for r in others} and not published.rows("coco", "box", protocol="strict")


WORDS = ["eval", "--zoom", "--models", "nano,nano-depth"]  # crops are quick


def words(pictures, coco_file, out, *more):
    return [*WORDS, "--images", pictures, "--annotations", coco_file, "-o", out, *more]


def test_a_table_goes_on_by_cell(run, pictures, coco_file, tmp_path):
    out = tmp_path / "o"
    code, stdout, err = run(*words(pictures, coco_file, out, "--table", "3"))
    assert code == 0 and "COCO mIoU, small" in stdout and stdout.splitlines()[-1] == str(out / "table3" / "table.md"), err
    cells = [out / "table3" / "coco" / name for name in ("nano", "nano-depth")]
    scores = [json.loads((cell / "report.json").read_text())["metrics"]["miou"] for cell in cells]
    made = json.loads((out / "table3" / "table.json").read_text())
    assert [row[:2] for row in made["rows"]] == [["nano", f"{scores[0]:.1f}"], ["nano-depth", f"{scores[1]:.1f}"]]
    assert "| nano |" in (out / "table3" / "table.md").read_text()

    before = [(cell / "report.json").stat().st_mtime_ns for cell in cells]
    (cells[1] / "cell.json").unlink()  # as where a run was killed in this cell
    code, stdout, err = run(*words(pictures, coco_file, out, "--table", "3", "--json"))
    assert code == 0 and json.loads(stdout) == made and "coco, nano: done already" in err and "coco, nano-depth: done" not in err
    assert (cells[0] / "report.json").stat().st_mtime_ns == before[0] and (cells[1] / "report.json").stat().st_mtime_ns > before[1]

    (pictures / "b.jpg").write_bytes(b"")  # other pictures: asked again
    code, stdout, err = run(*words(pictures, coco_file, out, "--table", "3"))
    assert code == 3 and "done already" not in err and "FAILED" in stdout
    code, _, err = run(*words(pictures, coco_file, out, "--table", "3", "--refine", "mirror"))
    assert code == 2 and "other options" in err and "refine" in err


def test_tables_of_clicks_and_of_a_detector(run, pictures, coco_file, tmp_path):
    code, stdout, err = run(*words(pictures, coco_file, tmp_path, "--table", "2", "--protocol", "efficientsam", "--only", "a.png"))
    assert code == 0 and "COCO mIoU, 3 clicks" in stdout and "5 clicks" not in stdout and "drawn uniformly" in stdout, err
    code, stdout, err = run(*words(pictures, coco_file, tmp_path, "--table", "1", "--detector", "nano"))
    assert code == 0 and "COCO nano AP" in stdout, err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("table")) == ["table1", "table2"]


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--table", "4"], 2, "--table"),
        (["--table", "3", "--models", ","], 2, "no model is named"),
        (["--table", "3", "--models", "nano,nanu"], 2, "Did you mean nano"),
        (["--table", "3", "--models", "nano,efficientvit-sam-l0"], 5, "not on this machine"),
        (["--table", "1"], 5, "coco_vitdet"),
        (["--table", "3", "--detector", "nano"], 2, "--table 1"),
        (["--table", "3", "--weights", "x.pt"], 2, "several models"),
        (["--table", "3", "--prompt", "box"], 2, "single evaluation"),
        (["--table", "3", "--expect", "miou>3"], 2, "single evaluation"),
        ([], 2, "its number and its rows"),
    ],
)
def test_a_table_refuses_in_a_sentence(run, pictures, coco_file, tmp_path, more, code, reason):
    found, _, err = run(*words(pictures, coco_file, tmp_path / "o", *more))
    assert (found, True) == (code, reason in err), err
    assert "Traceback" not in err and not (tmp_path / "o" / "table3" / "coco").exists()


def test_every_protocol_is_described(run):
    told = " ".join(run("eval", "--help")[1].replace("│", " ").split())
    for name in PROTOCOLS:
        assert f"{name} (" in told or f"{name}: " in told, name
    for name, prompt, sentence in (
        ("official", "point", "deepest point of the mask"),
        ("efficientsam", "point", "drawn uniformly"),
        ("amr", "point", "drawn uniformly"),
        ("official", "box", "bbox fields"),
        ("efficientsam", "box", "tightest boxes"),
        ("efficientsam", "detector", "IoU with the box"),
    ):
        assert sentence in " ".join(in_words(name, prompt))
    assert "Refined (rim): " in " ".join(in_words("official", "box", refine="rim")) and set(TABLES) == {1, 2, 3}
