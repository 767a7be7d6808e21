"""Another forward for a causal language model: the student's pass and those of teachers behind one fused LM head.

It is patched over TRL's own fused head (`add_fused_lm_head`), so it runs inside whatever wraps the model (DDP,
DeepSpeed, autocast) and TRL's `compute_loss` calls it without knowing.
"""

import contextlib
import functools
import itertools
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .losses import IGNORE_INDEX, LogitTransform, fused_linear_cross_entropy_kl
from .sharding import whole_weights


# A compiled model calls it as it is: there is nothing to fuse, and the chunks would be unrolled for each number of tokens.
_fused_loss = torch.compiler.disable(fused_linear_cross_entropy_kl)


class Teacher(Protocol):
    """Something that makes the model compute as a teacher, such as [`MeanTeacher`] or [`StartingPoint`]."""

    def activate(self) -> contextlib.AbstractContextManager: ...


@dataclass
class Divergence:
    """
    A term of the loss of a micro-batch, λ · Σ D(teacher, student) over some of its predictions; without a teacher
    λ · Σ CE of the tokens that follow in the rows themselves, labelled or not.

    Args:
        teacher ([`Teacher`], *optional*): Gives the context of its pass. Terms of one teacher, or of several that are the base
            (`is_base`), over sequences that differ, share a pass.
        weight (`float`): λ. The loss is divided by the number of labelled tokens, as the cross-entropy is.
        tokens (`str`): Which predictions, see [`divergence_mask`].
        sequences (`list[int]`, *optional*): Numbers of [`sequence_numbers`], those that the teacher sees; all by default.
        options: `direction`, `mixture` and `temperature` of [`fused_linear_cross_entropy_kl`].
        length (`int`, *optional*): No row of `sequences` has a token behind so many: a pass over them alone ends there.
        times (`torch.Tensor`, *optional*): λ is multiplied by it: a whole number on the device, which the host reads, of a term with
            `sequences`, where it waits in any case. FSDP2 casts whatever is not whole to its own precision on the way in.
        hidden (`torch.Tensor`, *optional*): The teacher's hidden states at the predictions of the term, `(tokens, hidden_size)`, in
            their order, known from before: it has no pass. Its LM head must be the student's.
    """

    teacher: Teacher | None
    weight: float
    tokens: str = "loss"
    sequences: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    times: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


# Beside it there is the cross-entropy alone.
_NONE = Divergence(None, 0.0, sequences=[])


@dataclass(frozen=True)
class Parts:
    """
    What of a micro-batch the student's own data are: its first sequences; further ones are behind them.

    Args:
        own (`int`): Their number.
        lengths (`tuple` of `int`, *optional*): Of padded rows, how many tokens those of its own have at most, and the further ones.
        apart (`bool`): Whether the student may pass over both one after the other, where that is less work than padding them alike.
            Not where weights are sharded: ranks that gather together would do so another number of times.
    """

    own: int
    lengths: tuple[int, int] | None = None
    apart: bool = False

    def are_better_apart(self, ids: torch.Tensor) -> bool:
        """Whether two passes are less work than one over all of `ids`, `(batch, seq_len)`."""
        if not self.apart or self.lengths is None:
            return False
        own, further = self.own * self.lengths[0], (len(ids) - self.own) * self.lengths[1]
        saved = ids.numel() - own - further
        # A GPU starts the kernels of a pass in the time of some thousand tokens: estimated, not measured.
        return 10 * saved >= ids.numel() and (ids.device.type == "cpu" or saved >= 2048)


