"""Several domains in a row: a real comparison of two stages on a tiny model, and its figures."""

import json
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import qwen2_tokenizer, rows
from test_comparison import check_tags

from trl_ema.cli import train
from trl_ema.comparison import run as running
from trl_ema.comparison.figures import summarize_comparison
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.report import write_report
from trl_ema.comparison.rows import RunData, shared_rows
from trl_ema.comparison.run import run_comparison
from trl_ema.comparison.statistics import backward_transfer, forward_transfer, stage_forgetting
from trl_ema.comparison.trackers import _figures
from trl_ema.comparison.training import START, train_together
from trl_ema.evaluation.answers import summarize
from trl_ema.evaluation.drift import measure_drift, tokenized_batches
from trl_ema.evaluation.models import load_base, with_adapter
from trl_ema.files import read_json, write_json, write_jsonl
from trl_ema.inputs import held_out_rows, load_parts
from trl_ema.script import options_of_run
from trl_ema.texts import Sampling, texts_path


pytestmark = pytest.mark.usefixtures("lm_evals_files_read_once")


ROOT = Path(__file__).parents[1]
PLAN = {
    "training": dict(
        use_cpu=True, bf16=False, max_steps=3, learning_rate=2e-2, per_device_train_batch_size=4, max_length=48, logging_steps=1,
        save_strategy="no", eval_fraction=0.2, dtype="float32", report_to="none", gradient_checkpointing=False,
        model_name_or_path="model", dataset_name="data.jsonl", disable_tqdm=True,
    ),
    "stages": [{"name": "first"}, {"name": "second", "dataset_name": "texts.jsonl", "max_steps": 4}],
    "arms": {
        "sft": {"teacher": "none"},
        "ema": {"teacher": "ema", "learning_rate_scale": 0.5},
        "half": {"interpolate": "sft", "scales": [0.5]},
    },
    "seeds": [0],
    "evaluation": {"domain_samples": 6, "generation_tokens": 0, "scales": [0.5]},
}  # fmt: skip


def write_plan(tiny_folder, folder, **changes):
    """A plan file in `folder`, and the data of its second stage, which is plain text."""
    if not (folder / "texts.jsonl").exists():
        (folder / "texts.jsonl").write_text(
            "".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows(40, seed=5))
        )
    text = json.dumps(PLAN | changes).replace('"texts.jsonl"', json.dumps(str(folder / "texts.jsonl")))
    plan = json.loads(text)
    if "model_name_or_path" in plan["training"]:
        plan["training"] |= {
            "model_name_or_path": str(tiny_folder / "model"),
            "dataset_name": str(tiny_folder / "data.jsonl"),
        }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return str(folder / "plan.yaml")


@pytest.fixture(scope="module")
def plan(tiny_folder, tmp_path_factory):
    """A file, which the tests of this module change nothing of."""
    return write_plan(tiny_folder, tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def in_this_process():
    """A context in which the trainings of a comparison are the real ones, but no processes of their own."""
    start = subprocess.run

    def run(command, **options):
        return train(command[4:]) if "trl_ema" in command else start(command, **options)

    @contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "run", run)
            yield

    return context


@pytest.fixture(scope="module")
def comparison(plan, in_this_process, tmp_path_factory):
    """One that was run to its end: its first stage alone, then both."""
    found = load_comparison(plan, str(tmp_path_factory.mktemp("stages") / "out"))
    with in_this_process():
        run_comparison(found, arms=["sft"], stages=["first"])
        assert sorted(path.parent.name for path in Path(found.output_dir).rglob("metrics.json")) == ["first"]
        run_comparison(found)
    write_report(found.output_dir)
    return found


@pytest.fixture
def copied(comparison, plan, tmp_path):
    """A copy of it in another place, to be changed."""
    shutil.copytree(comparison.output_dir, tmp_path / "out")
    return load_comparison(plan, str(tmp_path / "out"))


