import dataclasses
import json
import re
import warnings
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from trl import SFTTrainer, TrlParser

from trl_ema import MeanTeacherConfig
from trl_ema.config import DEFAULT_HALF_LIFE


OWN_FIELDS = [f for f in fields(MeanTeacherConfig) if f.name in MeanTeacherConfig.__annotations__]
# Anything but the defaults, and no combination of which a part is ignored.
CHANGED = dict(
    teacher="ema", ema_decay=0.99, ema_warmup=True, ema_update_steps=2, teacher_anchor=0.5, kl_weight=0.25,
    kl_warmup_ratio=0.1, kl_direction="jsd", jsd_mixture=0.25, kl_temperature=2.0, kl_tokens="all", eval_teacher=True,
    stop_on_nonfinite_loss=False, kl_fraction=0.5, rehearsal_weight=2.0, rehearsal_fraction=0.25,
    rehearsal_num_texts=64, rehearsal_num_tokens=32, rehearsal_start="<s>",
    rehearsal_chat=False, drift_budget=0.05, max_drift=0.5,
    entropy_weighting=True, l1_weight=1e-5, l2_weight=0.01, ewc_weight=3.0, ewc_num_texts=32,
)  # fmt: skip
# Those exclude others of them.
APART = {"ema_half_life", "rehearsal_texts", "rehearsal_dataset", "rehearsal_loss"}
UNCHANGED = {f.name: f.default for f in OWN_FIELDS if f.name in APART}


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        return MeanTeacherConfig(str(tmp_path), bf16=False, **changes)

    return make


@pytest.fixture
def parse(tmp_path):
    def parse(*args):
        args = ["--output_dir", str(tmp_path), "--bf16", "false", *args]
        (config,) = TrlParser((MeanTeacherConfig,)).parse_args_and_config(args)
        return config

    return parse


def own_values(config):
    return {f.name: getattr(config, f.name) for f in OWN_FIELDS}


def ignored_settings(record):
    return [str(w.message) for w in record if str(w.message).startswith("Ignored with")]


