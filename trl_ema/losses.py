"""Cross-entropy plus divergence to a teacher, straight from hidden states.

Nothing of size tokens × vocabulary is ever held: tokens go through the LM head in chunks, and each chunk's gradient is
formed in the forward pass, while its probabilities are still there. This module knows torch and NumPy alone.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch


IGNORE_INDEX = -100
KL_DIRECTIONS = ("forward", "reverse", "jsd")

# A chunk of tokens goes through the head together, and must be large for the matrix products: a float32 logit buffer of this size,
# on a CPU of so many tokens at the most.
_CPU_CHUNK_SIZE = 512
_CPU_CHUNK_MIB = 150
_CHUNK_MIB = 256
# The rows of a chunk that go through the softmax together: on a CPU, those that stay in the cache of each core; elsewhere so
# many that what is computed beside the logits stays small.
_BLOCK_MIB_OF_CORE = 1
_BLOCK_MIB = 32
# Vocabulary rows that are upcast at a time where the device cannot multiply half precision into float32.
_UPCAST_ROWS = 8192


@dataclass(frozen=True)
class LogitTransform:
    """
    What a model's head does to `hidden @ weight.T + bias` before the softmax: `softcap * tanh(scale * x / softcap)`.

    Args:
        scale (`float`): Factor on the projection (Cohere, Falcon-H1; Granite divides, so pass the reciprocal).
        softcap (`float`, *optional*): Bound of the logits (Gemma 2), none by default.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Transform `logits` in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Multiply `grad` in place by d(transformed)/d(projection), given the transformed `logits`."""
        if self.softcap is not None:
            grad.addcmul_(grad, (logits / self.softcap).square_(), value=-1.0)
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


@dataclass
class FusedLossOutput:
    """
    Sums over the tokens of one call; only `loss` carries a gradient.

    Args:
        loss (`torch.Tensor`): Σ (w·CE + λ·D), in nats; w is 1, or the probability of the label with DFT.
        ce_loss (`torch.Tensor`): Σ CE over the labelled tokens, in nats.
        kl_loss (`torch.Tensor`): Σ D over all N tokens, in nats.
        entropy (`torch.Tensor`): Σ entropy of the student over the labelled tokens, in nats.
        top1_hits (`torch.Tensor`): Number of labelled tokens that are the student's most likely token.
    """

    loss: torch.Tensor
    ce_loss: torch.Tensor
    kl_loss: torch.Tensor
    entropy: torch.Tensor
    top1_hits: torch.Tensor


def fused_linear_cross_entropy_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    kl_weight: float,
    *,
    bias: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    transform: LogitTransform | None = None,
    direction: str = "forward",
    mixture: float = 0.5,
    temperature: float = 1.0,
    dft: bool = False,
    chunk_size: int | None = None,
) -> FusedLossOutput:
    r"""
    Σ over tokens of `w·CE(y; p_s) + λ·D(p_t, p_s)`, with the gradient formed in the forward pass.

    With z the student's logits, p_s = softmax(z), p_s^T = softmax(z / T), and the same for the teacher:

        forward   D = KL(p_t^T ‖ p_s^T)                         dD/dz = (p_s^T − p_t^T) / T
        reverse   D = KL(p_s^T ‖ p_t^T)                         dD/dz = p_s^T · (log p_s^T − log p_t^T − D) / T
        jsd       m = (1 − β)·p_s^T + β·p_t^T
                  D = β·KL(p_t^T ‖ m) + (1 − β)·KL(p_s^T ‖ m)   dD/dz = (1 − β)·p_s^T · (log p_s^T − log m − KL(p_s^T ‖ m)) / T
        CE        d(w·CE)/dz = w·(p_s − onehot(y)),  w = 1, or p_s[y] held constant with `dft`

    The plain code it replaces (forward KL, T = 1):

        z_s, z_t = student_hidden @ weight.T, teacher_hidden @ weight.T
        ce = F.cross_entropy(z_s, labels, reduction="sum")
        kl = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="sum")
        loss = ce + kl_weight * kl

    Args:
        student_hidden (`torch.Tensor` of shape `(N, H)`): Last hidden states of the student.
        teacher_hidden (`torch.Tensor` of shape `(M, H)`): Those of the teacher for the first M ≤ N tokens; gets no
            gradient. The others have their cross-entropy alone.
        weight (`torch.Tensor` of shape `(V, H)`): Weight of the LM head; gets a gradient only if it requires one.
        labels (`torch.Tensor` of shape `(N,)`): Next tokens. Tokens labelled -100 count in the divergence alone.
        kl_weight (`float`): λ.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Bias of the LM head.
        teacher_weight, teacher_bias (`torch.Tensor`, *optional*): The teacher's own head; the student's by default.
        transform ([`LogitTransform`], *optional*): Scale and soft-cap of the head.
        direction (`str`): `"forward"`, `"reverse"` or `"jsd"`.
        mixture (`float`): β of the generalized JSD, in (0, 1).
        temperature (`float`): T of the divergence. There is no T² factor: D is a divergence in nats.
        dft (`bool`): Weight each CE by the probability of its label. With a frozen teacher this is ASFT.
        chunk_size (`int`, *optional*): Tokens per chunk, chosen from the device and V by default. The result does not
            depend on it.

    Returns:
        [`FusedLossOutput`]: sums in nats. `loss` backpropagates to `student_hidden`, and to `weight` and `bias` if
        they require it.

    Sources: generalized JSD: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, eq. 1 (β on the teacher here);
    DFT: Wu et al. 2025, https://arxiv.org/abs/2508.05629, eq. 9; ASFT: Zhu et al. 2025, https://arxiv.org/abs/2509.23753
    (whose text has the reverse and whose code has the forward KL: both are available).
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"`direction` must be one of {KL_DIRECTIONS}, got {direction!r}.")
    if chunk_size is None:
        chunk_size = default_chunk_size(student_hidden.device.type, weight.shape[0])
    head = _Head(weight, bias, transform or LogitTransform())
    teacher_head = head
    if teacher_weight is not None:
        teacher_head = _Head(teacher_weight.detach(), teacher_bias, head.transform)
    divergence = _Divergence(direction, mixture, temperature)
    return FusedLossOutput(
        *_FusedLinearCrossEntropyKL.apply(
            student_hidden,
            weight,
            bias,
            teacher_hidden,
            labels,
            float(kl_weight),
            head,
            teacher_head,
            divergence,
            dft,
            chunk_size,
        )
    )