@pytest.fixture
def nothing_trained(monkeypatch):
    """What would have been started instead."""
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: started.append(command[-1]))
    return started


def folders(comparison, arm="sft"):
    return [Path(stage.folder(arm, 0)) for stage in comparison.by_stage()]


def test_each_stage_goes_on_from_the_adapter_of_the_one_before(comparison):
    first, second = folders(comparison)
    assert (first.relative_to(comparison.output_dir).as_posix(), second.name) == ("sft/seed_0/first", "second")
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["adapter_name_or_path"] == str(first) and (config["max_steps"], config["learning_rate"]) == (4, 2e-2)
    assert "adapter_name_or_path" not in yaml.safe_load((first / "config.yaml").read_text())
    assert yaml.safe_load((folders(comparison, "ema")[1] / "config.yaml").read_text())["learning_rate"] == 1e-2
    assert read_json(second / "metrics.json")["provenance"]["adapter"] == str(first)
    assert [len(read_json(folder / "metrics.json")["log"]) for folder in (first, second)] == [4, 5]


def test_every_domain_is_measured_after_every_stage_from_the_base(comparison, tiny_folder):
    """The figures of the files, against the rows that each run held out and the adapters as they lie."""
    summary = summarize_comparison(comparison.output_dir)
    assert not summary["missing"]
    stages = summary["stages"]
    assert stages["names"] == ["first", "second"]
    assert [way["label"] for way in stages["ways"]] == ["sft", "ema", "ema, teacher", "half, × 0.5"]
    held_out, settings = [], []
    for folder in folders(comparison):
        options = options_of_run(str(folder))
        held_out.append(held_out_rows(str(folder), options))
        settings.append(options[1])
    assert held_out[1].column_names == ["text"] and len(held_out[0]) == len(held_out[1]) == 6
    way = stages["ways"][0]
    for i, folder in enumerate(folders(comparison)):
        model, tokenizer = load_base(str(tiny_folder / "model"))
        model, _ = with_adapter(model, str(folder))
        for j, (found, own) in enumerate(zip(held_out, settings, strict=True)):
            expected = measure_drift(model, tokenized_batches(found, tokenizer, 1024, 16, own))
            assert way["after"][i]["loss"][j]["mean"] == pytest.approx(expected["loss"], rel=1e-4)
            if folder.name == "second" and j == 1:
                kl = read_json(folder / "evaluation" / "student" / "text.json")["domain"]["kl_base_model"]
                assert kl == pytest.approx(expected["kl_base_model"], rel=1e-3) and kl > 0
        assert way["after"][i]["drift"]["general"]["mean"] > 0
    before = [found["mean"] for found in stages["before"]["loss"]]
    after = [[found["mean"] for found in stage["loss"]] for stage in way["after"]]
    assert after[0][0] < before[0] and after[1][1] < after[0][1]  # each stage learns its domain
    assert way["backward_transfer"]["mean"] == pytest.approx(after[0][0] - after[1][0])
    assert way["forgetting"]["mean"] == pytest.approx(after[1][0] - after[0][0])
    assert way["forward_transfer"]["mean"] == pytest.approx(before[1] - after[0][1])
    assert way["mean_loss"]["mean"] == pytest.approx(sum(after[1]) / 2)
    low, high = (way["backward_transfer"][key] for key in ("low", "high"))
    assert low < way["backward_transfer"]["mean"] < high  # over rows
    # All other figures are of the last stage, and the curves of one stage after the other.
    (sft,) = [point for point in summary["points"] if point["label"] == "sft"]
    assert sft["domain_loss"]["mean"] == pytest.approx(after[1][1])
    assert sft["domain_loss"] == way["after"][1]["loss"][1]  # with the same interval
    assert [step for step, _ in summary["curves"]["ce_loss"]["sft"]] == list(range(1, 8))
    # A curve over the scales is of the last one.
    assert [(folder / "evaluation/student/curve.json").exists() for folder in folders(comparison)] == [False, True]


