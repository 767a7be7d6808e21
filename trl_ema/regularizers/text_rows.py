"""Texts as further rows, or documents, of a micro-batch."""

from collections.abc import Iterable

import torch

from .base import Inputs


def with_rows(inputs: Inputs, texts: list[list[int]], pad: int, multiple: int = 1) -> Inputs:
    """A padded micro-batch with the texts as further rows, as long as a `multiple` of that many tokens."""
    rows, length = inputs["input_ids"].shape
    longest = padded_length([length, *map(len, texts)], multiple)
    of_text = {"input_ids": pad, "attention_mask": 0, "labels": -100}
    batch = dict(inputs)
    for name, value in inputs.items():
        if not (torch.is_tensor(value) and value.shape == (rows, length)):
            continue
        fill = of_text.get(name, 0)
        begins = [_of_text(name, ids) for ids in texts]
        more = torch.tensor([begin + [fill] * (longest - len(begin)) for begin in begins])
        own = torch.nn.functional.pad(value, (0, longest - length), value=fill)
        batch[name] = torch.cat([own, _to(more, value)])
    return batch


def with_joined_rows(inputs: Inputs, texts: list[list[int]], pad: int, multiple: int = 1) -> tuple[Inputs, int]:
    """A padded micro-batch with the texts one after another in as few further rows as hold them in their order, and their number."""
    width = padded_length([inputs["input_ids"].shape[1], *map(len, texts)], multiple)
    rows: list[list[list[int]]] = [[]]
    for text in texts:
        if sum(map(len, rows[-1])) + len(text) > width:
            rows.append([])
        rows[-1].append(text)
    batch = with_rows(inputs, [[token for text in row for token in text] for row in rows], pad, multiple)
    positions = torch.arange(width).repeat(len(batch["input_ids"]), 1)
    for i, row in enumerate(rows, start=len(inputs["input_ids"])):
        counted = [place for text in row for place in range(len(text))]
        positions[i] = torch.tensor([*counted, *range(len(row[-1]), len(row[-1]) + width - len(counted))])
    batch["position_ids"] = _to(positions, inputs["input_ids"])
    return batch | {"joined": True}, len(rows)


def padded_length(lengths: Iterable[int], multiple: int) -> int:
    """Of rows that are as long as the longest, or as the next `multiple`."""
    return -(-max(lengths) // multiple) * multiple


def _of_text(name: str, ids: list[int]) -> list[int]:
    """What a text has in a tensor of that name, before it is padded."""
    if name == "input_ids":
        return ids
    if name == "attention_mask":
        return [1] * len(ids)
    return list(range(len(ids))) if name == "position_ids" else []


def with_documents(inputs: Inputs, texts: list[list[int]], pad: int, multiple: int = 1) -> Inputs:
    """A packed micro-batch with the texts as further documents, and one of padding where it is not a `multiple` of that many tokens."""
    batch = dict(inputs)
    length = inputs["input_ids"].shape[1] + sum(map(len, texts))
    if filler := padded_length([length], multiple) - length:
        texts = [*texts, [pad] * filler]
    ids = torch.tensor([token for text in texts for token in text])
    more = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    more["position_ids"] = torch.cat([torch.arange(len(text)) for text in texts])
    if "seq_idx" in inputs:  # which document a token is of
        numbers = torch.cat([torch.full((len(text),), 1 + i) for i, text in enumerate(texts)])
        more["seq_idx"] = inputs["seq_idx"][0, -1] + _to(numbers, inputs["seq_idx"])
    for name, value in more.items():
        if name in inputs:
            batch[name] = torch.cat([inputs[name], _to(value[None], inputs[name])], 1)
    lengths = torch.tensor([len(text) for text in texts])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in inputs:
            bounds = inputs[name][-1] + _to(lengths.cumsum(0), inputs[name])
            batch[name] = torch.cat([inputs[name], bounds])
    for name in ("max_length_q", "max_length_k"):
        if name in inputs:
            batch[name] = max(inputs[name], *map(len, texts))
    return batch


def _to(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(like.dtype).to(like.device, non_blocking=True)  # otherwise the host would wait
