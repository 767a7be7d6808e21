"""What of results is kept in the repository: reports and figures, no rows and no text of others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl_ema.comparison.report import write_report


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def is_repository():
    """Not of a source distribution, even if it was unpacked within the repository of something else."""
    top = git("rev-parse", "--show-toplevel")
    return top.returncode == 0 and Path(top.stdout.strip()).resolve() == ROOT.resolve()


def tracked(folder):
    """Files of the repository; of a copy without git, all."""
    if not is_repository():
        return [path for path in folder.rglob("*") if path.is_file()]
    listed = git("ls-files", "-z", folder)
    return [path for path in (ROOT / name for name in listed.stdout.split("\0") if name) if path.is_file()]


def test_results_are_small_and_hold_no_rows():
    files = tracked(RESULTS)
    assert {path.suffix for path in files} == {".md", ".html", ".json", ".png"}
    assert sum(path.stat().st_size for path in files) < 1_000_000
    # One level of folders: below it lie the runs.
    assert max(len(path.relative_to(RESULTS).parts) for path in files) == 2


def test_rows_and_texts_of_a_comparison_stay_out_of_the_repository():
    inside = [
        "plan.json", "samples.html", "base/text.json", "sft/seed_0/config.yaml", "sft/seed_0/metrics.json",
        "sft/seed_0/evaluation/student/generations.jsonl", "sft/seed_0/adapter_model.safetensors",
    ]  # fmt: skip
    asked = [str(RESULTS / "another" / name) for name in inside]
    if not is_repository():
        pytest.skip("not a git repository")
    assert git("check-ignore", *asked).stdout.split() == asked
    kept = [str(RESULTS / "another" / name) for name in ("comparison.json", "report.md", "report.html", "tasks.png")]
    assert not git("check-ignore", *kept).stdout


def test_a_copy_within_another_repository_is_not_taken_for_it(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    copy = tmp_path / "trl_ema-0.1.0"
    copy.mkdir()
    (copy / "a.md").write_text("not in the repository around it")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", copy)
    assert not is_repository() and tracked(copy) == [copy / "a.md"]
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert is_repository() and not tracked(tmp_path)


def test_no_definition_of_the_demo_set_is_in_the_repository(definitions):
    """Nor the beginning of one: the ontology is read at run time and never redistributed."""

    def beginnings(text, every=1):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[i : i + 8]) for i in range(0, max(1, len(words) - 7), every)}

    definitions = {next(iter(beginnings(row["completion"], 10**9))) for row in definitions}
    definitions = {text for text in definitions if len(text.split()) == 8}
    assert len(definitions) > 5000
    texts = [path for path in tracked(ROOT) if path.suffix not in (".png", ".ico")]
    found = {path.name: beginnings(path.read_text(encoding="utf-8")) & definitions for path in texts}
    assert not {name: held for name, held in found.items() if held}


@pytest.mark.parametrize("name", ["smollm2_medical"])
def test_a_kept_report_is_the_one_of_its_figures(tmp_path, name):
    shutil.copy(RESULTS / name / "comparison.json", tmp_path)
    write_report(str(tmp_path))
    for report in ("comparison.json", "report.md"):
        assert (tmp_path / report).read_text() == (RESULTS / name / report).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tracked(RESULTS / name)}