def test_a_report_tells_the_stages(comparison, tmp_path):
    folder = Path(comparison.output_dir)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    check_tags(page)
    summary = read_json(folder / "comparison.json")
    for way in summary["stages"]["ways"]:
        told = f"| {way['label']} | 1 | {way['backward_transfer']['mean']:+.3f} ("
        assert told in text and f"{way['backward_transfer']['mean']:+.3f}<small>" in page
        learned = way["after"][0]["loss"][0]["mean"]
        assert f"| {way['label']} | first | **{learned:.3f} (" in text and f"<b>{learned:.3f}</b>" in page
    assert (
        "Each arm learned first, then second" in text and "](stages.png)" in text and (folder / "stages.png").is_file()
    )
    assert "loss, first" in page and "loss, second" in page
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0])["stages"][1]["name"] == "second"
    assert re.search(r"- data: first: .*data.jsonl; second: .*texts.jsonl", text)
    shutil.copy(folder / "comparison.json", tmp_path)
    write_report(str(tmp_path))
    for name in ("report.md", "report.html", "stages.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert _figures(summary)["ema, teacher"]["backward transfer"] is not None


def test_rows_that_another_stage_trains_on_are_counted_and_told(copied, tiny_folder, tmp_path, caplog):
    assert "shared_rows" not in read_json(Path(copied.output_dir, "plan.json"))
    stages = [{"name": "first"}, {"name": "second", "split_seed": 1}]  # of one file, held out in two ways
    found = load_comparison(write_plan(tiny_folder, tmp_path, stages=stages), str(tmp_path / "other"))
    by_run = running._parsed(found)
    parsed = [next(iter(of_stage.values())) for of_stage in by_run]
    shared = shared_rows(found, by_run, RunData())
    expected = []
    for held, trained in ((0, 1), (1, 0)):
        (one,), (other,) = (load_parts(parsed[i][0], qwen2_tokenizer()) for i in (held, trained))
        number = sum(row in list(other.train) for row in one.held_out)
        names = dict(held_out=stages[held]["name"], trained=stages[trained]["name"])
        expected += [names | dict(rows=number, of=len(one.held_out))] if number else []
    assert shared == {"shared_rows": expected} and expected
    one = expected[0]
    told = f"{one['rows']} of the {one['of']} held-out rows of stage {one['held_out']!r} are among the training rows of stage"
    assert told in caplog.text
    path = Path(copied.output_dir, "plan.json")
    write_json(path, read_json(path) | shared)
    write_report(copied.output_dir)
    told = f"{one['rows']} of the {one['of']} held-out rows of {one['held_out']} were trained on in {one['trained']}"
    assert f"**{told}**:" in path.with_name("report.md").read_text()
    page = path.with_name("report.html").read_text()
    assert f"<b>{told}</b>:" in page and "R<sub>Tj</sub> − R<sub>jj</sub>" in page and "R<sub>(j−1)j</sub>" in page
    check_tags(page)
    # Where there are no stages, of arms with other data.
    plan = read_json(path)
    del plan["stages"]
    write_json(path, plan | {"shared_rows": [{"held_out": "the domain", "trained": "arm b", "rows": 3, "of": 16}]})
    summary = read_json(path.with_name("comparison.json"))
    del summary["stages"]
    alone = tmp_path / "alone"
    write_json(alone / "comparison.json", summary | {"plan": read_json(path)})
    write_report(str(alone))
    told = "3 of the 16 held-out rows of the domain were trained on by arm b"
    assert f"**{told}**:" in (alone / "report.md").read_text()
    assert f"<b>{told}</b>:" in (alone / "report.html").read_text()


def test_tasks_are_told_after_each_stage(copied):
    """Four questions, answered as it is written here: two right before, three after the first stage and one after the second."""
    folder = Path(copied.output_dir)
    plan = read_json(folder / "plan.json")
    plan["evaluation"]["retention_tasks"] = {"quiz": {}}
    for stage in plan["stages"]:
        stage["tasks"] = ["quiz"]
    write_json(folder / "plan.json", plan)
    for place, right in [(folder / "base", 2)] + [
        (way, 3 if way.parts[-3] == "first" else 1) for way in folder.glob("*/seed_0/*/evaluation/*")
    ]:
        same = {"task": "quiz", "doc_hash": "x", "prompt_hash": "y", "metric": "acc", "chance": 0.25}
        answers = [{"doc_id": i, "score": float(i < right), **same} for i in range(4)]
        write_jsonl(place / "quiz.jsonl", answers)
        write_json(place / "quiz.json", summarize(answers) | {"settings": {}})
    write_report(copied.output_dir)
    way = read_json(folder / "comparison.json")["stages"]["ways"][1]
    assert [stage["tasks"]["quiz"]["mean"] for stage in way["after"]] == [0.75, 0.25]
    found = [
        line.split(" | ") for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ema | ")
    ]
    assert [(cells[1], cells[-1][:5]) for cells in found if cells[1] in ("first", "second")] == [
        ("first", "0.750"),
        ("second", "0.250"),
    ]
    # R is 0.5, 0.75 and 0.25 before and after each stage, on the tasks of both.
    means = {name: figure["mean"] for name, figure in way["accuracy"].items()}
    assert means == {"backward_transfer": -0.5, "forgetting": 0.5, "forward_transfer": 0.25, "mean": 0.25}
    page = (folder / "report.html").read_text()
    check_tags(page)
    assert "| ema | -50.0" in (folder / "report.md").read_text() and "-50.0<small>" in page
    assert "first: quiz; second: quiz" in page


def test_an_arm_that_is_not_through_is_shown_as_far_as_it_came(copied):
    shutil.rmtree(folders(copied, "ema")[1])
    write_report(copied.output_dir)
    folder = Path(copied.output_dir)
    summary, text = read_json(folder / "comparison.json"), (folder / "report.md").read_text()
    ways = {way["label"]: way for way in summary["stages"]["ways"]}
    assert {label: len(way["after"]) for label, way in ways.items()} == {
        "sft": 2, "half, × 0.5": 2, "ema": 1, "ema, teacher": 1,
    }  # fmt: skip
    assert ways["ema"]["backward_transfer"] is None and ways["ema"]["mean_loss"] is None
    assert len(ways["ema"]["after"][0]["loss"]) == 2
    assert "| ema | 1 | – | – | – | – |" in text and "| ema | first | **" in text and "| ema | second |" not in text
    assert "ema, seed 0: not trained (ema/seed_0/second)" in summary["missing"]
    assert "backward transfer" in _figures(summary)["sft"] and "ema" not in _figures(summary)
    assert (folder / "stages.png").is_file()
    check_tags((folder / "report.html").read_text())


def test_what_is_done_is_not_done_again_and_what_is_not_goes_on(comparison, copied, nothing_trained):
    run_comparison(copied)  # in another place
    assert not nothing_trained
    (folders(copied)[1] / "metrics.json").unlink()
    (folders(copied)[1] / "checkpoint-2").mkdir()
    start = (folders(copied)[1] / START).read_text()
    run_comparison(copied)
    assert nothing_trained == [str(folders(copied)[1] / "config.yaml")]
    assert (folders(copied)[1] / START).read_text() == start
    nothing_trained.clear()
    # A stage does not begin where the one before was stopped, nor where there are several jobs.
    for folder in folders(copied):
        shutil.rmtree(folder)
    run_comparison(copied, arms=["sft"])
    train_together(copied, [(copied.arms["sft"], 0)], 2)
    assert nothing_trained == 2 * [str(folders(copied)[0] / "config.yaml")]
    assert "sft, seed 0: not trained (sft/seed_0/first)" in summarize_comparison(copied.output_dir)["missing"]
    run_comparison(copied, evaluate_only=True)


def test_a_stage_that_fails_is_named(copied, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    (folders(copied)[1] / "metrics.json").unlink()
    with pytest.raises(
        ValueError, match="training of sft, seed 0, stage second, failed; what it said is in .*second/train.log"
    ):
        train_together(copied, [(copied.arms["sft"], 0)], 2)


def test_an_interrupted_stage_goes_on_as_if_it_had_not_been(in_this_process, tiny_folder, tmp_path):
    """Trained with checkpoints, cut off after the second step, and gone on with: the same weights."""
    training, evaluation = PLAN["training"] | {"save_strategy": "steps", "save_steps": 2}, {"generation_tokens": 0}
    changed = write_plan(tiny_folder, tmp_path, training=training, evaluation=evaluation)
    found = load_comparison(changed, str(tmp_path / "out"))
    with in_this_process():
        run_comparison(found, arms=["sft"])
    second = folders(found)[1]
    whole = (second / "adapter_model.safetensors").read_bytes()
    for name in ("metrics.json", "adapter_model.safetensors", "checkpoint-4"):
        path = second / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = second / "checkpoint-2" / "trainer_state.json"
    written = kept.stat().st_mtime_ns
    with in_this_process():
        run_comparison(found, arms=["sft"])
    assert read_json(second / "metrics.json")["provenance"]["steps"] == 4
    assert kept.stat().st_mtime_ns == written  # which a new training would have written again
    assert (second / "adapter_model.safetensors").read_bytes() == whole


def another_adapter(comparison):
    path = folders(comparison)[0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def without_first(comparison):
    shutil.rmtree(folders(comparison)[0])


def without_first_weights(comparison):
    (folders(comparison)[0] / "adapter_config.json").unlink()
    shutil.rmtree(folders(comparison)[1])


def with_configuration_alone(comparison):
    (folders(comparison)[0] / "adapter_model.safetensors").unlink()
    shutil.rmtree(folders(comparison)[1])


def with_whole_model(comparison):
    without_first_weights(comparison)
    for name in ("config.json", "model.safetensors"):
        (folders(comparison)[0] / name).touch()


def without_both(comparison):
    for folder in folders(comparison):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        (without_both, {"stages": ["second"]}, r"Stages out of order: sft, seed 0, stage second, goes on from stage 'first', whose run in .*first is not done. Train that first, or both together: `--stages first second`"),
        (without_first, {}, r"holds sft, seed 0, stage second, and the stage before it, 'first', is not trained .* Put it back, or delete the folder"),
        (another_adapter, {}, r"which went on from another adapter of the stage 'first' than .* holds now. Delete the folder of the later stage"),
        (another_adapter, {"evaluate_only": True}, "which went on from another adapter"),
        (without_first_weights, {}, r"goes on from stage 'first', which was kept without its weights: .*/first holds no adapter .* Put them back"),
        (with_configuration_alone, {}, r"goes on from stage 'first', .*/first holds no weights of its adapter \(adapter_model.safetensors is missing"),
        (with_whole_model, {}, r"goes on from stage 'first', .*/first holds a whole model and no adapter"),
        (lambda _: None, {"stages": ["third"]}, r"The comparison has no stages \['third'\]; expected some of \['first', 'second'\]"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_go_on_is_refused_before_anything_is(copied, monkeypatch, change, asked, message):
    monkeypatch.setattr(running, "load_base", lambda *args, **kwargs: pytest.fail("loaded a model"))
    change(copied)
    with pytest.raises(ValueError, match=message):
        run_comparison(copied, arms=["sft"], **asked)


def test_stages_in_another_order_are_other_runs(copied, tiny_folder, tmp_path):
    changed = write_plan(tiny_folder, tmp_path, stages=PLAN["stages"][::-1])
    with pytest.raises(
        ValueError, match="holds a finished run with other options .*adapter_name_or_path: 'first' then, None now"
    ):
        run_comparison(load_comparison(changed, copied.output_dir), evaluate_only=True)


@pytest.mark.parametrize("left", [(), ("adapter_config.json",)])
def test_a_stage_kept_without_its_weights_counts(copied, nothing_trained, left):
    for name in {"adapter_model.safetensors", "adapter_config.json"} - {*left}:
        (folders(copied)[0] / name).unlink()
    run_comparison(copied)
    assert not nothing_trained and not summarize_comparison(copied.output_dir)["missing"]


TWO = [{"name": "first"}, {"name": "second"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"first": {}}}, r"`stages` in .* is {'first': {}}; expected a list"),
        ({"stages": [{"dataset_name": "a.jsonl"}]}, r"Stage 1 in .* is {'dataset_name': 'a.jsonl'}; expected a `name` and the options"),
        ({"stages": ["first", "second"]}, "Stage 1 in .* is 'first'; expected a `name`"),
        ({"stages": [{"name": "a/b"}, {"name": "c"}]}, "is named 'a/b'; it becomes a folder"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "has 'a' twice; a stage becomes a folder. Rename one"),
        ({"stages": [{"name": "a"}]}, "has 1; expected at least two.* give the options under `training`"),
        ({"stages": []}, "has 0; expected at least two"),
        ({"stages": [{"name": "general"}, {"name": "a"}]}, "a stage named 'general', which is the name of something else"),
        ({"stages": [{"name": "a", "tasks": "x"}, {"name": "b"}]}, "`tasks` of stage 'a' in .* is 'x'; expected a list of names"),
        (
            {"stages": [{"name": "a", "tasks": ["x"]}, {"name": "b"}], "evaluation": {"domain_tasks": {"x": {}}}},
            "Stage 'b' has no `tasks`, and 'a' has some: transfer in accuracy needs those of every stage",
        ),
        (
            {"stages": [{"name": "a", "tasks": ["x"]}, {"name": "b", "tasks": ["y"]}], "evaluation": {"domain_tasks": {"x": {}}}},
            r"Stage 'b' has `tasks` \['y'\], which are not measured; expected some of \['x'\]",
        ),
        ({"stages": TWO, "evaluation": {"drift_data": {"first": "x.jsonl"}}}, "a stage named 'first', which is the name of"),
        *(
            ({"stages": [{"name": "a"}, {"name": "b", option: "x"}]}, rf"Stage 'b' in .* sets \['{option}'\], which the comparison itself sets")
            for option in ("seed", "output_dir", "adapter_name_or_path", "model_name_or_path", "eval_samples")
        ),
        ({"stages": [{"name": "a", "learning_rate_scale": 2}, {"name": "b"}]}, "Stage 'a' has `learning_rate_scale`, which is an arm's"),
        (
            {"stages": [{"name": "a"}, {"name": "b", "kl_weight": 2}], "arms": {"ema": {"kl_weight": 1}}},
            r"Stage 'b' and arm 'ema' both set \['kl_weight'\]. Give each option in one of them",
        ),
    ],
)  # fmt: skip
def test_stages_with_a_mistake_are_refused(tiny_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_comparison(write_plan(tiny_folder, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "a"}, {"name": "b", "max_step": 2}]}, "options of sft, seed 0, stage b, cannot be: .*max_step"),
        ({"stages": [{"name": "a"}, {"name": "b", "lora_r": 2}]}, r"Stage 'b' sets \['lora_r'\]: model, adapter and method stay the same"),
        ({"stages": [{"name": "a"}, {"name": "b", "teacher": "none"}], "arms": {"x": {}}}, r"Stage 'b' sets \['teacher'\]: model, adapter and"),
        (
            {"arms": {"x": {"teacher": "none", "rehearsal_weight": 1, "rehearsal_texts": "t.safetensors"}}},
            "x, seed 0, stage second, has `rehearsal_texts='t.safetensors'`, texts of one model, and each stage begins with another",
        ),
        (
            {"training": PLAN["training"] | {"adapter_name_or_path": "somewhere"}},
            "Arm 'sft' goes on from an adapter, and a comparison measures every arm from its base",
        ),
    ],
)  # fmt: skip
def test_options_of_stages_that_cannot_be_are_refused_before_anything_is(
    tiny_folder, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(running, "load_base", lambda *args, **kwargs: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=message):
        run_comparison(load_comparison(write_plan(tiny_folder, tmp_path, **changes), str(tmp_path / "out")))


@pytest.fixture
def checked(tiny_folder, tmp_path, monkeypatch):
    """Run a plan, launched by accelerate, to the end of what is checked beforehand; the runs that are given are done already."""
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))

    class Checked(Exception):
        pass

    def stop(_):
        raise Checked

    monkeypatch.setattr(running, "_check_same_tokenizer", stop)

    def run(config, options, done=(), **asked):
        arms = {"sft": {"teacher": "none"}, "other": {"teacher": "none", **options}}
        changes = dict(launch={"accelerate_config": config, "num_processes": 2}, arms=arms)
        found = load_comparison(write_plan(tiny_folder, tmp_path, **changes), str(tmp_path / "out"))
        for run in done:
            folder = tmp_path / "out" / "other" / "seed_0" / run
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.json", "adapter_config.json", "adapter_model.safetensors"):
                (folder / name).write_text("{}")
        with pytest.raises(Checked):
            run_comparison(found, **asked)

    return run


