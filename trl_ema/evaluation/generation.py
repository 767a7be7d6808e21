"""Greedy answers to held-out prompts, and how close they come to the references."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..extras import require
from ..offline import embedding_model
from .models import evaluating
from .tasks import hub_is_reachable


logger = logging.getLogger(__name__)

PACKAGES = ("sacrebleu", "rouge_score", "nltk", "sentence_transformers")


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """
    Greedy continuations of the prompts of `rows`, in left-padded batches.

    Args:
        rows (`Dataset`): With a `prompt` column, texts or lists of messages; `tools` and `chat_template_kwargs` as in TRL.
        max_new_tokens (`int`): Tokens per answer at most.

    Returns:
        `list` of `str`: One answer per row, without special tokens.
    """
    is_chat = bool(len(rows)) and not isinstance(rows[0]["prompt"], str)
    prompts = [_prompt_text(tokenizer, row) for row in rows]
    # Prompts of about one length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with evaluating(model), _padding_left(tokenizer):
        for start in tqdm(range(0, len(order), batch_size), desc="Generations", leave=False):
            part = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[i] for i in part], return_tensors="pt", padding=True, add_special_tokens=not is_chat
            )
            output = model.generate(
                **batch.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
            )
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                answers[i] = text.strip()
    return answers


@contextmanager
def _padding_left(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def prompts_and_references(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """
    For each row the text of its last `prompt`, and the `reference` that an answer to it is compared with: the completion's first
    message, a tool call or a list of parts as the chat template writes it, without special tokens as in an answer.

    Raises:
        ValueError: The chat template cannot write a row.
    """
    found = []
    for i, row in enumerate(rows):
        try:
            _prompt_text(tokenizer, row)
            found.append({"prompt": _text_of(row["prompt"]), "reference": _reference(tokenizer, row)})
        except Exception as error:  # whatever a chat template may raise
            raise ValueError(
                f"Row {i} has no prompt and answer that can be written ({type(error).__name__}: {error}): {str(row)[:200]}. Mend "
                "it, drop it, or ask for no generations."
            ) from error
    return found


def _prompt_text(tokenizer: Any, row: dict, completion: Sequence[dict] = (), start_answer: bool = True) -> str:
    """What the model continues: a text, or the messages as the trainer writes them, with the row's tools and options."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        [*row["prompt"], *completion],
        tokenize=False,
        add_generation_prompt=start_answer,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **row.get("chat_template_kwargs", {}),
    )


def _reference(tokenizer: Any, row: dict) -> str:
    if isinstance(row["completion"], str):
        return row["completion"]
    first = row["completion"][0]
    if isinstance(first.get("content"), str) and not first.get("tool_calls"):
        return first["content"]
    texts = _prompt_text(tokenizer, row), _prompt_text(tokenizer, row, [first], start_answer=False)
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return tokenizer.decode(whole[common_prefix_length(before, whole) :], skip_special_tokens=True).strip()


def _text_of(messages: str | list[dict]) -> str:
    """A text, or that of the last of several messages."""
    content = messages if isinstance(messages, str) else messages[-1].get("content")
    if isinstance(content, list):
        content = "\n".join(part.get("text") or "" for part in content)
    return content or ""


def generation_metrics(
    answers: Sequence[str], references: Sequence[str], semantic_model: str | None = None
) -> dict[str, float]:
    """
    Agreement of answers with one reference each. Corpus means; BLEU and chrF in [0, 100], the others in [0, 1].

    Args:
        semantic_model (`str`, *optional*): Name or path of a `sentence-transformers` model. Default: all-MiniLM-L6-v2,
            from the hub or, where it does not answer, from the package registry.

    Returns:
        `dict`: `bleu`, `chrf` (sacrebleu), `rouge1`, `rouge2`, `rougeL` (F1), `meteor`, `meteor_uses_wordnet` (1, or 0
        where NLTK's WordNet is not installed: then METEOR matches words and stems, no synonyms), `semantic` (mean cosine
        similarity of sentence embeddings) and `empty` (answers without a word: they score 0, and a warning says so).

    Raises:
        ValueError: There are not as many answers as references.
        ImportError: The extra `eval` is not installed.

    Sources: Papineni et al. 2002 (BLEU), Popović 2015 (chrF), Lin 2004 (ROUGE), Banerjee & Lavie 2005 (METEOR), Reimers &
    Gurevych 2019, https://arxiv.org/abs/1908.10084 (sentence embeddings).
    """
    require("eval", *PACKAGES)
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    if len(answers) != len(references) or not references:
        raise ValueError(
            f"Got {len(answers)} answers and {len(references)} references; expected as many, at least one."
        )
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        logger.warning(
            "%d of %d generations are empty and score 0. If this is not the model's failure, look at the chat template and "
            "the end token, or raise `max_new_tokens`.",
            empty,
            len(answers),
        )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    meteor, uses_wordnet = _meteor(answers, references)
    return {
        "bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(answers), [list(references)]).score,
        **{name: sum(r[name].fmeasure for r in rouge) / len(rouge) for name in ("rouge1", "rouge2", "rougeL")},
        "meteor": meteor,
        "meteor_uses_wordnet": float(uses_wordnet),
        "semantic": sum(semantic_similarity(answers, references, semantic_model)) / len(answers),
        "empty": empty,
    }


class _NoWordNet:
    """Stands in for NLTK's WordNet reader: no word has a synonym."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def _meteor(answers: Sequence[str], references: Sequence[str]) -> tuple[float, bool]:
    from nltk.corpus import wordnet
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError:
        wordnet = _NoWordNet()
    scores = [
        single_meteor_score(wordpunct_tokenize(reference), wordpunct_tokenize(answer), wordnet=wordnet)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores), not isinstance(wordnet, _NoWordNet)


_SEMANTIC_MODELS: dict[str, Any] = {}


def semantic_similarity(
    answers: Sequence[str], references: Sequence[str], model_name: str | None = None
) -> list[float]:
    """Cosine similarity of the sentence embeddings of each answer and its reference, in [-1, 1]; 0 for an empty answer."""
    from sentence_transformers import SentenceTransformer

    if model_name is None:
        model_name = "sentence-transformers/all-MiniLM-L6-v2" if hub_is_reachable() else embedding_model()
    if model_name not in _SEMANTIC_MODELS:
        _SEMANTIC_MODELS[model_name] = SentenceTransformer(model_name)
    model = _SEMANTIC_MODELS[model_name]
    a, b = (
        model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        for texts in (answers, references)
    )
    cosines = (a * b).sum(-1).tolist()
    return [cosine if answer.strip() else 0.0 for cosine, answer in zip(cosines, answers, strict=True)]