def default_chunk_size(device_type: str, vocabulary: int) -> int:
    """Tokens that go through the LM head together."""
    if device_type == "cpu":
        return min(_CPU_CHUNK_SIZE, _rows_of(_CPU_CHUNK_MIB, vocabulary))
    return _rows_of(_CHUNK_MIB, vocabulary)


def _rows_of(mib: int, vocabulary: int) -> int:
    """Rows of float32 logits in so much memory, at least one."""
    return max(1, mib * 2**20 // (4 * vocabulary))


@dataclass(frozen=True)
class _Head:
    """LM head and the precision its products run in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform

    def project(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out = transform(hidden @ weight.T + bias)` in float32 (float64 for float64 inputs)."""
        _matmul(hidden, self.weight, out)
        if self.bias is not None:
            out.add_(self.bias)
        return self.transform.apply_(out)


def _matmul(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`out = hidden @ weight.T`, `(n, H)` and `(V, H)` to `(n, V)`, accumulated and returned in `out.dtype`.

    Half-precision logits would put a noise floor under the divergence of two nearly equal models, so the product is
    never rounded to the inputs' dtype.
    """
    if weight.dtype == out.dtype:
        torch.mm(hidden.to(out.dtype), weight.t(), out=out)
    elif out.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for rows in range(0, weight.shape[0], _UPCAST_ROWS):
            part = weight[rows : rows + _UPCAST_ROWS].to(out.dtype)
            out[:, rows : rows + _UPCAST_ROWS] = hidden @ part.t()


def _matmul_grad(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grad @ weight`, `(n, V)` and `(V, H)` to `(n, H)`, in `grad.dtype`."""
    if weight.dtype == grad.dtype:
        return grad @ weight
    if grad.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(grad.to(weight.dtype), weight, out_dtype=grad.dtype)
    result = grad.new_zeros(grad.shape[0], weight.shape[1])
    for rows in range(0, weight.shape[0], _UPCAST_ROWS):
        result.addmm_(grad[:, rows : rows + _UPCAST_ROWS], weight[rows : rows + _UPCAST_ROWS].to(grad.dtype))
    return result


@dataclass
class _Softmax:
    """
    Of the rows of `logits`, `(n, V)`: probabilities, and the largest logit and its log-probability, `(n,)`. With these two
    log p = (z − highest) + log_top: differences of logits, which are exact where they matter, before anything is rounded.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    highest: torch.Tensor
    log_top: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> "_Softmax":
        probs = logits.softmax(-1)
        return cls(logits, probs, logits.amax(-1), probs.amax(-1).log())


@dataclass(frozen=True)
class _Divergence:
    """Value and logit gradient of the divergence of two softmaxes over `(n, V)`."""

    direction: str
    mixture: float
    temperature: float

    def __call__(self, student: _Softmax, teacher: _Softmax) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns D per token `(n,)` and T·dD/dz `(n, V)`. Overwrites the teacher's tensors."""
        # log p_s − log p_t = z_s − z_t + shift
        shift = (teacher.highest - student.highest) - (teacher.log_top - student.log_top)
        if self.direction == "forward":
            gap = teacher.logits.sub_(student.logits)
            value = torch.linalg.vecdot(teacher.probs, gap) - shift
            return value, torch.sub(student.probs, teacher.probs, out=gap)
        if self.direction == "reverse":
            gap = torch.sub(student.logits, teacher.logits, out=teacher.logits)
            value = torch.linalg.vecdot(student.probs, gap) + shift
            return value, gap.add_((shift - value).unsqueeze(1)).mul_(student.probs)
        beta = self.mixture
        # Where both probabilities underflow there is nothing to sum, but 0 · log 0 must not become NaN.
        mixed = torch.lerp(student.probs, teacher.probs, beta).clamp_(min=torch.finfo(shift.dtype).tiny).log_()
        gap = teacher.logits.sub_((teacher.highest - teacher.log_top).unsqueeze(1)).sub_(mixed)
        teacher_part = torch.linalg.vecdot(teacher.probs, gap)
        gap = torch.sub(student.logits, (student.highest - student.log_top).unsqueeze(1), out=gap).sub_(mixed)
        student_part = torch.linalg.vecdot(student.probs, gap)
        value = beta * teacher_part + (1 - beta) * student_part
        return value, gap.sub_(student_part.unsqueeze(1)).mul_(student.probs).mul_(1 - beta)


class _FusedLinearCrossEntropyKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, weight, bias, teacher_hidden, labels, kl_weight, head, teacher_head, divergence, dft, chunk_size):  # fmt: skip
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_grad = need_hidden or need_weight or need_bias
        # In float32 also beside half precision: an upstream factor such as a loss scale comes before they are rounded.
        grad_hidden = torch.zeros_like(student_hidden, dtype=dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        sums = torch.zeros(5, dtype=dtype, device=student_hidden.device)
        rows = min(chunk_size, max(1, len(labels)))
        block_size = _rows_of(_BLOCK_MIB, weight.shape[0])
        if sums.device.type == "cpu":
            block_size = torch.get_num_threads() * _rows_of(_BLOCK_MIB_OF_CORE, weight.shape[0])
        buffers = [_empty(rows, weight.shape[0], dtype, sums.device) for _ in range(2)]

        # The kernel chooses its own precision; autocast would round the logits to half precision.
        with _no_autocast(sums.device.type):
            taught = len(teacher_hidden)
            for tokens in [*_slices(0, taught, chunk_size), *_slices(taught, len(labels), chunk_size)]:
                n = tokens.stop - tokens.start
                logits = head.project(student_hidden[tokens], buffers[0][:n])
                teacher_logits = None
                if tokens.start < taught:
                    teacher_logits = teacher_head.project(teacher_hidden[tokens], buffers[1][:n])
                for block in _slices(0, n, block_size):
                    sums += _loss_of_block(
                        logits[block], None if teacher_logits is None else teacher_logits[block], labels[tokens][block],
                        kl_weight, head.transform, divergence, dft, need_grad,
                    )  # fmt: skip
                grad = logits
                if not need_grad:
                    continue
                if grad_hidden is not None:
                    grad_hidden[tokens] = _matmul_grad(grad, weight)
                if grad_weight is not None:
                    grad_weight.addmm_(grad.t(), student_hidden[tokens].to(dtype))
                if grad_bias is not None:
                    grad_bias += grad.sum(0)

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        outputs = sums.unbind()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        grads = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in (grad_hidden, grad_weight, grad_bias)
        )
        return (*grads, *[None] * 8)


def _empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    # NumPy asks for huge pages: a fresh buffer of small ones takes longer than what is computed in it.
    return torch.from_numpy(np.empty((rows, columns), str(dtype).removeprefix("torch.")))


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _no_autocast(device_type: str):
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _loss_of_block(logits, teacher_logits, labels, kl_weight, transform, divergence, dft, need_grad):
    """
    The five sums over a block of tokens. Leaves the gradient of the loss with respect to the projection in `logits`, `(n, V)`:
    the cross-entropy's alone without `teacher_logits`, which are overwritten.
    """
    labelled = labels != IGNORE_INDEX
    target = labels.clamp(min=0).unsqueeze(1)
    temperature = divergence.temperature

    student = _Softmax.of(logits)
    label_logit = logits.gather(1, target).squeeze(1)
    log_p_label = (label_logit - student.highest) + student.log_top
    ce = -log_p_label * labelled
    entropy = (student.highest - torch.linalg.vecdot(student.probs, logits) - student.log_top) * labelled
    # Finding where the highest is takes ten times longer; of equal ones each would be a hit.
    top1_hits = (label_logit == student.highest) & labelled
    if teacher_logits is None:
        kl, grad_kl = torch.zeros_like(ce), None
    elif temperature == 1.0:
        kl, grad_kl = divergence(student, _Softmax.of(teacher_logits))
    else:
        kl, grad_kl = divergence(_Softmax.of(logits / temperature), _Softmax.of(teacher_logits.div_(temperature)))

    ce_weight = labelled * log_p_label.exp() if dft else labelled.to(logits.dtype)
    loss = (ce_weight * ce + kl_weight * kl).sum()
    if need_grad:
        grad = student.probs.mul_(ce_weight.unsqueeze(1))
        if grad_kl is not None:
            grad.add_(grad_kl, alpha=kl_weight / temperature)
        grad.scatter_add_(1, target, -ce_weight.unsqueeze(1))
        logits.copy_(transform.backward_(grad, logits))
    return torch.stack([loss, ce.sum(), kl.sum(), entropy.sum(), top1_hits.sum().to(loss.dtype)])