IN_STAGE = (
    "other, seed 0, stage second, which goes on from the adapter of stage 'first', cannot be trained as `launch` says: "
)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("zero3", {"drift_steps": 1}, IN_STAGE + "Under ZeRO-3 drift is measured from a base alone"),
        ("zero3", {"rehearsal_weight": 1, "rehearsal_dataset": "x.jsonl"}, IN_STAGE + "Under ZeRO-3 the model before training is a base"),
        ("fsdp2", {"rehearsal_weight": 1, "rehearsal_num_tokens": 32}, IN_STAGE + "A sharded model .* cannot write texts"),
        ("fsdp2", {"ewc_weight": 1}, "other, seed 0, stage first, cannot be trained as `launch` says: `ewc_weight`: a sharded model"),
    ],
)  # fmt: skip
def test_a_stage_that_its_launch_cannot_go_on_with_is_refused_before_any_is_trained(
    checked, tmp_path, config, options, message
):
    sampling = Sampling(num_tokens=32)  # of the base there are texts
    texts_path("0-0", sampling).parent.mkdir(parents=True)
    texts_path("0-0", sampling).touch()
    with pytest.raises(ValueError, match=message) as error:
        checked(config, options)
    assert str(error.value).endswith("In a comparison the way out is `accelerate_config: multi_gpu` or `zero2`.")
    assert not list((tmp_path / "out").glob("*/*"))
    checked("zero2", options)
    checked(config, {})
    checked(config, options, arms=["sft"])
    checked(config, options, evaluate_only=True)
    checked(config, options, done=["first", "second"])


