import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import trl_ema


SOURCE = Path(trl_ema.__file__).parent
ROOT = Path(__file__).parents[1]


def imported_modules(path):
    """Absolute imports as `torch`, relative ones as `.losses`; those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").split(".")[0]


@pytest.mark.parametrize("name", trl_ema.__all__)
def test_public_name_is_documented_with_its_formula_and_source(name):
    doc = getattr(trl_ema, name).__doc__
    assert re.search(r"Sources?: .*https://", doc, re.DOTALL)
    assert re.search(r" = |←|Σ", doc)


@pytest.mark.parametrize("module", ["schedules", "losses", "data", "offline", "forward", "teacher", "model_card"])
def test_public_functions_and_classes_are_documented(module):
    module = importlib.import_module(f"trl_ema.{module}")
    public = [
        x for name, x in vars(module).items()
        if name[0] != "_" and getattr(x, "__module__", None) == module.__name__ and (inspect.isfunction(x) or inspect.isclass(x))
    ]  # fmt: skip
    assert public
    # A dataclass without a docstring gets its signature for one.
    undocumented = [x.__name__ for x in public if not x.__doc__ or x.__doc__.startswith(f"{x.__name__}(")]
    assert not undocumented


@pytest.mark.parametrize("function", ["half_life_to_decay", "warmed_up_decay", "sigmoid_ramp"])
def test_schedule_shows_its_formula_or_source(function):
    doc = getattr(importlib.import_module("trl_ema.schedules"), function).__doc__
    assert re.search(r"Source: | = ", doc)


def import_with_trl(version):
    """Import the package in a fresh process that believes in another TRL version."""
    code = (
        "import importlib.metadata as m; real = m.version\n"
        f"m.version = lambda name: {version!r} if name == 'trl' else real(name)\n"
        "import trl_ema"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0"])
def test_unsupported_trl_is_refused_at_import_with_the_range(version):
    done = import_with_trl(version)
    assert done.returncode != 0
    assert f"supports trl>=1.15,<1.17, found trl {version}" in done.stderr
    assert "pip install 'trl>=1.15,<1.17'" in done.stderr


@pytest.mark.parametrize("version", ["1.15.0", "1.16.99"])
def test_supported_trl_is_accepted_at_import(version):
    assert import_with_trl(version).returncode == 0


def test_the_checked_range_is_the_declared_one():
    project = SOURCE.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not a source tree")
    declared = tomllib.loads(project.read_text())["project"]["dependencies"]
    assert "trl>={},<{}".format(*trl_ema.TRL_RANGE) in declared


def test_py_typed_is_shipped():
    assert files("trl_ema").joinpath("py.typed").is_file()
    project = SOURCE.parent / "pyproject.toml"
    if project.is_file():
        packaged = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]
        assert "py.typed" in packaged["trl_ema"]


@pytest.mark.parametrize("module, more", [("losses", {"numpy", "."}), ("kernels", {"triton"}), ("schedules", {})])
def test_mathematics_knows_tensors_alone(module, more):
    imported = set(imported_modules(SOURCE / f"{module}.py"))
    assert imported <= {*sys.stdlib_module_names, "torch", *more}


def test_imports_point_one_way():
    modules = {path.stem: path for path in SOURCE.glob("*.py") if path.stem != "__init__"}
    graph = {
        name: {imported[1:] for imported in imported_modules(path) if imported[:1] == "." and imported[1:] in modules}
        for name, path in modules.items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert [name for name, imported in graph.items() if "trainer" in imported] == ["training"]
    evaluation = {imported for path in SOURCE.glob("evaluation/*.py") for imported in imported_modules(path)}
    assert not evaluation & {"..trainer", "..training", "..comparison", "..report", "..cli"}
    assert {"losses", "teacher", "schedules"} <= graph["trainer"]


def test_trainer_has_the_call_signature_of_sft_trainer():
    import inspect

    from trl import SFTTrainer

    from trl_ema import EMARegularizedSFTTrainer

    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (EMARegularizedSFTTrainer, SFTTrainer))
    assert [(p.name, p.default) for p in ours.values()][2:] == [(p.name, p.default) for p in theirs.values()][2:]
    assert list(ours)[:2] == list(theirs)[:2]


def test_the_tables_of_several_gpus_are_what_their_script_prints():
    script = ROOT / "benchmarks" / "ranks.py"
    table = subprocess.run([sys.executable, str(script), "table"], capture_output=True, text=True, check=True).stdout
    assert table.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