@dataclass
class RegularizedOutput(ModelOutput):
    """
    What TRL's `SFTTrainer.compute_loss` reads (it sums each field) and the parts of the loss.

    Args:
        log_probs: −Σ (w·CE + λ·D), 0-dim: TRL takes its negative as the loss.
        entropy, is_top1, label_mask: Sums of the entropy, the top-1 hits and the labelled tokens, 0-dim.
        aux_loss: Load-balancing loss of a mixture-of-experts model.
        ce_loss: Σ CE, 0-dim.
        divergences: Σ D (without a teacher Σ CE) and the number of its tokens, for each [`Divergence`] in order, `(n, 2)`.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    divergences: torch.Tensor | None = None


def divergence_mask(
    kl_tokens: str,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """
    Which next-token predictions the divergence covers, `(batch, seq_len - 1)`.

    `"loss"`: those with a label. `"all"`: every prediction of a real token, so neither padding nor, in packed rows, the
    first token of the next document (where `position_ids` is 0). `"prompt"`: those of `"all"` without a label.
    """
    labelled = labels[:, 1:] != IGNORE_INDEX
    if kl_tokens == "loss":
        return labelled
    mask = torch.ones_like(labels[:, 1:], dtype=torch.bool)
    if attention_mask is not None:
        mask &= attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    if position_ids is not None:
        mask &= position_ids[:, 1:] != 0
    return mask & ~labelled if kl_tokens == "prompt" else mask


def sequence_numbers(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_) -> torch.Tensor:
    """
    Which sequence each token belongs to, `(batch, seq_len)`: its row, or in a single packed row its document. Documents begin
    where `position_ids` is 0.
    """
    if len(input_ids) == 1 and position_ids is not None:
        begins = position_ids == 0
        begins[:, 0] = True
        return begins.cumsum(-1) - 1
    return torch.arange(len(input_ids), device=input_ids.device)[:, None].expand(input_ids.shape)


def num_sequences(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **inputs) -> int:
    """How many [`sequence_numbers`] there are."""
    if len(input_ids) > 1 or position_ids is None:
        return len(input_ids)
    if "cu_seq_lens_q" in inputs:
        return len(inputs["cu_seq_lens_q"]) - 1
    return int(sequence_numbers(input_ids, position_ids).max()) + 1


def _tokens_of(chosen: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Which tokens belong to the `chosen` sequences, `(batch, seq_len)`."""
    numbers = sequence_numbers(**inputs)
    is_chosen = torch.zeros(numbers.numel(), dtype=torch.bool, device=numbers.device)  # longer than there are sequences
    return is_chosen.index_fill_(0, chosen, True)[numbers]


def _of_sequences(chosen: torch.Tensor, tokens: torch.Tensor, num_tokens: int, inputs: dict) -> dict:
    """`inputs` with the `chosen` sequences alone, in their order, whose `tokens` are given, `(batch, seq_len)`, with their number."""
    packed = len(tokens) == 1
    positions = _positions(tokens, num_tokens) if packed else chosen

    def cut(value):
        if not isinstance(value, torch.Tensor) or value.shape[:2] != tokens.shape:
            return value
        return value.index_select(1 if packed else 0, positions)

    taught = {key: cut(value) for key, value in inputs.items()}
    if "cu_seq_lens_q" in inputs:  # where documents begin and end, for attention without padding
        lengths = inputs["cu_seq_lens_q"].diff().index_select(0, chosen)
        bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=lengths.dtype), (1, 0))
        taught["cu_seq_lens_q"] = taught["cu_seq_lens_k"] = bounds
    return taught


def _positions(mask: torch.Tensor, number: int) -> torch.Tensor:
    """Where the flattened `mask` is true, of which the `number` is known: `nonzero` would wait for the device."""
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:number]


@dataclass
class _Tokens:
    """
    Which tokens enter a term of the loss, as positions in a flattened `(batch, seq_len)`.

    Args:
        student: Predictions of the divergence, before those that have a label and no divergence.
        number: How many are of the divergence.
        weight: Its λ.
        seen: Of the sequences that a teacher sees, all tokens, `(batch, seq_len)`, and their number; `None`: of all.
    """

    student: torch.Tensor
    number: int
    weight: float
    seen: tuple[torch.Tensor, int] | None = None


def _choose_tokens(divergence: Divergence, inputs: dict) -> _Tokens:
    """A GPU works ahead of the host, which waits for it here and nowhere else in the pass: once for each term."""

    def whole(mask):  # of every token: the last of a row predicts nothing
        return torch.nn.functional.pad(mask, (0, 1))

    mask, weight = whole(divergence_mask(divergence.tokens, **inputs)), divergence.weight
    labelled = whole(divergence_mask("loss", **inputs))
    if divergence.sequences is None and divergence.tokens == "prompt":  # none of which has a label
        number, num_others = torch.stack([mask.sum(), labelled.sum()]).tolist()
        positions = torch.cat([_positions(mask, number), _positions(labelled, num_others)])
        return _Tokens(positions, number, weight)
    if divergence.sequences is None:
        positions = mask.flatten().nonzero().squeeze(1)
        return _Tokens(positions, len(positions), weight)
    chosen = _tokens_of(_numbers(divergence.sequences, mask.device), inputs)
    mask &= whole(chosen[:, 1:])
    others = labelled & ~mask
    asked = [mask.sum(), others.sum(), chosen.sum(), *([] if divergence.times is None else [divergence.times])]
    number, num_others, num_seen, *times = torch.stack([one.to(mask.device) for one in asked]).tolist()
    student = torch.cat([_positions(mask, number), _positions(others, num_others)])
    return _Tokens(student, number, math.prod([weight, *times]), (chosen, num_seen))


