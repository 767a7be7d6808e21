import dataclasses
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers.hf_argparser import string_to_bool

from trl_ema.evaluation.settings import Suite, TaskSettings
from trl_ema.options import plain_bool, plain_count, plain_number, take_booleans


@pytest.mark.parametrize("word", ["yes", "true", "t", "y", "1", "no", "false", "f", "n", "0", "True", "FALSE"])
def test_a_word_is_the_boolean_that_the_command_line_takes_it_for(word):
    assert plain_bool("x", word) is string_to_bool(word)


def test_whatever_is_zero_or_one_is_a_boolean():
    given = [True, 1, 1.0, np.bool_(True), np.int64(1), torch.tensor(1), False, 0, np.float32(0)]
    assert [plain_bool("x", value) for value in given] == [True] * 6 + [False] * 3
    assert all(type(plain_bool("x", value)) is bool for value in given)


@pytest.mark.parametrize("value", ["maybe", "", 2, -1, 0.5, None, [], np.array([0, 1])])
def test_what_is_no_boolean_is_refused(value):
    with pytest.raises(TypeError, match=r"^`x` must be a boolean, got .* \(\w+\). Use True or False.$"):
        plain_bool("x", value)


def test_booleans_of_a_dataclass_become_plain_also_where_it_is_frozen():
    @dataclasses.dataclass(frozen=True)
    class Config:
        one: bool = "false"  # type: ignore[assignment]
        other: bool | None = None
        text: str = "false"

    config = Config(other="yes")
    take_booleans(config)
    assert config == Config(False, True, "false")
    empty = Config()
    take_booleans(empty)
    assert empty.other is None


def test_numbers_of_any_library_become_python_s():
    given = [3, np.int64(3), torch.tensor(3), 0.5, np.float32(0.5), torch.tensor(0.5), Decimal("0.5")]
    assert [plain_number("x", value) for value in given] == [3] * 3 + [0.5] * 4
    assert [type(plain_number("x", value)) for value in given] == [int] * 3 + [float] * 4


@pytest.mark.parametrize("value", ["3", True, None, np.bool_(True), [1], 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"^`x` must be a number, got .* \(\w+\).$"):
        plain_number("x", value)


def test_a_count_may_be_written_with_a_point():
    assert [plain_count("x", value, 1) for value in (1, 2.0, np.int64(3))] == [1, 2, 3]
    assert type(plain_count("x", 2.0, 1)) is int


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf")])
def test_what_is_no_count_is_refused_with_a_hint(value):
    with pytest.raises(
        ValueError, match=r"^`x` must be a whole number of at least 1, got .*\. It counts optimizer steps\.$"
    ):
        plain_count("x", value, 1, "It counts optimizer steps.")


def test_settings_of_a_task_are_read_as_training_options_are():
    given = TaskSettings(num_fewshot=np.int64(5), sample=20.0, apply_chat_template="false", seed=7.0)  # type: ignore[arg-type]
    assert given == TaskSettings(num_fewshot=5, sample=20, apply_chat_template=False, seed=7)
    assert [type(value) for value in dataclasses.asdict(given).values()] == [
        int, type(None), int, bool, int, type(None), type(None),
    ]  # fmt: skip
    assert type(TaskSettings(limit=np.float64(0.5)).limit) is float and type(TaskSettings(limit=10).limit) is int


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"apply_chat_template": "maybe"}, TypeError, "`apply_chat_template` must be a boolean, got 'maybe'"),
        ({"limit": "many"}, TypeError, "`limit` must be a number, got 'many'"),
        ({"limit": True}, TypeError, "`limit` must be a number, got True"),
        ({"limit": float("nan")}, ValueError, "`limit` must be a number of questions, .* got nan. Leave it out"),
        ({"limit": float("inf")}, ValueError, "`limit` must be a number of questions, .* got inf. Leave it out"),
        ({"sample": "many"}, TypeError, "`sample` must be a number, got 'many'"),
        ({"sample": 2.5}, ValueError, "`sample` must be a whole number of at least 1, got 2.5"),
        ({"num_fewshot": -1}, ValueError, "`num_fewshot` must be a whole number of at least 0, got -1"),
        ({"num_fewshot": True}, TypeError, "`num_fewshot` must be a number, got True"),
        ({"seed": None}, TypeError, "`seed` must be a number, got None"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_of_a_task_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TaskSettings(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"domain_samples": True}, TypeError, "`domain_samples` must be a number, got True"),
        ({"generation_tokens": "48"}, TypeError, "`generation_tokens` must be a number, got '48'"),
        ({"max_length": 1}, ValueError, "`max_length` must be a whole number of at least 2, got 1"),
        ({"max_length": None}, TypeError, "`max_length` must be a number, got None"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be a whole number of at least 1, got 0"),
    ],
)
def test_a_suite_that_means_nothing_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Suite(**options)
    assert Suite(batch_size=None) == Suite() and Suite(domain_samples=8.0) == Suite(domain_samples=8)  # type: ignore[arg-type]
