"""
The data of the map of methods (frontier_definitions.yaml, frontier_medquad.yaml), from sets that the package does not bring.

    python benchmarks/frontier.py --sets FOLDER --output_dir runs/frontier/data

FOLDER holds `medquad/short_dedup.jsonl` (MedQuAD, Ben Abacha & Demner-Fushman 2019: `question`, `answer`, `split`),
`self_instruct/user_oriented_252.jsonl` and `self_instruct/seed_tasks.jsonl` (Wang et al. 2022) and
`general_text/wiki_demo.jsonl` (`text`, articles of Wikipedia). Written are:

    medquad/train.jsonl, test.jsonl       the second domain: short answers, whose diseases are on one side alone
    human_answers.jsonl                   drift: human-written answers to instructions
    wikipedia.jsonl                       drift: encyclopaedic text
    own_answers.jsonl                     drift: what the model before training answers to prompts that no method sees
    given_texts.jsonl                     to rehearse instead of the model's own texts: more human-written answers, of both sets
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trl_ema.evaluation.models import load_base
from trl_ema.files import write_jsonl
from trl_ema.offline import demo_model


ROWS, TOKENS = 16, 80  # of each source of drift


def medquad(sets: Path, split: str) -> list[dict]:
    rows = _read(sets / "medquad" / "short_dedup.jsonl")
    return [{"prompt": row["question"], "completion": row["answer"]} for row in rows if row["split"] == split]


def human_answers(rows: list[dict], tokenizer) -> list[dict]:
    """Instructions with their first human answer, of at least a sentence."""
    found = []
    for row in rows:
        answer = row["instances"][0]["output"].strip()
        if len(answer.split()) >= 12:
            found.append({"prompt": _prompt(row), "completion": _first_tokens(answer, tokenizer)})
    return found


def wikipedia(sets: Path, tokenizer) -> list[dict]:
    """Two passages of each article, the second from its middle."""
    found = []
    for row in _read(sets / "general_text" / "wiki_demo.jsonl"):
        words = row["text"].split(" ")
        passages = [words[:TOKENS], words[len(words) // 2 :][:TOKENS]]
        found += [{"text": _first_tokens(" ".join(passage), tokenizer)} for passage in passages]
    return found[:ROWS]


@torch.no_grad()
def own_answers(rows: list[dict], model, tokenizer) -> list[dict]:
    """Sampled at temperature 1 from the whole vocabulary: in expectation KL(before ‖ model) on them is the drift itself."""
    torch.manual_seed(0)
    found = []
    for row in rows:
        messages = [{"role": "user", "content": _prompt(row)}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append({"prompt": _prompt(row), "completion": answer})
    return [row for row in found if row["completion"].strip()]


def _instructions(path: Path) -> list[dict]:
    return [row for row in _read(path) if len(_prompt(row).split()) <= TOKENS]


def _prompt(row: dict) -> str:
    return "\n".join(filter(None, [row["instruction"].strip(), row["instances"][0]["input"].strip()]))


def _first_tokens(text: str, tokenizer) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"][:TOKENS], skip_special_tokens=True)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/frontier/data"))
    parser.add_argument("--model", help="whose own answers; default: the offline demo model")
    args = parser.parse_args()
    name = args.model or demo_model()
    model, _ = load_base(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    asked, tasks = (
        _instructions(args.sets / "self_instruct" / f"{file}.jsonl") for file in ("user_oriented_252", "seed_tasks")
    )
    answered = human_answers(asked, tokenizer)
    for file, rows in {
        "medquad/train": medquad(args.sets, "train"),
        "medquad/test": medquad(args.sets, "eval"),
        "human_answers": answered[:ROWS],
        "wikipedia": wikipedia(args.sets, tokenizer),
        "own_answers": own_answers(tasks[:ROWS], model, tokenizer),
        "given_texts": answered[ROWS:] + human_answers(tasks[ROWS:], tokenizer),
    }.items():
        write_jsonl(args.output_dir / f"{file}.jsonl", rows)
        print(f"{len(rows)} rows in {args.output_dir / file}.jsonl")


if __name__ == "__main__":
    main()
