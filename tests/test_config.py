import dataclasses
import re
import warnings
from dataclasses import fields

import pytest
from trl import TrlParser

from trl_ema import MeanTeacherConfig
from trl_ema.config import DEFAULT_HALF_LIFE


OWN_FIELDS = [f for f in fields(MeanTeacherConfig) if f.name in MeanTeacherConfig.__annotations__]
# Anything but the defaults, and no combination of which a part is ignored.
CHANGED = dict(
    teacher="ema", ema_decay=0.99, ema_warmup=True, ema_update_steps=2, teacher_anchor=0.5, kl_weight=0.25,
    kl_warmup_ratio=0.1, kl_direction="jsd", jsd_mixture=0.25, kl_temperature=2.0, kl_tokens="all", eval_teacher=True,
    stop_on_nonfinite_loss=False, kl_fraction=0.5,
)  # fmt: skip


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        return MeanTeacherConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)

    return make


@pytest.fixture
def parse(tmp_path):
    def parse(*args):
        args = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *args]
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
        ("kl_tokens", "prompt", "one of 'loss', 'all'", "'all'"),
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


def test_half_life_and_decay_exclude_each_other(make_config):
    with pytest.raises(ValueError, match=r"`ema_half_life` \(0.5\) and `ema_decay` \(0.9\).* Give one of them"):
        make_config(ema_half_life=0.5, ema_decay=0.9)


def test_default_half_life_is_in_force_only_without_a_decay(make_config):
    assert make_config().half_life == DEFAULT_HALF_LIFE
    assert make_config(ema_half_life=0.1).half_life == 0.1
    assert make_config(ema_decay=0.9).half_life is None
    assert dataclasses.replace(make_config(), ema_decay=0.9).half_life is None


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
    ],
)
def test_ignored_settings_are_named_in_one_warning_at_the_callers_line(tmp_path, changes, ignored):
    with pytest.warns(UserWarning, match="Ignored with") as record:
        MeanTeacherConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)
    (warning,) = [w for w in record if "Ignored with" in str(w.message)]
    assert re.findall(r"`(\w+)=", str(warning.message).split(": ", 1)[1]) == ignored
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "changes",
    [{}, dict(teacher="frozen", kl_weight=0.5), dict(teacher="none"), dict(kl_direction="jsd", jsd_mixture=0.1)],
)
def test_used_settings_give_no_warning(make_config, changes):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make_config(**changes)
    assert not ignored_settings(record)


def test_every_field_is_read_from_the_command_line(parse):
    assert set(CHANGED) | {"ema_half_life"} == {f.name for f in OWN_FIELDS}
    config = parse(*(word for name, value in CHANGED.items() for word in (f"--{name}", str(value))))
    assert own_values(config) == CHANGED | {"ema_half_life": None}
    assert parse("--ema_half_life", "0.5").ema_half_life == 0.5


def test_every_field_is_read_from_a_yaml_file_and_the_command_line_wins(parse, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in CHANGED.items()))
    assert own_values(parse("--config", str(file))) == CHANGED | {"ema_half_life": None}
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


def test_every_field_has_one_help_text_that_the_docstring_does_not_repeat():
    for f in OWN_FIELDS:
        assert f.metadata.get("help", "").endswith("."), f.name
        assert f.metadata["help"] not in " ".join(MeanTeacherConfig.__doc__.split())