def test_a_stage_may_have_texts_once_the_one_before_is_trained(checked):
    options = {"rehearsal_weight": 1, "rehearsal_num_tokens": 32}
    with pytest.raises(ValueError, match="cannot write texts"):
        checked("fsdp2", options, done=["first"], arms=["other"], stages=["second"])
    texts_path("0-0", Sampling(num_tokens=32)).parent.mkdir(parents=True)
    texts_path("0-0", Sampling(num_tokens=32)).touch()
    checked("fsdp2", options, arms=["other"], stages=["second"])


def test_runs_of_stages_are_named_after_them_where_they_are_tracked(tiny_folder, tmp_path):
    training = PLAN["training"] | {"report_to": "trackio"}
    found = load_comparison(write_plan(tiny_folder, tmp_path, training=training), str(tmp_path / "out"))
    names = [stage.options(found.arms["sft"], 3)["run_name"] for stage in found.by_stage()]
    assert names == ["sft-seed_3-first", "sft-seed_3-second"]


def test_the_example_of_the_docs_is_understood(tmp_path):
    section = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8").split("## Several domains in a row")[1]
    text = re.search(r"```yaml\n(.*?)```", section, flags=re.DOTALL)[1]
    plan = yaml.safe_load(text)
    plan["training"] |= {"use_cpu": True, "bf16": False}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    found = load_comparison(str(tmp_path / "plan.yaml"), str(tmp_path / "out"))
    parsed = running._parsed(found)
    assert [stage["sft", 0][0].dataset_name for stage in parsed] == [None, "questions.jsonl"]
    assert [stage["ema", 0][1].max_steps for stage in parsed] == [200, 400]
    assert running._understood(found, parsed).averaged == ("ema",)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_transfer_and_forgetting_are_those_of_the_papers(stages):
    """As their formulas are written, with indices from 1."""
    scores = np.random.default_rng(stages).normal(size=(stages + 1, stages, 7))
    for draw in range(7):
        R = {(i, j): scores[i, j - 1, draw] for i in range(stages + 1) for j in range(1, stages + 1)}
        T = stages
        bwt = sum(R[T, j] - R[j, j] for j in range(1, T)) / (T - 1)
        forgetting = sum(max(R[k, j] - R[T, j] for k in range(1, T)) for j in range(1, T)) / (T - 1)
        fwt = sum(R[j - 1, j] - R[0, j] for j in range(2, T + 1)) / (T - 1)
        assert backward_transfer(scores)[draw] == pytest.approx(bwt)
        assert stage_forgetting(scores)[draw] == pytest.approx(forgetting)
        assert forward_transfer(scores)[draw] == pytest.approx(fwt)
    for measure in (backward_transfer, stage_forgetting, forward_transfer):
        with pytest.raises(ValueError, match=r"Scores of stages have shape \(2, 1\); expected \(T \+ 1, T, ...\)"):
            measure(np.zeros((2, 1)))