@pytest.mark.parametrize(
    ("name", "value", "expected", "mend"),
    [
        ("teacher", "emma", "one of 'ema', 'frozen', 'none'", "'ema'"),
        ("kl_direction", "backward", "one of 'forward', 'reverse', 'jsd'", "'reverse'"),
        ("kl_tokens", "prompts", "one of 'loss', 'all', 'prompt'", "'all'"),
        ("kl_fraction", 0.0, "in (0, 1]", "try 0.25"),
        ("kl_fraction", 1.5, "in (0, 1]", "try 0.25"),
        ("ema_half_life", 0.0, "above 0", "try 0.25"),
        ("ema_half_life", float("inf"), "above 0", "teacher='frozen'"),
        ("ema_decay", 1.5, "in [0, 1]", "try 0.999"),
        ("ema_decay", -0.1, "in [0, 1]", "try 0.999"),
        ("ema_update_steps", 0, "at least 1", "optimizer steps"),
        ("ema_update_steps", 1.5, "a whole number", "optimizer steps"),
        ("teacher_anchor", 1.1, "in [0, 1]", "try 0.5"),
        ("kl_warmup_ratio", -0.5, "in [0, 1]", "try 0.1"),
        ("kl_weight", -1.0, "at least 0", "try 1.0"),
        ("kl_weight", float("nan"), "finite", "try 1.0"),
        ("kl_temperature", 0.0, "above 0", "Try 1.0"),
        ("kl_temperature", float("inf"), "finite", "Try 1.0"),
        ("jsd_mixture", 0.0, "inside (0, 1)", "'forward'"),
        ("jsd_mixture", 1.0, "inside (0, 1)", "'reverse'"),
        ("l1_weight", -1.0, "at least 0", "try 1e-5"),
        ("l2_weight", float("inf"), "finite", "try 1e-2"),
        ("ewc_weight", -0.5, "at least 0", "try 300"),
        ("ewc_num_texts", 0, "at least 1", "Try 128"),
    ],
)
@pytest.mark.filterwarnings("ignore:Ignored with")
def test_error_names_the_value_what_is_expected_and_the_mend(make_config, name, value, expected, mend):
    with pytest.raises(ValueError) as error:
        make_config(**{name: value})
    for part in (f"`{name}`", f"got {value!r}", expected, mend):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(ema_decay=0.0),
        dict(ema_decay=1.0),
        dict(ema_half_life=3.0),
        dict(teacher_anchor=1.0),
        dict(kl_weight=0.0),
        dict(kl_warmup_ratio=1.0),
    ],
)
def test_ends_of_the_ranges_are_allowed(make_config, changes):
    config = make_config(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_two_weightings_of_the_cross_entropy_exclude_each_other(make_config):
    with pytest.raises(ValueError, match="`entropy_weighting` and `loss_type='dft'` both weight.*Use one of them"):
        make_config(entropy_weighting=True, loss_type="dft")
    config = make_config(teacher="none", entropy_weighting=True)
    assert config.needs_fused_forward and not config.is_plain_sft


def test_half_life_and_decay_exclude_each_other(make_config):
    with pytest.raises(ValueError, match=r"`ema_half_life` \(0.5\) and `ema_decay` \(0.9\).* Give one of them"):
        make_config(ema_half_life=0.5, ema_decay=0.9)


def test_default_half_life_is_in_force_only_without_a_decay(make_config):
    assert make_config().half_life == DEFAULT_HALF_LIFE
    assert make_config(ema_half_life=0.1).half_life == 0.1
    assert make_config(ema_decay=0.9).half_life is None
    assert dataclasses.replace(make_config(), ema_decay=0.9).half_life is None


@pytest.mark.parametrize(
    "number",
    [np.float32, np.float64, np.int64, np.array, torch.tensor, Decimal, Fraction, float, int],
    ids=lambda make: make.__name__,
)
def test_numbers_of_any_kind_become_pythons(make_config, number):
    for f in OWN_FIELDS:
        if f.name in (
            "ema_half_life",
            "jsd_mixture",
            "rehearsal_fraction",
            "rehearsal_num_tokens",
            "drift_budget",
        ) or not isinstance(CHANGED.get(f.name), (int, float)):
            continue
        if isinstance(CHANGED[f.name], bool):
            continue
        others = {f"{part}_weight": 1.0 for part in ("rehearsal", "ewc") if f.name.startswith(f"{part}_")}
        value = getattr(make_config(**(others | {f.name: number(1)})), f.name)
        assert value == 1 and type(value) in (int, float), f.name
    rehearsing = make_config(rehearsal_weight=number(1), rehearsal_num_tokens=number(8), drift_budget=number(1))
    assert rehearsing.rehearsal_num_tokens == 8 and type(rehearsing.drift_budget) in (int, float)
    json.dumps(make_config(kl_weight=number(1)).to_dict())
    value = make_config(kl_weight=np.float32(0.25)).kl_weight
    assert value == 0.25 and type(value) is float


@pytest.mark.parametrize("kind", [np.float32, np.float64, float])
def test_counts_may_be_written_with_a_point(make_config, kind):
    steps = make_config(ema_update_steps=kind(2.0)).ema_update_steps
    assert steps == 2 and type(steps) is int
    with pytest.raises(ValueError, match="a whole number of at least 1"):
        make_config(ema_update_steps=kind(2.5))


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), float("inf"), np.float64("inf"), -1, np.int64(-1)])
@pytest.mark.parametrize("name", [n for n, v in CHANGED.items() if type(v) in (int, float)] + ["ema_half_life"])
@pytest.mark.filterwarnings("ignore:Ignored with")
def test_every_number_has_a_range(make_config, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make_config(**{name: value})


BOOLEANS = [f.name for f in OWN_FIELDS if f.type is bool]


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_read_from_text_and_numbers(make_config, name):
    for value in (False, "false", "False", "no", "0", 0, 0.0, np.bool_(False), np.array(False), torch.tensor(False)):
        assert getattr(make_config(**{name: value}), name) is False, value
    for value in (True, "true", "yes", "1", 1, np.bool_(True), np.int64(1)):
        assert getattr(make_config(**{name: value}), name) is True, value
    for value in ("maybe", "", "none", None, 2, 0.5, float("nan"), [], [True], np.array([True, False])):
        with pytest.raises(TypeError, match=f"`{name}` must be a boolean, got "):
            make_config(**{name: value})


# With these as true another option is needed beside them, or a GPU.
NOT_ALONE = {
    "load_best_model_at_end", "fp16", "bf16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile",
    "dataloader_pin_memory",
}  # fmt: skip
SWITCHES = [f.name for f in fields(MeanTeacherConfig) if f.type in (bool, bool | None)]


def test_a_hosts_boolean_is_never_taken_from_its_text(make_config):
    assert len(SWITCHES) > 40 and {"packing", "bf16", "completion_only_loss", "eval_teacher"} <= set(SWITCHES)
    changes = dict.fromkeys(SWITCHES, "false")
    del changes["bf16"]
    config = make_config(**changes, rehearsal_weight=1.0)
    assert {name: getattr(config, name) for name in changes} == dict.fromkeys(changes, False)
    changes = {name: "true" for name in SWITCHES if name not in NOT_ALONE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make_config(**changes)
    assert {name: getattr(config, name) for name in changes} == dict.fromkeys(changes, True)
    for name in SWITCHES:
        with pytest.raises(TypeError, match=f"`{name}` must be a boolean, got 'perhaps'"):
            MeanTeacherConfig("out", **{name: "perhaps"})


@pytest.mark.parametrize("name", [n for n, v in CHANGED.items() if type(v) in (int, float)] + ["ema_half_life"])
@pytest.mark.parametrize("value", [True, np.bool_(False), "1", [1.0], np.array([1.0]), 1j])
def test_no_number_takes_what_is_none(make_config, name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got "):
        make_config(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("ema_decay", "0.9"), ("kl_weight", None), ("teacher_anchor", True)])
def test_what_is_no_number_is_refused(make_config, name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got {value!r}"):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        (dict(teacher="frozen", ema_half_life=0.5), ["ema_half_life"]),
        # As large as the default of another field.
        (dict(teacher="frozen", ema_decay=DEFAULT_HALF_LIFE), ["ema_decay"]),
        (dict(teacher="frozen", ema_warmup=True, ema_update_steps=2), ["ema_warmup", "ema_update_steps"]),
        (
            dict(
                teacher="none", kl_weight=0.5, kl_warmup_ratio=0.1, kl_temperature=2.0, kl_tokens="all", kl_fraction=0.5
            ),
            ["kl_weight", "kl_warmup_ratio", "kl_temperature", "kl_tokens", "kl_fraction"],
        ),
        (
            dict(teacher="none", teacher_anchor=0.5, kl_direction="reverse", eval_teacher=True),
            ["teacher_anchor", "kl_direction", "eval_teacher"],
        ),
        (dict(kl_direction="reverse", jsd_mixture=0.1), ["jsd_mixture"]),
        (dict(rehearsal_num_texts=64, ewc_num_texts=32), ["rehearsal_num_texts", "ewc_num_texts"]),
        (dict(ewc_weight=1.0, rehearsal_num_texts=64, rehearsal_fraction=0.5), ["rehearsal_fraction"]),
        (dict(rehearsal_weight=1.0, rehearsal_start="<s>", rehearsal_chat=True), ["rehearsal_start"]),
        *(
            (
                weight
                | dict(rehearsal_texts="texts", rehearsal_num_texts=64, rehearsal_num_tokens=32)
                | dict(rehearsal_start="<s>", rehearsal_chat=True),
                ["rehearsal_num_texts", "rehearsal_num_tokens", "rehearsal_start", "rehearsal_chat"],
            )
            for weight in (dict(ewc_weight=1.0), dict(rehearsal_weight=1.0))
        ),
    ],
)
def test_ignored_settings_are_named_in_one_warning_at_the_callers_line(tmp_path, changes, ignored):
    with pytest.warns(UserWarning, match="Ignored with") as record:
        MeanTeacherConfig(str(tmp_path), bf16=False, **changes)
    (warning,) = [w for w in record if "Ignored with" in str(w.message)]
    assert re.findall(r"`(\w+)=", str(warning.message).split(": ", 1)[1]) == ignored
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(teacher="frozen", kl_weight=0.5),
        dict(teacher="none"),
        dict(kl_direction="jsd", jsd_mixture=0.1),
        dict(ewc_weight=1.0, ewc_num_texts=32, rehearsal_num_texts=64, rehearsal_start="<s>"),
        dict(ewc_weight=1.0, rehearsal_texts="texts"),
        dict(rehearsal_weight=1.0, rehearsal_texts="texts"),
    ],
)
def test_used_settings_give_no_warning(make_config, changes):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make_config(**changes)
    assert not ignored_settings(record)


