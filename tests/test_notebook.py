"""The notebook: whole, without outputs, and running from top to bottom."""

import ast
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from trl import TrlParser

from trl_ema.tune_scale import ScaleArguments


PATH = Path(__file__).parents[1] / "notebooks" / "medical_ema.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5 and not any(cell.outputs or cell.execution_count for cell in code)


def test_a_table_of_ones_own_is_loaded_as_it_is_written(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "`trl_ema.data.load_split(" in text and 'load_dataset("csv"' not in text


def test_what_the_notebook_imports_is_there(notebook):
    sources = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    code = "\n".join(re.sub(r"^!(.*\\\n)*.*$", "pass", source, flags=re.MULTILINE) for source in sources)
    found = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and "trl_ema" in node.module
    ]
    assert len(found) == 5
    for node in found:
        for name in node.names:
            assert hasattr(importlib.import_module(node.module), name.name)


def test_a_model_whose_path_has_blanks_is_one_word_of_the_notebooks_command(notebook):
    (line,) = re.findall(
        r"^!trl-ema tune-scale ((?:.*\\\n)*.*)$", "\n".join(c.source for c in notebook.cells), re.MULTILINE
    )
    parser = TrlParser(ScaleArguments)
    parser.add_argument("run")
    args, _ = parser.parse_args_and_config(
        shlex.split(line.replace("\\\n", "").replace("{model_name}", "/my models/small"))
    )
    assert args.base == "/my models/small" and args.max_drift == 0.02


@pytest.mark.slow
@pytest.mark.timeout(2400)  # of minutes where nothing else runs
def test_the_notebook_runs_and_rehearsal_drifts_less(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    ]
    table = next(text for text in printed if "held-out loss before" in text)
    (before, plain, drift), (_, rehearsed, less) = (map(float, line.split()[1:]) for line in table.splitlines()[1:])
    assert plain < before and rehearsed < before and less < 0.6 * drift  # 0.52 when it was last run
    assert (tmp_path / "runs" / "notebook" / "rehearsed" / "scaled" / "adapter_model.safetensors").is_file()
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1