def test_several_seeds_have_the_mean_of_their_own_forgetting(comparison, plan, tmp_path):
    """Two seeds, of which the second is the first with all losses of its evaluations moved."""
    folder = tmp_path / "out"
    shutil.copytree(comparison.output_dir, folder)
    kept = read_json(folder / "plan.json")
    write_json(folder / "plan.json", kept | {"seeds": [0, 1]})
    for arm in ("sft", "ema", "half"):
        shutil.copytree(folder / arm / "seed_0", folder / arm / "seed_1")
    path = folder / "sft" / "seed_1" / "second" / "evaluation" / "student" / "text.json"
    text = read_json(path)
    text["first"]["rows"] = [[loss - 0.5 * tokens, tokens, drift] for loss, tokens, drift in text["first"]["rows"]]
    write_json(path, text)
    found, one = (summarize_comparison(str(x))["stages"]["ways"][0] for x in (folder, comparison.output_dir))
    assert found["seeds"] == [0, 1]
    by_seed = found["backward_transfer"]["by_seed"]
    assert by_seed[0] == pytest.approx(one["backward_transfer"]["mean"]) and by_seed[1] - by_seed[0] == pytest.approx(
        0.5
    )
    assert found["backward_transfer"]["mean"] == pytest.approx(sum(by_seed) / 2)
    assert found["forgetting"]["by_seed"] == pytest.approx([-x for x in by_seed])
    (other,) = [way for way in summarize_comparison(str(folder))["stages"]["ways"] if way["label"] == "ema"]
    assert other["backward_transfer"]["by_seed"][0] == other["backward_transfer"]["by_seed"][1]
    shutil.rmtree(folder / "sft" / "seed_1" / "first" / "evaluation")
    summary = summarize_comparison(str(folder))
    assert summary["stages"]["ways"][0]["seeds"] == [0]
    assert "sft, seed 1: student after first not evaluated" in summary["missing"]