def test_every_field_is_read_from_the_command_line(parse):
    assert set(CHANGED) | APART == {f.name for f in OWN_FIELDS}
    config = parse(*(word for name, value in CHANGED.items() for word in (f"--{name}", str(value))))
    assert own_values(config) == CHANGED | UNCHANGED
    assert parse("--ema_half_life", "0.5").ema_half_life == 0.5
    words = ("--rehearsal_weight", "1", "--rehearsal_dataset", "rows.jsonl", "--rehearsal_loss", "ce")
    assert own_values(parse(*words)).items() >= dict(rehearsal_dataset="rows.jsonl", rehearsal_loss="ce").items()


def test_every_field_is_read_from_a_yaml_file_and_the_command_line_wins(parse, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in CHANGED.items()))
    assert own_values(parse("--config", str(file))) == CHANGED | UNCHANGED
    assert parse("--config", str(file), "--kl_weight", "3").kl_weight == 3.0


def test_scientific_notation_in_yaml_is_a_number(parse, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("kl_weight: 5e-1\n")  # YAML 1.1 reads a string
    assert parse("--config", str(file)).kl_weight == 0.5


def test_wrong_choice_in_yaml_is_refused(parse, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("kl_direction: backward\n")
    with pytest.raises(ValueError, match="`kl_direction` must be one of 'forward', 'reverse', 'jsd', got 'backward'"):
        parse("--config", str(file))


def test_help_page_shows_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        TrlParser((MeanTeacherConfig,)).parse_args_and_config(["--help"])
    assert done.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    for f in OWN_FIELDS:
        assert f"--{f.name}" in page
        assert " ".join(f.metadata["help"].replace("%%", "%").split()) in page


@pytest.mark.parametrize("changes", [{}, CHANGED, dict(teacher="frozen"), dict(teacher="none", loss_type="dft")])
def test_config_survives_conversion_from_its_own_fields(make_config, changes):
    config = make_config(**changes)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        again = MeanTeacherConfig(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})
    assert again.to_dict() == config.to_dict()
    assert not ignored_settings(record)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ("weight_decay=0.1", False),
        ("momentum=0.9, weight_decay = 1e-2", False),
        ("weight_decay=0.0", True),
        ("momentum=0.9", True),
        ("", True),
    ],
)
def test_a_weight_decay_among_the_optimizers_arguments_is_no_plain_sft(make_config, arguments, plain):
    assert make_config(teacher="none", optim="sgd", optim_args=arguments).is_plain_sft == plain


