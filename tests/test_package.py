import ast
import fnmatch
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
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import trl_ema
from trl_ema.versions import CHECKED_AT_IMPORT, TESTED, check_versions, is_tested


SOURCE = Path(trl_ema.__file__).parent
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# Public names


@pytest.mark.parametrize("name", trl_ema.__all__)
def test_public_name_is_documented_with_its_formula_and_source(name):
    doc = getattr(trl_ema, name).__doc__
    assert re.search(r"Sources?: .*https://", doc, re.DOTALL)
    assert re.search(r" = |←|Σ", doc)


def test_public_names_are_imported_only_when_asked_for():
    heavy = ("torch", "numpy", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
    done = run_python(
        "import sys, trl_ema\n"
        f"assert set(trl_ema.__all__) <= set(dir(trl_ema)) and not set({heavy}) & set(sys.modules), sys.modules.keys()\n"
        "from trl_ema import *\n"
        "assert EMARegularizedSFTTrainer.__module__ == 'trl_ema.trainer' and MeanTeacherConfig is trl_ema.MeanTeacherConfig"
    )
    assert done.returncode == 0, done.stderr


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'trl_ema' has no attribute 'EMATrainer'"):
        trl_ema.EMATrainer  # noqa: B018


def test_names_for_the_type_checker_are_those_that_are_found():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname: node.module for node in block.body for alias in node.names} == trl_ema._MODULE_OF
    assert sorted(trl_ema._MODULE_OF) == trl_ema.__all__


@pytest.mark.parametrize("function", ["half_life_to_decay", "warmed_up_decay", "sigmoid_ramp"])
def test_schedule_shows_its_formula_or_source(function):
    doc = getattr(importlib.import_module("trl_ema.schedules"), function).__doc__
    assert re.search(r"Source: | = ", doc)


def test_trainer_has_the_call_signature_of_sft_trainer():
    from trl import SFTTrainer

    from trl_ema import EMARegularizedSFTTrainer

    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (EMARegularizedSFTTrainer, SFTTrainer))
    *as_theirs, last = [(p.name, p.default) for p in ours.values()][2:]
    assert as_theirs == [(p.name, p.default) for p in theirs.values()][2:] and last == ("rehearsal_dataset", None)
    assert list(ours)[:2] == list(theirs)[:2]


# Versions


def import_with(versions):
    """Import the package in a fresh process that believes in other versions; `None` for a package that is not there."""
    return run_python(
        "import importlib.metadata as m\n"
        f"real, others = m.version, {versions!r}\n"
        "def version(name):\n"
        "    if others.get(name, '') is None: raise m.PackageNotFoundError(name)\n"
        "    return others.get(name) or real(name)\n"
        "m.version = version\n"
        "import trl_ema"
    )


@pytest.mark.parametrize(
    "name, version, wanted",
    [
        ("trl", "1.14.2", ">=1.15,<1.17"),
        ("trl", "1.17.0", ">=1.15,<1.17"),
        ("trl", "2.0.0", ">=1.15,<1.17"),
        ("transformers", "5.18.2", ">=5.19,<5.25"),
        ("transformers", "5.25.0", ">=5.19,<5.25"),
        ("transformers", "5.25.0.dev0", ">=5.19,<5.25"),
        ("peft", "0.20.0", ">=0.21,<0.22"),
        ("peft", "0.22.0rc1", ">=0.21,<0.22"),
        ("accelerate", "1.11.0", ">=1.12,<1.16"),
        ("accelerate", "1.16.0", ">=1.12,<1.16"),
    ],
)
def test_unsupported_version_is_refused_at_import_with_the_range(name, version, wanted):
    done = import_with({name: version})
    assert done.returncode != 0
    assert f"supports {name}{wanted}, found {name} {version}" in done.stderr
    assert f"pip install '{name}{wanted}'" in done.stderr