def _numbers(sequences: Iterable[int], device: torch.device) -> torch.Tensor:
    # Otherwise the host would wait.
    return torch.tensor(sorted(sequences), dtype=torch.long).to(device, non_blocking=True)


def _select(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(batch, seq_len, ...)` at flattened `positions`."""
    return states.flatten(0, 1).index_select(0, positions.to(states.device))


def logit_transform(config: Any) -> LogitTransform:
    """Scale and soft-cap that a model family applies to its logits, by the names they have in its text config."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:
            scaling = float(config.logits_scaling)
            scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def add_regularized_forward(model: PreTrainedModel, *, dft: bool = False, eaft: bool = False) -> None:
    """
    Patch `model.forward`: with `fused_lm_head=True` and a list of `divergences` it returns a [`RegularizedOutput`], else what
    it returned before. `parts` ([`Parts`]) tells the student's own data from further rows, where there are any; with `joined=True`
    rows may hold several texts, which begin where `position_ids` is 0.

    Args:
        model (`PreTrainedModel`): The base model inside the `PeftModel`, already patched by `add_fused_lm_head`.
        dft, eaft (`bool`): Weight the cross-entropy, see [`fused_linear_cross_entropy_kl`].
    """
    fused_forward = model.forward
    text_config = model.config.get_text_config()
    transform = logit_transform(text_config)

    # `generate` validates its arguments against this signature.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, divergences=None, parts=None, **kwargs):
        if divergences is None:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        # With the first goes the cross-entropy of the labels, whose weight is 1.
        own = [] if divergences and divergences[0].teacher is not None else [_NONE]
        asked = [*own, *divergences]
        taught = _teach(self, asked, args, kwargs)
        labels = kwargs.pop("labels")
        states, aux_loss = _student_pass(self, args, kwargs, parts)
        head = self.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        own_heads = [(None, None) if one.head[0] is weight else one.head for one in taught]
        found = []
        with whole_weights(weight, bias, *itertools.chain(*own_heads)) as (weight, bias, *own_heads):
            for i, (divergence, one) in enumerate(zip(asked, taught, strict=True)):
                # With the first goes the cross-entropy, of all labels; the others are of their own tokens alone.
                tokens, replayed = one.tokens, i > 0 and divergence.teacher is None
                positions = tokens.student if i == 0 else tokens.student[: tokens.number]
                targets = _select(kwargs["input_ids"] if replayed else labels, positions + 1).to(weight.device)
                hidden = _select(states, positions).to(weight.device)
                fused = _fused_loss(
                    hidden,
                    hidden[:0].detach() if one.hidden is None else one.hidden.to(weight.device),
                    weight,
                    targets if i == 0 or replayed else torch.full_like(targets, IGNORE_INDEX),
                    tokens.weight,
                    bias=bias,
                    teacher_weight=own_heads[2 * i],
                    teacher_bias=own_heads[2 * i + 1],
                    transform=transform,
                    dft=dft and i == 0,
                    eaft=eaft and i == 0,
                    **divergence.options,
                )
                loss, value = fused.loss, fused.kl_loss
                if replayed:
                    loss, value = tokens.weight * loss, fused.ce_loss
                found.append((fused, targets, loss, torch.stack([value, torch.full_like(value, tokens.number)])))
        first, targets, *_ = found[0]
        return RegularizedOutput(
            log_probs=-sum(loss for _, _, loss, _ in found),
            entropy=first.entropy,
            is_top1=first.top1_hits,
            label_mask=(targets != IGNORE_INDEX).sum(),
            aux_loss=aux_loss,
            ce_loss=first.ce_loss,
            divergences=torch.stack([sums for *_, sums in found])[len(own) :],
        )

    model.forward = types.MethodType(forward, model)


@dataclass
class _Taught:
    """What a teacher's pass gave: its hidden states, `None` without a sequence, and weight and bias of its head."""

    tokens: _Tokens
    hidden: torch.Tensor | None = None
    head: tuple[Any, Any] = (None, None)


def _teach(model: Any, divergences: list[Divergence], args: tuple, inputs: dict) -> list[_Taught]:
    taught = [_Taught(_choose_tokens(divergence, inputs), divergence.hidden) for divergence in divergences]
    for numbers in _passes(divergences):
        first, group = divergences[numbers[0]], [taught[i] for i in numbers]
        seen = [one.tokens.seen for one in group if one.tokens.seen is not None]
        places = None  # where each token is in what the teacher sees
        taught_inputs = inputs
        if seen:
            chosen = _numbers((n for i in numbers for n in _sequences(divergences[i])), seen[0][0].device)
            tokens = functools.reduce(torch.logical_or, [mask for mask, _ in seen])
            taught_inputs = _of_sequences(chosen, tokens, sum(number for _, number in seen), inputs)
            places = tokens.flatten().cumsum(0) - 1
        assert first.teacher is not None
        with first.teacher.activate(), torch.no_grad():
            length = max((divergences[i].length or math.inf for i in numbers), default=math.inf) if seen else math.inf
            hidden = _hidden_states(model, args, _teacher_inputs(taught_inputs), length)
            head = model.get_output_embeddings()
            own_head = head.weight, getattr(head, "bias", None)
            if (
                head.weight.requires_grad
            ):  # the student's, with other values for as long as the teacher is on: a copy stays
                weight, bias = (None if tensor is None else tensor.detach().clone() for tensor in own_head)
                own_head = weight, bias
        for one in group:
            positions = one.tokens.student[: one.tokens.number]
            one.hidden = _select(hidden, positions if places is None else places.index_select(0, positions))
            one.head = own_head
    return taught


def _passes(divergences: list[Divergence]) -> list[list[int]]:
    """Which terms share a teacher's pass; those without one, whose teacher sees nothing, or is known from before, have none."""
    passes: list[list[int]] = []
    for i, one in enumerate(divergences):
        if one.teacher is None or one.hidden is not None or (one.sequences is not None and not len(one.sequences)):
            continue
        for group in passes:
            others = [divergences[j] for j in group]
            if _is_same(one.teacher, others[0].teacher) and _are_apart(one, others):
                group.append(i)
                break
        else:
            passes.append([i])
    return passes


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (getattr(one, "is_base", False) and getattr(other, "is_base", False))


def _are_apart(one: Divergence, others: list[Divergence]) -> bool:
    """Whether no sequence of the one is among those of the others."""
    if one.sequences is None or any(other.sequences is None for other in others):
        return False
    return set(_sequences(one)).isdisjoint(n for other in others for n in _sequences(other))


def _sequences(divergence: Divergence) -> list[int]:
    return [] if divergence.sequences is None else [int(number) for number in divergence.sequences]


def _teacher_inputs(inputs: dict) -> dict:
    """Without labels, and without the router's logits, of which the teacher has no use."""
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return inputs | {"output_router_logits": False} if "output_router_logits" in inputs else inputs


def _hidden_states(model: Any, args: tuple, inputs: dict, length: float) -> torch.Tensor:
    """`(batch, seq_len, hidden_size)`; 0 behind the first so many tokens of each row, which are not computed."""
    width = inputs["input_ids"].shape[1]
    if length >= width:
        return model.base_model(*args, **_without_mask(inputs)).last_hidden_state
    hidden = model.base_model(*args, **_cut(inputs, slice(None), int(length))).last_hidden_state
    return torch.nn.functional.pad(hidden, (0, 0, 0, width - int(length)))


def _without_mask(inputs: dict) -> dict:
    """
    Where texts are `joined` in a row, positions alone tell which tokens see each other: the model makes its masks of them if it has
    no other one. What fills a row is behind its tokens, none of which sees it.
    """
    dropped = ("joined", "attention_mask") if inputs.get("joined") else ()
    return {key: value for key, value in inputs.items() if key not in dropped}


def _cut(inputs: dict, rows: slice, length: int) -> dict:
    """Some rows of padded `inputs`, and of these so many tokens."""
    shape = inputs["input_ids"].shape
    return {
        key: value[rows, :length] if isinstance(value, torch.Tensor) and value.shape[:2] == shape else value
        for key, value in inputs.items()
    }


def _student_pass(model: Any, args: tuple, inputs: dict, parts: Parts | None) -> tuple[torch.Tensor, Any]:
    """Hidden states, `(batch, seq_len, hidden_size)`, and the load-balancing loss of the student's own rows."""
    config, ids = model.config.get_text_config(), inputs["input_ids"]
    if parts is None or not parts.are_better_apart(ids):
        outputs = model.base_model(*args, **_without_mask(inputs))
        number = None if parts is None else parts.own
        return outputs.last_hidden_state, _load_balancing_loss(config, outputs, inputs, number)
    assert parts.lengths is not None
    own_length, length = parts.lengths
    own_inputs = _cut(inputs, slice(parts.own), own_length)
    outputs = model.base_model(*args, **own_inputs)
    own = torch.nn.functional.pad(outputs.last_hidden_state, (0, 0, 0, ids.shape[1] - own_length))
    rest = _cut(_teacher_inputs(inputs), slice(parts.own, None), ids.shape[1])
    states = torch.cat([own, _hidden_states(model, args, rest, length)])
    return states, _load_balancing_loss(config, outputs, own_inputs, None)


def _load_balancing_loss(config: Any, outputs: Any, inputs: dict, num_own: int | None) -> Any:
    """As TRL has it: of the tokens of the first `num_own` sequences, or of all."""
    if not inputs.get("output_router_logits"):
        return None
    mask = inputs.get("attention_mask")
    if num_own is not None:
        own = (sequence_numbers(**inputs) < num_own).long()
        mask = own if mask is None else mask * own
    # Every mixture-of-experts family in transformers uses Mixtral's.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, mask)


# The largest logit with which a head is tried: far above every soft-cap.
_LARGE_LOGIT = 1000.0


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """
    Raises `ValueError` if this model's logits are not `transform(hidden @ weight.T + bias)`, with the hidden states that
    its backbone returns.

    Two passes over four tokens, the backbone's alone and the whole model's. A head with an extra layer, or a logit scale
    or soft-cap under an unknown name, would otherwise be trained with a wrong loss, silently.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not head.weight.is_floating_point():
        raise ValueError(
            f"The LM head of {name} is {'missing' if head is None else f'quantized to {head.weight.dtype}'}; the loss "
            "multiplies by its weight. Keep it in floating point (`llm_int8_skip_modules=['lm_head']`)."
        )
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(4, device=embeddings.weight.device)[None]
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    with _same_random_numbers(), _attention_for(ids.device, model):
        hidden = getattr(model.base_model(**inputs), "last_hidden_state", None)
    if hidden is None:
        backbones = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
        remedy = (
            f"Load the model first and set `model.base_model_prefix = {backbones[0]!r}`." if backbones else _NOT_BY_TRL
        )
        raise ValueError(
            f"`base_model` of {name} returns no hidden states: its `base_model_prefix` is {model.base_model_prefix!r}, and no "
            f"part of it has that name. {remedy}"
        )
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise ValueError(
            f"The backbone of {name} returns {hidden.shape[-1]} numbers per token, its LM head takes {head.weight.shape[-1]}: "
            f"there is an extra layer in between. {_NOT_BY_TRL}"
        )
    # The later half of the tokens is made large: a soft-cap changes small logits too little to be seen.
    factors = torch.ones(ids.shape[1], 1, device=head.weight.device)

    def enlarge(_module, _args, output):
        factors[2:] = _LARGE_LOGIT / output[..., 2:, :].float().abs().max().clamp(min=1e-6)
        return output * factors.to(output)

    handle = head.register_forward_hook(enlarge)
    try:
        with _same_random_numbers(), _attention_for(ids.device, model):
            logits = model(**inputs).logits.float()
    finally:
        handle.remove()
    ours = torch.nn.functional.linear(hidden.to(head.weight), head.weight, getattr(head, "bias", None)).float()
    ours = logit_transform(model.config.get_text_config()).apply_(ours * factors).to(logits.device)
    halves = zip((ours - logits).split(2, 1), logits.split(2, 1), strict=True)
    error = max((gap.abs().max() / theirs.abs().max().clamp(min=1e-6)).item() for gap, theirs in halves)
    if not error < 0.05:
        raise ValueError(
            f"The logits of {name} are not its hidden states times its LM head (relative error {error:.2g}): a logit "
            f"scale or soft-cap under an unknown name, or an extra layer. {_NOT_BY_TRL}"
        )


_NOT_BY_TRL = (
    "`SFTTrainer`, and so `teacher='none'`, multiplies these by the head as well: its loss would be wrong, or fail. Train "
    "this model with `transformers.Trainer`, whose loss is the model's own, or another model; and please report it."
)


def _same_random_numbers():
    """Two passes under this draw the same dropout, and those after them as if there had been none."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


@contextlib.contextmanager
def _attention_for(device: torch.device, model: PreTrainedModel):
    """FSDP and DeepSpeed bring a model to its GPU later than it is checked; FlashAttention computes there alone."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            if device.type == "cpu" and "flash" in str(config._attn_implementation):
                before = config._attn_implementation_internal
                stack.callback(setattr, config, "_attn_implementation_internal", before)
                config._attn_implementation_internal = "eager"  # this one's alone, not its parts'
        yield