@pytest.mark.parametrize("name", ["l1_weight", "l2_weight", "ewc_weight", "weight_decay"])
def test_what_holds_the_weights_is_no_plain_sft_and_needs_no_other_forward(make_config, name):
    assert make_config(teacher="none").is_plain_sft
    config = make_config(teacher="none", **{name: 1e-3})
    assert not config.is_plain_sft and not config.needs_fused_forward


# Of the libraries below


def test_checkpointing_under_its_old_name_is_no_reason_to_warn(make_config):
    options = [{}, dict(gradient_checkpointing=False), dict(gradient_checkpointing_kwargs={"use_reentrant": False})]
    for changes in options:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            config = make_config(**changes)
        assert {name: getattr(config, name) for name in changes} == changes
        if hasattr(config, "activation_checkpointing"):
            assert config.activation_checkpointing == config.gradient_checkpointing
            assert config.activation_checkpointing_kwargs == config.gradient_checkpointing_kwargs


def test_training_arguments_are_read_as_by_the_host(make_trainer, tmp_path):
    args = TrainingArguments(
        str(tmp_path / "plain"), max_steps=2, report_to="none", hub_token="secret", learning_rate=3e-3,
        logging_steps=1, seed=3, warmup_steps=0.1, optim="adamw_torch", lr_scheduler_type="cosine", save_strategy="no",
    )  # fmt: skip
    ours = make_trainer(args=args)
    theirs = make_trainer(args=args, trainer_class=SFTTrainer)
    for f in fields(theirs.args):
        one, other = getattr(ours.args, f.name), getattr(theirs.args, f.name)
        assert str(one) == str(other), f.name
    assert ours.args.hub_token == "secret" and ours.args.teacher == "ema"
    ours.train()
    assert ours.teacher.num_updates == 2