def test_all_unsupported_versions_are_named_at_once():
    done = import_with({"transformers": "6.0.0", "peft": None})
    assert "supports transformers>=5.19,<5.25 and peft>=0.21,<0.22, found transformers 6.0.0 and no peft" in done.stderr
    assert "Install supported ones with `pip install 'transformers>=5.19,<5.25' 'peft>=0.21,<0.22'`" in done.stderr


@pytest.mark.parametrize("name", sorted({*TESTED} - {*CHECKED_AT_IMPORT, "torch"}))
def test_what_is_not_looked_at_at_import_can_be_where_it_is_used(monkeypatch, name):
    check_versions("1.2", (name,))
    monkeypatch.setattr(trl_ema.versions, "_installed", lambda name: "99.0")
    with pytest.raises(ImportError) as error:
        check_versions("1.2", (name,))
    wanted = f"{name}{TESTED[name]}"
    assert str(error.value) == (
        f"trl_ema 1.2 supports {wanted}, found {name} 99.0. Install a supported one with `pip install '{wanted}'`."
    )


def use_of_bitsandbytes_in_training():
    from trl import ModelConfig

    from trl_ema.inputs import quantization

    quantization(ModelConfig(load_in_4bit=True), trl_ema.MeanTeacherConfig("out", use_cpu=True, bf16=False))


def use_of_bitsandbytes_in_evaluation():
    from trl_ema.cli import EvaluationArguments, _precision

    _precision(EvaluationArguments(load_in_4bit=True))


def use_of_datasets():
    from trl_ema.data import load_split

    load_split("rows.jsonl")


def use_of_lm_eval():
    from trl_ema.evaluation.tasks import task_manager

    task_manager(True)


@pytest.mark.parametrize(
    "name, use",
    [
        ("bitsandbytes", use_of_bitsandbytes_in_training),
        ("bitsandbytes", use_of_bitsandbytes_in_evaluation),
        ("datasets", use_of_datasets),
        ("lm-eval", use_of_lm_eval),
    ],
)
def test_another_version_than_is_supported_is_refused_at_its_first_use(monkeypatch, name, use):
    monkeypatch.setattr(trl_ema.versions, "_installed", lambda asked: "99.0" if asked == name else "0")
    with pytest.raises(ImportError, match=f"supports {name}>=.*, found {name} 99.0"):
        use()


@pytest.mark.parametrize(
    "versions", [{"trl": "1.15.0", "peft": "0.21.0"}, {"trl": "1.16.99", "transformers": "5.24.9"}]
)
def test_supported_versions_are_accepted_at_import(versions):
    assert import_with(versions).returncode == 0


@pytest.mark.parametrize(
    "version, tested",
    [
        ("5.19.0", True),
        ("5.24.0+local", True),
        ("5.24.1.dev0", True),  # will be 5.24.1
        ("5.19.0rc1", False),  # before the first
        ("5.25.0rc1", False),  # sorts before 5.25, but will be it
        ("5.25.dev0", False),
        ("5.25.0a1+abc", False),
        ("5.26.0.dev0", False),
        (None, False),
    ],
)
def test_a_pre_release_counts_as_the_version_that_it_will_be(version, tested):
    assert is_tested("transformers", version) == tested


def declared_requirements():
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for requirements in lists for text in requirements]


# By torch where it is built for CUDA (without it the loss is PyTorch's own), and by matplotlib.
BROUGHT_BY_OTHERS = {"triton", "PIL"}
MODULES_OF = {"PyYAML": "yaml"}
# Parts that need an extra: they may import what it brings.
OF_EXTRAS = {
    "deepspeed", "gguf", "obonet", "lm_eval", "nltk", "rouge_score", "sacrebleu", "sentence_transformers", "jinja2",
    "matplotlib", "scipy", "trackio",
}  # fmt: skip


