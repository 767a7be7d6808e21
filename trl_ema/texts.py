"""
Texts that a model writes before its training, which the student is held to by rehearsal.

Half of them are *raw*: from the document-start token, without a template, a fixed number of tokens, past any end of text. Half are
*chats*: after the template's user header the model writes the prompt, then after the generation prompt its answer. Both are drawn
at temperature 1 with nothing cut off, so the mean of KL(p_base || p_θ) over their tokens estimates KL(base || student) itself.

    texts = write_texts(model, tokenizer, sampling, texts_path(model_fingerprint(model, tokenizer), sampling))

or, without a training, `trl-ema rehearse --model_name_or_path M --num_texts N`.

Each text has random numbers of its own, made from the seed and its place: it is the same for any number of ranks and after an
interruption. With another batch size it is the same but where rounding decides.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from .adapters.names import base_of
from .adapters.switching import evaluating, switched, without_adapter
from .files import OutputError
from .fingerprint import Context, model_fingerprint
from .losses import IGNORE_INDEX
from .offline import cache_dir
from .options import plain_count, take_booleans
from .processes import refuse_to_write
from .sharding import any_sharded
from .workarounds import keep_4bit_layers_trainable


BATCH_SIZE = 64
KINDS = ("raw", "chat")
# (prompts, random numbers, ends): what is written after each prompt
Continuation = Callable[[list[list[int]], Tensor, Iterable[int]], list[list[int]]]

_ONE = 2.0**52  # a probability of 1 as a whole number; of a float32 above 2^-28 no digit is lost
_SENTINEL = "SELFWRITTENPROMPT"


@dataclass(frozen=True)
class Sampling:
    """
    What decides which texts a model writes.

    Args:
        num_texts (`int`): How many.
        num_tokens (`int`): Tokens of a raw text, with its start; of a chat at most, with its template.
        seed (`int`): Of all texts.
        start_token (`str`, *optional*): Token that a raw text starts with. By default the tokenizer's `bos_token`, else that of the
            model's configuration if the tokenizer holds it for a special one.
        chat (`bool`, *optional*): By default half of the texts are chats if the tokenizer has a chat template, and none
            otherwise. `True`: chats alone. `False`: raw ones alone.

    Raises:
        TypeError, ValueError: A field is of another kind, or too small.
    """

    num_texts: int = 256
    num_tokens: int = 96
    seed: int = 0
    start_token: str | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        take_booleans(self)
        for name, least in (("num_texts", 1), ("num_tokens", 2), ("seed", 0)):
            object.__setattr__(self, name, plain_count(name, getattr(self, name), least))
        if not isinstance(self.start_token, str | None):
            raise TypeError(f"`start_token` must be the text of a token, got {self.start_token!r}.")


@dataclass(frozen=True)
class Texts:
    """
    Self-written texts.

    Args:
        ids (`list` of `list` of `int`): The tokens of each as the model wrote them; of a chat with those of the template.
        kinds (`list` of `str`): Of each `"raw"` or `"chat"`.
        about (`dict`): `sampling`, `fingerprint` of model and tokenizer, their name, `start`, `header`, `tail` and `ends` (tokens),
            `batch_size`, `backend` and `versions`.
    """

    ids: list[list[int]]
    kinds: list[str]
    about: dict


def write_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    path: str | Path,
    *,
    before: Context | None = None,
    fingerprint: str | None = None,
    batch_size: int | None = None,
    continuation: Continuation | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    progress: bool = True,
) -> Texts:
    """
    Let `model` write texts to `path`; if they are there already they are read.

    Finished batches are kept below `path` + ".parts" until all are done: after an interruption only the others are written.
    The model is in eval mode meanwhile; its own settings of generation do not count, and no random state is touched.

    Args:
        before (callable, *optional*): Context in which the model is as before its training, such as
            [`StartingPoint.activate`]. By default it is the model without its adapter.
        fingerprint (`str`, *optional*): [`model_fingerprint`] within `before`, if it is known.
        batch_size (`int`, *optional*): Texts written at once. To go on after an interruption it must be the same.
        continuation (callable, *optional*): Writes instead of `model`, and must compute as it does: takes prompts (tokens), random
            numbers in [0, 1) of shape `(prompts, tokens at most)` and the tokens that end a text, with which it ends.
        rank, world_size (`int`): Rank r writes each batch i with i mod world_size = r.
        barrier (callable, *optional*): Returns when every rank has called it, of several; each calls it twice.

    Raises:
        ValueError: The document-start token is unknown, the chat template cannot be used or leaves no room for a text, the
            model is sharded, or `path` holds other texts.
        OutputError: They cannot be written, as on a full disk.
    """
    path = Path(path)
    before = before or (lambda: without_adapter(model))
    size = BATCH_SIZE if batch_size is None else plain_count("batch_size", batch_size, 1)
    if continuation is None and not path.exists():
        refuse_to_write(any_sharded(model), sampling.num_texts, sampling.num_tokens)
    about = _about(model, tokenizer, sampling)
    about |= {
        "fingerprint": fingerprint or model_fingerprint(model, tokenizer, before),
        "batch_size": size,
        "backend": "transformers" if continuation is None else type(continuation).__name__,
    }
    batches = _batches(sampling, about["header"] is not None, size)
    wait = barrier or (lambda: None)
    # Another job may finish the same texts at any moment: every rank comes to both barriers, whatever it finds.
    if not path.exists():
        with before(), _ready_to_write(model):
            go_on = continuation or partial(_continue, model)
            _write_parts(go_on, batches[rank::world_size], about, path, progress and rank == 0)
    wait()
    if rank == 0 and not path.exists():
        _join_parts(path, batches, about)
    wait()
    texts = _load_same(path, about)
    if rank == 0:
        shutil.rmtree(_parts(path), ignore_errors=True)  # not before: a kill between the two costs nothing
    return texts


def _load_same(path: Path, about: dict) -> Texts:
    texts = load_texts(path, model_fingerprint=about["fingerprint"])
    # The header, which the template of the fingerprint has written, may hold the date of that day.
    for name in ("sampling", "start", "ends"):
        if texts.about.get(name) != about[name]:
            raise ValueError(
                f"{path} holds texts of another sampling: `{name}` is {texts.about.get(name)!r} there and {about[name]!r} here. "
                "Give another file, or delete it."
            )
    return texts


# What the texts are made of


def check_sampling(model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
    """Raises `ValueError` if this model cannot write such texts: before it begins, and without files."""
    refuse_to_write(any_sharded(model), sampling.num_texts, sampling.num_tokens)
    _about(model, tokenizer, sampling)


def _about(model: Any, tokenizer: Any, sampling: Sampling) -> dict:
    """All that decides over the texts. `header` and `tail` are what the template writes before and after a prompt."""
    chats = sampling.chat if sampling.chat is not None else bool(tokenizer.chat_template)
    header, tail = _around_prompt(tokenizer) if chats else (None, None)
    around = len(header or ()) + len(tail or ())
    if around + sampling.num_tokens // 3 >= sampling.num_tokens:
        raise ValueError(
            f"`num_tokens={sampling.num_tokens}` leaves no room for an answer: the chat template takes {around}, and the prompt a "
            f"third. Give at least {3 * around // 2 + 1} (`rehearsal_num_tokens` in training), or `chat=False` (`rehearsal_chat`)."
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and sampling.num_tokens > limit:
        raise ValueError(
            f"`num_tokens={sampling.num_tokens}` (`rehearsal_num_tokens` in training) is more than the {limit} positions that the model knows."
        )
    ends = _ends_of_text(model, tokenizer)
    special = next((token for token in tail or () if _is_special(tokenizer, token)), None)
    if special is not None:
        ends.add(special)
    return {
        "model": getattr(model.config, "_name_or_path", ""),
        "sampling": asdict(sampling),
        "start": None if sampling.chat else _start_token(model, tokenizer, sampling.start_token),
        "header": header,
        "tail": tail,
        "ends": sorted(ends),
        "versions": {name: version(name) for name in ("trl_ema", "torch", "transformers")},
    }


def _start_token(model: Any, tokenizer: Any, given: str | None) -> int:
    if given is not None:
        token = tokenizer.get_vocab().get(given)
        if token is None:
            raise ValueError(
                f"`start_token={given!r}` (`rehearsal_start` in training) is no token of the tokenizer. Give one as it is written "
                f"there, such as {tokenizer.eos_token!r}."
            )
        return token
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    token = getattr(model.config.get_text_config(), "bos_token_id", None)
    # Some configurations have a default that is an ordinary word of the tokenizer.
    if isinstance(token, int) and _is_special(tokenizer, token):
        return token
    raise ValueError(
        "The tokenizer has no `bos_token`, and the model's configuration names none: nobody knows what a document starts with. Give "
        f"it as `start_token` (`rehearsal_start` in training); often it is {tokenizer.eos_token!r}."
    )


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or bool(added is not None and added.special)


def _ends_of_text(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a turn, by the tokenizer and by the model's settings of generation."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])]
    return {int(token) for token in found if token is not None}


def _around_prompt(tokenizer: Any) -> tuple[list[int], list[int]]:
    """
    Tokens that the chat template writes before a user's first words, and after them until the answer begins.

    Raises:
        ValueError: There is no template, or it cannot be cut so.
    """
    hint = "Set `chat=False` (`rehearsal_chat` in training; raw texts alone), or mend `tokenizer.chat_template`."
    if not tokenizer.chat_template:
        raise ValueError(f"`chat=True`, but the tokenizer has no chat template. {hint}")
    messages = [{"role": "user", "content": _SENTINEL}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template may raise
        raise ValueError(f"The chat template cannot write a user's message ({error}). {hint}") from error
    header, tail = text.partition(_SENTINEL)[0], text.rpartition(_SENTINEL)[2]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (header, tail)]
    if _SENTINEL not in text or not ids[0] or not ids[1]:
        raise ValueError(
            f"The chat template writes nothing before a user's message, nothing after it, or not the message: {text!r}. {hint}"
        )
    return ids[0], ids[1]


def drawn_labels(texts: Texts) -> list[list[int]]:
    """
    The tokens of each text that the model has drawn; −100 for those it was given: a raw text's start, a chat's template.

    A prompt that is shorter than it may be was ended by a draw, which the template's own end stands for: that is a label, too.
    Without it prompts would be chosen by a draw that does not count. Where the template writes something else before it ends the
    turn, no token of the text is that draw, and no token of a prompt is a label: answers alone are.
    """
    labels = []
    for ids, kind in zip(texts.ids, texts.kinds, strict=True):
        row = list(ids)
        given = _given_in_chat(ids, texts.about) if kind == "chat" else [range(1)]
        for place in (place for part in given for place in part):
            row[place] = IGNORE_INDEX
        labels.append(row)
    return labels


def _given_in_chat(ids: list[int], about: dict) -> list[range]:
    """Places in a chat that carry no label, see [`drawn_labels`]."""
    header, tail = about["header"], about["tail"]
    # A prompt ends before any token that ends a turn, and the tail has one of them: it is not found too early.
    begin = next(i for i in range(len(header), len(ids)) if ids[i : i + len(tail)] == tail)
    if tail[0] not in _turn_ends(about):
        return [range(begin + len(tail))]
    ended = begin - len(header) < _prompt_tokens(about)
    return [range(len(header)), range(begin + ended, begin + len(tail))]


def _turn_ends(about: dict) -> set[int]:
    """Tokens that end a prompt: a template that ends a turn with plain text ends it with the first token of that."""
    ends = set(about["ends"])
    return ends if ends & set(about["tail"]) else ends | {about["tail"][0]}


def _prompt_tokens(about: dict) -> int:
    """Of a chat, at most."""
    return about["sampling"]["num_tokens"] // 3


def _batches(sampling: Sampling, chats: bool, size: int) -> list[list[int]]:
    """Numbers of the texts that are written together: of one kind. Where there are both, odd ones are chats."""
    numbers = range(sampling.num_texts)
    both = chats and not sampling.chat
    kinds = [numbers[::2], numbers[1::2]] if both else [numbers]
    return [list(kind[i : i + size]) for kind in kinds for i in range(0, len(kind), size)]


def _is_chat(number: int, about: dict) -> bool:
    return about["header"] is not None and (about["start"] is None or number % 2 == 1)


# Writing


def _ready_to_write(model: Any) -> AbstractContextManager:
    """In eval mode, nothing recomputed, and with none of the model's own settings of generation (penalties, top-p ...)."""
    keep_4bit_layers_trainable(model)
    switches = evaluating(model)
    switches += [(m, "gradient_checkpointing", False) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    return switched([*switches, (base_of(model), "generation_config", GenerationConfig())])


def _write_parts(go_on: Continuation, batches: list[list[int]], about: dict, path: Path, progress: bool) -> None:
    with tqdm(total=sum(map(len, batches)), desc="Writing texts", unit="text", disable=not progress) as bar:
        for numbers in batches:
            part = _part(path, numbers)
            if _read_part(part, about) is None:
                chat = _is_chat(numbers[0], about)
                rows = (_write_chats if chat else _write_raw)(go_on, numbers, about)
                _save(part, Texts(rows, [KINDS[chat]] * len(rows), about), _goes_on(path))
            bar.update(len(numbers))


def _write_raw(go_on: Continuation, numbers: list[int], about: dict) -> list[list[int]]:
    sampling = about["sampling"]
    starts = [[about["start"]] for _ in numbers]
    written = go_on(starts, _uniforms(numbers, sampling["seed"], sampling["num_tokens"] - 1), ())
    return [start + row for start, row in zip(starts, written, strict=True)]


def _write_chats(go_on: Continuation, numbers: list[int], about: dict) -> list[list[int]]:
    sampling = about["sampling"]
    length, third = sampling["num_tokens"], _prompt_tokens(about)
    uniforms = _uniforms(numbers, sampling["seed"], third + length)
    header, tail, ends = about["header"], about["tail"], set(about["ends"])
    turn_ends = _turn_ends(about)
    headers = [header for _ in numbers]
    prompts = go_on(headers, uniforms[:, :third], turn_ends)
    # An end of the model's own counts, but is written as the template writes it.
    begun = [header + (p[:-1] if p and p[-1] in turn_ends else p) + tail for p in prompts]
    room = length - min(map(len, begun))
    answers = go_on(begun, uniforms[:, third : third + room], ends)
    return [(row + answer)[:length] for row, answer in zip(begun, answers, strict=True)]


def _uniforms(numbers: list[int], seed: int, tokens: int) -> Tensor:
    """Random numbers in [0, 1), of shape `(texts, tokens)`: those of a text by its own generator, on the CPU."""
    rows = []
    for number in numbers:
        own = hashlib.sha256(f"{seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(own[:7]))
        rows.append(torch.rand(tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _continue(model: Any, prompts: list[list[int]], uniforms: Tensor, ends: Iterable[int]) -> list[list[int]]:
    """What the model writes after each of the prompts, a token for each column of `uniforms`, or until one of `ends`, with it."""
    if not uniforms.shape[1]:
        return [[] for _ in prompts]
    base, ends = base_of(model), set(ends)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=base.device)
    draw = _Draw(uniforms.to(base.device), width)
    output = base.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([draw]),
        generation_config=GenerationConfig(
            do_sample=False,  # the processor has drawn
            max_new_tokens=uniforms.shape[1],
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            use_cache=True,
        ),
    )
    if not draw.are_numbers:
        raise ValueError("The model's logits are not all numbers: it cannot write texts. Load it in another `dtype`.")
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


class _Draw(LogitsProcessor):
    """Leaves of all tokens the one that is drawn: transformers' own sampling has one random state for all."""

    def __init__(self, uniforms: Tensor, width: int):
        self.uniforms, self.width = uniforms, width
        self.are_numbers: Any = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, are_numbers = draw_tokens(scores, self.uniforms[:, input_ids.shape[1] - self.width])
        self.are_numbers = are_numbers & self.are_numbers
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """
    One token of softmax(logits) a row, by inversion: the first whose cumulative probability exceeds the row's uniform number.

    Probabilities are summed as whole numbers, which is exact in any order: PyTorch has no repeatable sum of floats along a row on
    a GPU. A token of probability 0 is never drawn.

    Args:
        logits (`Tensor`): Of shape `(rows, vocabulary)`.
        uniforms (`Tensor`): Of shape `(rows,)`, float64 in [0, 1).

    Returns:
        `tuple`: The tokens, of shape `(rows,)`, and a boolean, whether all logits were numbers.
    """
    probabilities = logits.float().softmax(-1)
    are_numbers = probabilities[:, 0].isfinite().all()  # one NaN makes all of its row NaN
    cumulative = (probabilities * _ONE).long().cumsum(-1)
    total = cumulative[:, -1:]
    at = torch.minimum((uniforms[:, None] * total).long(), total - 1)
    tokens = torch.searchsorted(cumulative, at, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1), are_numbers


# Files


def texts_path(fingerprint: str, sampling: Sampling) -> Path:
    """Where in the cache the texts of a model are, see [`model_fingerprint`]."""
    digest = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "texts" / f"{fingerprint}-{digest[:8]}.safetensors"


def load_texts(path: str | Path, *, model_fingerprint: str | None = None) -> Texts:
    """
    The texts in a file of [`write_texts`].

    Args:
        model_fingerprint (`str`, *optional*): Of the model that is to be held to them, see [`model_fingerprint`].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or cut off, or another model wrote it, or one with another tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no texts in {path}. Write them with `trl-ema rehearse --output_file {path}`."
        )
    again = "Delete it, and let the model write it again (`trl-ema rehearse`)."
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("ids", "lengths", "kinds") if "about" in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}). {again}") from error
    if not tensors:
        raise ValueError(
            f"{path} holds no texts that a model has written, but other tensors. Give a file of `trl-ema rehearse`."
        )
    if found.get("sha256") != _checksum(tensors, found["about"]):
        raise ValueError(f"{path} is damaged: its checksum is another. {again}")
    about = json.loads(found["about"])
    if model_fingerprint is not None:
        _check_fingerprint(path, about, model_fingerprint)
    rows = tensors["ids"].split(tensors["lengths"].tolist())
    return Texts([row.tolist() for row in rows], [KINDS[kind] for kind in tensors["kinds"].tolist()], about)


def _check_fingerprint(path: Path, about: dict, expected: str) -> None:
    theirs, ours = about["fingerprint"].split("-"), expected.split("-")
    for what, one, other in zip(("model", "tokenizer"), theirs, ours, strict=True):
        if one != other:
            raise ValueError(
                f"{path} was written by another {what}: {about['model']!r} with {what} fingerprint {one}, and this one's is {other}. "
                "Quantization counts, and so do the chat template and tokens that were added. Give the file of this model, or "
                "none, and leave none in the output folder: then it writes its own."
            )


def save_texts(texts: Texts, path: str | Path) -> None:
    """
    Write `texts` to `path`, whole or not at all.

    Raises:
        OutputError: They cannot be written, as on a full disk.
    """
    _save(
        Path(path),
        texts,
        f"Texts that a model has written stay in {cache_dir() / 'texts'}: make room or mend the permissions.",
    )


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    digest: Any = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def _parts(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _part(path: Path, numbers: list[int]) -> Path:
    return Path(_parts(path), f"texts-{numbers[0]:06d}-{numbers[-1]:06d}-{len(numbers)}.safetensors")


def _read_part(part: Path, about: dict) -> Texts | None:
    """A finished batch of the same texts; `None` for a damaged one or another's, which is written again."""
    try:
        texts = load_texts(part)
    except (FileNotFoundError, ValueError):
        return None
    # With a date in the template's header that of another day is as good.
    others = ("versions", "model", "header", "tail")
    same = all(texts.about.get(name) == about[name] for name in about if name not in others)
    return texts if same else None


def _join_parts(path: Path, batches: list[list[int]], about: dict) -> None:
    ids: dict[int, list[int]] = {}
    for numbers in batches:
        texts = _read_part(_part(path, numbers), about)
        if texts is None and path.exists():  # another job was faster, and has taken the parts away
            return
        if texts is None:
            raise OutputError(
                f"{_part(path, numbers)} is missing, which another process has written. Machines without a common file system cannot "
                "write texts together: write them on one, with `trl-ema rehearse --output_file FILE`, and copy the file."
            )
        ids.update(zip(numbers, texts.ids, strict=True))
    numbers = sorted(ids)
    kinds = [KINDS[_is_chat(number, about)] for number in numbers]
    _save(path, Texts([ids[number] for number in numbers], kinds, about), _goes_on(path))


def _goes_on(path: Path) -> str:
    return (
        f"What is written already stays in {_parts(path)}: make room or mend the permissions and run it again, which goes on from "
        "there, or give another file."
    )


def _save(file: Path, texts: Texts, mend: str) -> None:
    """Write a whole file, or none. Raises [`OutputError`], with what to do."""
    tensors = {
        "ids": torch.tensor([token for row in texts.ids for token in row], dtype=torch.int32),
        "lengths": torch.tensor([len(row) for row in texts.ids], dtype=torch.int32),
        "kinds": torch.tensor([KINDS.index(kind) for kind in texts.kinds], dtype=torch.uint8),
    }
    about = json.dumps(texts.about)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not by safetensors: its files are the owner's alone, and it would hide why writing failed.
        scratch.write_bytes(save(tensors, {"about": about, "sha256": _checksum(tensors, about)}))
        os.replace(scratch, file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"Cannot write texts to {file} ({error.strerror}). {mend}") from error