@pytest.mark.parametrize("args", [{"output_dir": "out"}, "out"])
def test_other_arguments_are_refused_with_what_to_pass(make_trainer, args):
    with pytest.raises(
        TypeError, match=r"`args` must be a `MeanTeacherConfig`, got `(dict|str)`. Pass `MeanTeacherConfig\("
    ):
        make_trainer(args=args)


def test_every_field_has_one_help_text_that_the_docstring_does_not_repeat():
    for f in OWN_FIELDS:
        assert f.metadata.get("help", "").endswith("."), f.name
        assert f.metadata["help"] not in " ".join(MeanTeacherConfig.__doc__.split())


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(rehearsal_weight=-1.0), "`rehearsal_weight` must be at least 0 and finite, got -1.0. Use 0 for no rehearsal; try 4"),
        (dict(rehearsal_weight=1.0, rehearsal_fraction=1.0), r"`rehearsal_fraction` must be inside \(0, 1\), got 1.0.*try 0.33"),
        (dict(rehearsal_weight=1.0, rehearsal_fraction=0.0), r"`rehearsal_fraction` must be inside \(0, 1\), got 0.0"),
        (dict(rehearsal_weight=1.0, rehearsal_num_texts=0), "`rehearsal_num_texts` must be a whole number of at least 1, got 0"),
        (dict(rehearsal_weight=1.0, rehearsal_num_tokens=3), "`rehearsal_num_tokens` must be a whole number of at least 8, got 3"),
        (dict(rehearsal_weight=1.0, drift_budget=0.0), "`drift_budget` must be above 0 and finite, got 0.0.*try 0.05"),
        (dict(rehearsal_weight=1.0, drift_budget=0.1, max_drift=0.2), "`max_drift=0.2` would stop a run .* allowed 0.2 nats per"),
        (dict(rehearsal_weight=1.0, rehearsal_loss="mse"), "`rehearsal_loss` must be one of 'kl', 'ce', got 'mse'"),
        (dict(rehearsal_weight=1.0, rehearsal_loss="ce", drift_budget=0.1), "`drift_budget=0.1` is of the KL .*'ce'` does not compute"),
        (
            dict(rehearsal_weight=1.0, rehearsal_texts="a", rehearsal_dataset="b"),
            "`rehearsal_texts='a'` and `rehearsal_dataset='b'` both say what is rehearsed. Give one of them",
        ),
        (dict(max_drift=0.0), "`max_drift` must be above 0 and finite, got 0.0.*try 0.05"),
        (dict(drift_budget=0.1), "`drift_budget=0.1` is kept by the weight of the rehearsal, which is 0. Give the weight"),
    ],
)  # fmt: skip
def test_options_of_rehearsal_that_cannot_be_are_refused(make_config, options, match):
    with pytest.raises(ValueError, match=match):
        make_config(**options)


def test_rehearsal_alone_is_not_plain_sft_and_needs_the_fused_forward(make_config):
    assert make_config(teacher="none").is_plain_sft and not make_config(teacher="none").needs_fused_forward
    rehearsing = make_config(teacher="none", rehearsal_weight=1.0)
    assert rehearsing.needs_fused_forward and not rehearsing.is_plain_sft


def test_options_of_rehearsal_without_a_weight_are_warned_of(make_config):
    with pytest.warns(UserWarning, match="Ignored with .*`rehearsal_weight=0.0`.*: `rehearsal_num_texts=64`"):
        make_config(rehearsal_num_texts=64)


def test_what_is_not_written_is_warned_of_beside_given_texts(make_config):
    with pytest.warns(UserWarning, match="Ignored with .*: `rehearsal_start='<s>'`, `rehearsal_chat=True`"):
        make_config(rehearsal_weight=1.0, rehearsal_dataset="b", rehearsal_start="<s>", rehearsal_chat=True)


@pytest.mark.parametrize("metric, greater", [("eval_general_drift", False), ("loss", False), ("eval_accuracy", True)])
def test_less_drift_is_better(make_config, metric, greater):
    assert make_config(metric_for_best_model=metric).greater_is_better is greater
    assert make_config(metric_for_best_model=metric, greater_is_better=True).greater_is_better
