"""`depthseg eval` and `depthseg compare` as a user types them, with the embedded model."""

import json

import pytest


def test_eval_prints_a_table_and_writes_a_report(run, pictures, coco_file, tmp_path):
    words = ["eval", "--images", pictures, "--annotations", coco_file, "--model", "nano"]
    code, stdout, err = run(*words, "-o", tmp_path / "a", "--dataset", "coco", "--expect", "mIoU>=1", "--expect", "baseline_box>99")
    assert code == 0, err
    assert "miou " in stdout and "95 % interval" in stdout and "Protocol official" in stdout and "research only" in err
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["schema_version"] == 1 and report["metrics"]["miou"] > 1 and report["provenance"]["command"].startswith("depthseg")
    assert stdout.splitlines()[-1] == str(tmp_path / "a" / "report" / "index.html")
    names = sorted(p.name for p in (tmp_path / "a").iterdir() if p.name != ".lock")
    assert names == ["predictions.json", "predictions.jsonl", "report", "report.json", "report.md", "run.json", "scores.json"]

    code, _, err = run(*words[:5], "--predictions", tmp_path / "a" / "predictions.json", "-o", tmp_path / "b", "--expect", "miou>100")
    assert code == 6 and "not met: miou>100" in err
    assert json.loads((tmp_path / "b" / "report.json").read_text())["metrics"] == report["metrics"]

    told = json.loads(run(*words, "-o", tmp_path / "a", "--json")[1])
    assert told["metrics"] == report["metrics"]
    assert json.loads(run("compare", tmp_path / "a", tmp_path / "b", "--json")[1])["headline"] == "miou"
    code, stdout, err = run("compare", tmp_path / "a", tmp_path / "b", "--fail-on-regression", "0")
    assert code == 0 and "+0.00 to +0.00" in stdout and "0 images got better" in stdout, err
    (tmp_path / "b" / "report.json").write_text(json.dumps({**report, "metrics": {**report["metrics"], "miou": 0.5}}))
    code, stdout, err = run("compare", tmp_path / "a", tmp_path / "b", "--fail-on-regression", "0.1")
    assert code == 6 and "miou fell" in err

    (pictures / "b.jpg").write_bytes(b"")
    code, stdout, err = run(*words, "--prompt", "detector", "--detector", "nano", "--depth", "none")
    assert code == 3 and "failed: b.jpg" in err and "1 FAILED" in stdout and "recall_50" in stdout
    assert not (tmp_path / "predictions.json").exists()


def test_eval_of_clicks_can_be_drawn_at_random(run, pictures, coco_file, tmp_path):
    words = ["eval", "--images", pictures, "--annotations", coco_file, "--prompt", "point", "--protocol", "efficientsam"]
    code, stdout, err = run(*words, "--clicks", "2,1", "--ablate-depth", "--only", "a.png", "--only", "b.jpg", "-o", tmp_path / "o")
    assert code == 0 and "miou_2 " in stdout and "what depth adds" in stdout, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["clicks"] == [1, 2] and set(report["ablation"]["modes"]) == {"on", "off", "constant", "shuffled"}


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ("--expect nonsense", 2, "cannot be read"),
        ("--expect moiu>=3", 2, "Did you mean miou"),
        ("--expect miou>=1.2.3", 2, "cannot be read"),
        ("--prompt point --protocol efficientsam --seed -1", 2, "--seed"),
        ("--detector yolov8m", 2, "--prompt detector"),
        ("--prompt detector --detector yolov8m", 5, "not on this machine"),
        ("--predictions nowhere.json", 2, "cannot read"),
        ("--predictions x --ablate-depth", 2, "--ablate-depth"),
        ("--dataset lvis", 2, "is a COCO file"),
        ("--prompt point --clicks 999", 2, "after (999,) clicks"),
        ("--only z.png", 4, "is called z.png"),
        ("--ablate-depth --model nano", 2, "no depth to be changed"),
    ],
)
def test_eval_refuses_in_a_sentence(run, pictures, coco_file, words, code, reason):
    found, _, err = run("eval", "--images", pictures, "--annotations", coco_file, "--model", "nano", *words.split())
    assert (found, True) == (code, reason in err), err
    assert "Traceback" not in err and "hint: " in err