def test_whatever_the_core_imports_is_declared():
    modules = {MODULES_OF.get(r.name, r.name) for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert all(Requirement(text).specifier for text in PROJECT["project"]["dependencies"])
    imported = set().union(*OTHERS.values()) - BROUGHT_BY_OTHERS
    assert imported - modules <= OF_EXTRAS
    by_extras = {r.name.lower().replace("-", "_") for r in declared_requirements()}
    assert by_extras >= OF_EXTRAS


def test_the_image_has_every_extra_but_those_of_development_and_vllm():
    asked = re.search(r"'\.\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text(encoding="utf-8"))[1].split(",")
    assert sorted(asked) == sorted(
        {*PROJECT["project"]["optional-dependencies"]} - {"benchmark", "dev", "test", "vllm"}
    )


def test_the_inner_loop_launches_nothing():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    left_out = set(re.search(r"addprefix test_,([\w ]+)\)", makefile)[1].split())
    launches = re.compile(r'"accelerate\.commands\.launch"|"torchrun"|"-m", "trl_ema"')
    others = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    launching = {
        path.stem.removeprefix("test_") for path in others if launches.search(path.read_text(encoding="utf-8"))
    }
    assert {"launching", "recipe"} <= launching <= left_out


def test_the_checked_ranges_are_the_declared_ones():
    declared = {r.name: r.specifier for r in declared_requirements() if r.name in TESTED}
    assert declared == {name: SpecifierSet(text) for name, text in TESTED.items()}
    assert set(CHECKED_AT_IMPORT) <= set(TESTED)


def test_the_versions_that_the_suite_is_installed_with_lie_in_the_ranges():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    assert set(TESTED) <= set(pins)
    assert all(is_tested(name, pins[name]) for name in TESTED)


# What is packaged


def packages_on_disk():
    """Each package with its folder."""
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    found = {".".join(path.parent.relative_to(ROOT).parts): path.parent for path in SOURCE.rglob("__init__.py")}
    return found | {name: ROOT / folder for name, folder in mapped.items()}


def test_every_package_is_in_the_wheel():
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(packages_on_disk())


def test_every_file_beside_the_modules_is_in_the_wheel_but_no_results():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    folders = packages_on_disk()
    shipped, left = set(), set()
    for package, folder in folders.items():
        own = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
        own = [path for path in own if not any(f != folder and folder in f.parents and f in path.parents for f in folders.values())]  # fmt: skip
        for path in own:
            name = path.relative_to(folder).as_posix()
            matches = any(
                fnmatch.fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns.get(package, [])
            )
            (shipped if matches else left).add(path.relative_to(ROOT).as_posix())
    assert {"accelerate_configs/cpu.yaml", "recipes/configs/qwen2_1.5b_qlora.yaml"} <= shipped
    assert not [name for name in left if not name.startswith("recipes/results/")]


def test_py_typed_is_shipped():
    assert files("trl_ema").joinpath("py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["trl_ema"]


def test_the_tables_of_several_gpus_are_what_their_script_prints():
    script = ROOT / "benchmarks" / "ranks.py"
    table = subprocess.run([sys.executable, str(script), "table"], capture_output=True, text=True, check=True).stdout
    assert table.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


# Which module knows which


def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Dotted names below `trl_ema`; a package's own is that of its `__init__`. The package itself names its parts and nothing else.
MODULES = {module_name(path): path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}


def imported_by(name):
    """
    Other packages as `torch`, our modules as `.evaluation.models`; imports inside functions too. Who imports a module of a room
    from outside imports the room as well.
    """
    package = name.split(".") if MODULES[name].stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["trl_ema", *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            top, _, rest = target.partition(".")
            if top != "trl_ema":
                yield top
                continue
            parts = rest.split(".")
            for end in range(1, len(parts) + 1):
                ours = ".".join(parts[:end])
                if ours in MODULES and ours != name and parts[:end] != package[:end]:  # not the room it is in
                    yield f".{ours}"


GRAPH = {name: {x[1:] for x in imported_by(name) if x[0] == "."} for name in MODULES}
OTHERS = {name: {x for x in imported_by(name) if x[0] != "."} - set(sys.stdlib_module_names) for name in MODULES}


def within(*rooms):
    """The modules called so, and those in packages called so."""
    return {name for name in MODULES if any(name == room or name.startswith(f"{room}.") for room in rooms)}


def reached_from(*rooms):
    """All that is imported with them."""
    found, todo = set(), within(*rooms)
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= GRAPH[name] - found
    return found


# What a room may know of other packages, and of ours what it must not reach, by whichever way.
KNOWS_ALONE = {
    "losses": {"torch", "numpy"},
    "kernels": {"torch", "triton"},
    "schedules": {"torch"},
    "comparison.statistics": {"numpy", "scipy"},
}
MUST_NOT_REACH = {
    "evaluation": ("trainer", "checks", "script", "inputs", "measurement", "comparison", "cli"),
    "trainer": ("evaluation", "script", "inputs", "measurement", "comparison", "cli"),
    "checkpointing": ("trainer", "evaluation"),
    "regularizers": ("trainer", "checkpointing", "evaluation"),
    "texts": ("trainer", "regularizers", "checkpointing", "evaluation", "script", "inputs", "cli"),
    "forward": ("trainer", "checkpointing", "evaluation"),
    "adapters": ("regularizers", "forward", "checkpointing", "trainer", "evaluation"),
    "losses": ("adapters", "regularizers", "config"),
    "schedules": ("adapters", "regularizers", "config"),
    "data": ("trainer", "evaluation", "script", "inputs"),
    "script": ("trainer", "inputs", "measurement", "comparison", "cli"),
    "inputs": ("trainer", "measurement", "comparison", "cli"),
    "comparison.report": ("trainer", "script", "inputs", "measurement", "adapters", "losses", "cli"),
}


def test_rules_are_about_modules_that_exist():
    named = {*KNOWS_ALONE, *MUST_NOT_REACH, *(room for rooms in MUST_NOT_REACH.values() for room in rooms)}
    assert not sorted(room for room in named if not within(room))


@pytest.mark.parametrize("room", KNOWS_ALONE)
def test_mathematics_knows_tensors_alone(room):
    assert set().union(*(OTHERS[name] for name in within(room))) <= KNOWS_ALONE[room]


@pytest.mark.parametrize("room", MUST_NOT_REACH)
def test_imports_point_one_way(room):
    assert not reached_from(room) & within(*MUST_NOT_REACH[room])


def test_no_two_modules_import_each_other():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError


def test_no_two_rooms_import_each_other():
    rooms = {}
    for name, imported in GRAPH.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update({other.split(".")[0] for other in imported} - {room})
    tuple(graphlib.TopologicalSorter(rooms).static_order())


def test_the_trainer_is_known_to_what_measures_its_model_or_looks_at_it_beforehand_alone():
    assert {name for name, imported in GRAPH.items() if "trainer" in imported} == {"measurement", "preflight"}
    assert {"losses", "schedules", "regularizers.teacher"} <= reached_from("trainer")


def test_a_report_is_written_without_torch_and_trl():
    done = run_python(
        "import sys, trl_ema.comparison.report\n"
        "print(*{'torch', 'trl', 'transformers', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# The rooms whose functions and classes others build on.
DOCUMENTED = ["schedules", "losses", "data", "offline", "forward", "adapters", "regularizers", "model_card"]


@pytest.mark.parametrize("room", DOCUMENTED)
def test_public_functions_and_classes_are_documented(room):
    public = []
    for name in within(room):
        module = importlib.import_module(f"trl_ema.{name}")
        public += [
            x for name, x in vars(module).items()
            if name[0] != "_" and getattr(x, "__module__", None) == module.__name__ and (inspect.isfunction(x) or inspect.isclass(x))
        ]  # fmt: skip
    assert public
    # A dataclass without a docstring gets its signature for one.
    undocumented = [x.__name__ for x in public if not x.__doc__ or x.__doc__.startswith(f"{x.__name__}(")]
    assert not undocumented
