"""Cross-entropy plus divergence to a teacher, straight from hidden states.

Nothing of size tokens × vocabulary is ever held: tokens go through the LM head in chunks, and each chunk's gradient is
formed in the forward pass, while its probabilities are still there. This module knows torch and NumPy alone; what it does between
the matrix products a GPU with Triton does in `kernels`.

Shapes: N tokens, H hidden size, V vocabulary.
"""

import functools
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch


logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
_HALF = (torch.float16, torch.bfloat16)
KL_DIRECTIONS = ("forward", "reverse", "jsd")
# The likeliest tokens whose entropy is EAFT's weight: K of its eq. 3.
_EAFT_TOKENS = 20

# A chunk of tokens goes through the head together, and must be large for the matrix products: a float32 logit buffer of this size,
# on a CPU of so many tokens at the most.
_CPU_CHUNK_SIZE = 512
_CPU_CHUNK_MIB = 150
_CHUNK_MIB = 256
# The rows of a chunk that go through the softmax together: on a CPU, those that stay in the cache of each core; elsewhere so
# many that what is computed beside the logits stays small.
_BLOCK_MIB_OF_CORE = 1
_BLOCK_MIB = 32
# Vocabulary rows that are upcast at a time where the device cannot multiply half precision into float32; and those of a trained
# head whose gradient is formed at a time.
_UPCAST_ROWS = 8192
# For the kernel: two buffers of logits, each of this size and of so many rows at the most.
_KERNEL_MIB = 256
_KERNEL_ROWS = 2048
# Few tokens go through in this many chunks, each of so many rows at least: their buffers would show beside the little else there is.
_KERNEL_CHUNKS = 8
_KERNEL_FEWEST_ROWS = 128
# Rows of these begin where the matrix products are fastest.
_KERNEL_ALIGNMENT = 64
# In float16 the smallest parts of a gradient that is not multiplied by this would be rounded to nothing. It leaves room for logit
# gradients of 255 times their weights.
_FLOAT16_FACTOR = 256.0


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
        loss (`torch.Tensor`): Σ (w·CE + λ·D), in nats; w is 1, or the weight of DFT or EAFT.
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
    eaft: bool = False,
    chunk_size: int | None = None,
) -> FusedLossOutput:
    r"""
    Σ over tokens of `w·CE(y; p_s) + λ·D(p_t, p_s)`, with the gradient formed in the forward pass.

    With z the student's logits, p_s = softmax(z), p_s^T = softmax(z / T), and the same for the teacher:

        forward   D = KL(p_t^T ‖ p_s^T)                         dD/dz = (p_s^T − p_t^T) / T
        reverse   D = KL(p_s^T ‖ p_t^T)                         dD/dz = p_s^T · (log p_s^T − log p_t^T − D) / T
        jsd       m = (1 − β)·p_s^T + β·p_t^T
                  D = β·KL(p_t^T ‖ m) + (1 − β)·KL(p_s^T ‖ m)   dD/dz = (1 − β)·p_s^T · (log p_s^T − log m − KL(p_s^T ‖ m)) / T
        CE        d(w·CE)/dz = w·(p_s − onehot(y)),  w = 1, or held constant p_s[y] with `dft`,
                  with `eaft` H(p_K) / ln K, p_K the softmax of the K = 20 largest of z alone

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
        eaft (`bool`): Weight each CE by the entropy of the student's prediction, in [0, 1]. Excludes `dft`.
        chunk_size (`int`, *optional*): Tokens per chunk, chosen from the device and V by default. The result does not
            depend on it.

    On a GPU products run in the precision of `weight`; a float32 weight under autocast is cast, once, to the precision of autocast.
    With Triton, and one head for both, half precision keeps the student's logits and their difference from the teacher's, formed
    from the difference of the hidden states: the divergence of nearly equal models does not suffer where the logits are rounded.
    Everything else (a teacher's own head, no Triton, a CPU) keeps float32 logits.

    Returns:
        [`FusedLossOutput`]: sums in nats. `loss` backpropagates to `student_hidden`, and to `weight` and `bias` if
        they require it.

    Sources: generalized JSD: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, eq. 1 (β on the teacher here);
    DFT: Wu et al. 2025, https://arxiv.org/abs/2508.05629, eq. 9; ASFT: Zhu et al. 2025, https://arxiv.org/abs/2509.23753
    (whose text has the reverse and whose code has the forward KL: both are available); EAFT: Diao et al. 2026,
    https://arxiv.org/abs/2601.02151, eq. 2 and 3 (which rounds ln 20 to 3).
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"`direction` must be one of {KL_DIRECTIONS}, got {direction!r}.")
    if dft and eaft:
        raise ValueError("`dft` and `eaft` both weight the cross-entropy of each token. Give one of them.")
    precision = _precision(weight)
    head = _Head(weight.detach().to(precision), bias, transform or LogitTransform())
    teacher_head = head
    if teacher_weight is not None:
        teacher_head = _Head(teacher_weight.detach().to(precision), teacher_bias, head.transform)
    kernels = _kernels(student_hidden.device.type) if precision != torch.float64 != student_hidden.dtype else None
    if chunk_size is None:
        logits = precision if teacher_head is head else torch.float32
        chunk_size = default_chunk_size(
            student_hidden.device.type, weight.shape[0], logits if kernels else None, len(labels)
        )
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
            "dft" if dft else "eaft" if eaft else None,
            chunk_size,
            kernels,
        )
    )


def _precision(weight: torch.Tensor) -> torch.dtype:
    """Of the products with the head: that of autocast for a float32 head, as everywhere else in the model."""
    device = weight.device.type
    # A CPU upcasts half precision in any case.
    if device != "cpu" and weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


@functools.cache
def _kernels(device_type: str):
    """The module of the Triton kernel; `None` where it does not run."""
    if device_type != "cuda":
        return None
    try:
        from . import kernels
    except ImportError:
        logger.warning("Triton is not installed: the loss takes four times as long. `pip install triton` mends that.")
        return None
    return kernels


def default_chunk_size(
    device_type: str, vocabulary: int, kernel_dtype: torch.dtype | None = None, tokens: int | None = None
) -> int:
    """Of `tokens`, those that go through the LM head together; with the kernel those that fill buffers of `kernel_dtype`."""
    if kernel_dtype is not None:
        rows = min(_KERNEL_ROWS, _KERNEL_MIB * 2**20 // (kernel_dtype.itemsize * vocabulary))
        if tokens is not None:
            rows = min(rows, max(_KERNEL_FEWEST_ROWS, tokens // _KERNEL_CHUNKS))
        return 2 ** max(0, rows.bit_length() - 1)  # a power of two fills the tiles of a product
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
    """`out = hidden @ weight.T`, `(n, H)` and `(V, H)` to `(n, V)`, accumulated in float32 at least, rounded to `out.dtype`."""
    if weight.dtype == out.dtype:
        torch.mm(hidden.to(out.dtype), weight.t(), out=out)
    elif out.device.type == "cuda" and weight.dtype in _HALF:
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for rows in range(0, weight.shape[0], _UPCAST_ROWS):
            part = weight[rows : rows + _UPCAST_ROWS].to(out.dtype)
            out[:, rows : rows + _UPCAST_ROWS] = hidden @ part.t()


def _matmul_grad(grad: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grad @ weight`, `(n, V)` and `(V, H)` to `(n, H)`, in `dtype`."""
    if weight.dtype == dtype:
        return grad.to(dtype) @ weight
    if grad.device.type == "cuda" and weight.dtype in _HALF:
        return torch.mm(grad.to(weight.dtype), weight, out_dtype=dtype)
    result = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=dtype)
    for rows in range(0, weight.shape[0], _UPCAST_ROWS):
        part = slice(rows, rows + _UPCAST_ROWS)
        result.addmm_(grad[:, part].to(dtype), weight[part].to(dtype))
    return result


def _add_weight_grad(result: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, precision: torch.dtype) -> None:
    """`result += grad.T @ hidden`, `(n, V)` and `(n, H)` to `(V, H)`; on a GPU half precision is multiplied as it is."""
    if grad.device.type == "cuda" and precision in _HALF:
        grad, hidden = grad.to(precision), hidden.to(precision)
        for rows in range(0, len(result), _UPCAST_ROWS):
            part = slice(rows, rows + _UPCAST_ROWS)
            result[part] += torch.mm(grad[:, part].t(), hidden, out_dtype=result.dtype)
    else:
        result.addmm_(grad.to(result.dtype).t(), hidden.to(result.dtype))


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
    def forward(ctx, student_hidden, weight, bias, teacher_hidden, labels, kl_weight, head, teacher_head, divergence, weighting, chunk_size, kernels):  # fmt: skip
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_grad = need_hidden or need_weight or need_bias
        # In float32 also beside half precision: an upstream factor such as a loss scale comes before they are rounded.
        grad_hidden = torch.zeros_like(student_hidden, dtype=dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        sums = torch.zeros(5, dtype=dtype, device=student_hidden.device)
        # A scale of the logits multiplies the gradient as well; a power of two changes no digit.
        factor = 1.0
        if head.weight.dtype == torch.float16 and sums.device.type != "cpu":
            weights = max(1.0, abs(head.transform.scale)) * (1.0 + abs(kl_weight) / divergence.temperature)
            factor = 2.0 ** math.floor(math.log2(_FLOAT16_FACTOR / weights))
        engine = _by_torch if kernels is None else functools.partial(_by_kernel, kernels)
        chunk = engine(
            min(chunk_size, max(1, len(labels))),
            dtype,
            head,
            teacher_head,
            divergence,
            weighting,
            kl_weight,
            factor,
            need_grad,
        )

        # The loss chooses its own precision; autocast would round the logits to half precision.
        with _no_autocast(sums.device.type):
            taught = len(teacher_hidden)
            for tokens in [*_slices(0, taught, chunk_size), *_slices(taught, len(labels), chunk_size)]:
                teacher = teacher_hidden[tokens] if tokens.start < taught else None
                chunk_sums, grad = chunk(student_hidden[tokens], teacher, labels[tokens])
                sums += chunk_sums
                if grad_hidden is not None:
                    grad_hidden[tokens] = _matmul_grad(grad, head.weight, dtype)
                if grad_weight is not None:
                    _add_weight_grad(grad_weight, grad, student_hidden[tokens], head.weight.dtype)
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=dtype)
        if factor != 1.0:
            for grad in filter(torch.is_tensor, (grad_hidden, grad_weight, grad_bias)):
                grad.div_(factor)

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
        return (*grads, *[None] * 9)


def _by_torch(rows, dtype, head, teacher_head, divergence, weighting, kl_weight, factor, need_grad):
    """
    What computes, with the options given, the five sums of at most `rows` tokens and `factor` times the gradient of their loss with
    respect to the projection, `(n, V)`. Called with the hidden states of student and teacher and the labels; the gradient is valid
    until the next call. This one keeps float32 logits of both.
    """
    vocabulary, device = len(head.weight), head.weight.device
    buffers = [_empty(rows, vocabulary, dtype, device) for _ in range(2)]
    block_size = _rows_of(_BLOCK_MIB, vocabulary)
    if device.type == "cpu":
        block_size = torch.get_num_threads() * _rows_of(_BLOCK_MIB_OF_CORE, vocabulary)

    def chunk(student_hidden, teacher_hidden, labels):
        n, teacher_logits = len(labels), None
        logits = head.project(student_hidden, buffers[0][:n])
        if teacher_hidden is not None:
            teacher_logits = teacher_head.project(teacher_hidden, buffers[1][:n])
        sums = torch.zeros(5, dtype=dtype, device=device)
        for block in _slices(0, n, block_size):
            sums += _loss_of_block(
                logits[block], None if teacher_logits is None else teacher_logits[block], labels[block],
                kl_weight, head.transform, divergence, weighting, need_grad,
            )  # fmt: skip
        return sums, logits if factor == 1.0 else logits.mul_(factor)

    return chunk


def _by_kernel(kernels, rows, dtype, head, teacher_head, divergence, weighting, kl_weight, factor, need_grad):
    """
    As [`_by_torch`], with the Triton kernel. Half-precision logits would put a noise floor under the divergence of two nearly equal
    models: with one head for both the *gap* (h_t − h_s)·Wᵀ is kept beside the student's, with two both in float32.
    """
    gap, transform = teacher_head is head, head.transform
    vocabulary, device = len(head.weight), head.weight.device
    stored = head.weight.dtype if gap else dtype
    columns = -(-vocabulary // _KERNEL_ALIGNMENT) * _KERNEL_ALIGNMENT
    buffers = [torch.empty(rows, columns, dtype=stored, device=device)[:, :vocabulary] for _ in range(2)]

    def chunk(student_hidden, teacher_hidden, labels):
        n, other = len(labels), None
        logits = buffers[0][:n]
        _matmul(student_hidden, head.weight, logits)
        if teacher_hidden is not None:
            other = buffers[1][:n]
            if gap:
                teacher_hidden = teacher_hidden.to(dtype) - student_hidden.to(dtype)
            _matmul(teacher_hidden, teacher_head.weight, other)
        sums = torch.empty(n, 5, dtype=dtype, device=device)
        weights = _entropy_weight(_likeliest(logits, head, dtype)) if weighting == "eaft" else None
        kernels.loss_and_gradient_(
            logits, other, labels, sums, gap=gap, bias=head.bias, teacher_bias=teacher_head.bias, kl_weight=kl_weight,
            direction=divergence.direction, mixture=divergence.mixture, temperature=divergence.temperature,
            scale=transform.scale, softcap=transform.softcap, dft=weighting == "dft", ce_weights=weights, factor=factor,
            need_grad=need_grad,
        )  # fmt: skip
        return sums.sum(0), logits

    return chunk


def _likeliest(projection: torch.Tensor, head: _Head, dtype: torch.dtype) -> torch.Tensor:
    """The largest logits of each row of a projection without bias and transform, which keeps their order, `(n, K)`."""
    biased = projection if head.bias is None else projection + head.bias
    return head.transform.apply_(biased.topk(min(_EAFT_TOKENS, biased.shape[1])).values.to(dtype))


def _entropy_weight(logits: torch.Tensor) -> torch.Tensor:
    """EAFT's weight, H(softmax(logits)) / ln K, `(n, K)` to `(n,)`; 0 where there is but one token."""
    log_p = logits.log_softmax(-1)
    return -torch.linalg.vecdot(log_p.exp(), log_p) / math.log(max(2, logits.shape[1]))


def _empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    # NumPy asks for huge pages: a fresh buffer of small ones takes longer than what is computed in it.
    return torch.from_numpy(np.empty((rows, columns), str(dtype).removeprefix("torch.")))


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _no_autocast(device_type: str):
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _loss_of_block(logits, teacher_logits, labels, kl_weight, transform, divergence, weighting, need_grad):
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

    ce_weight = labelled.to(logits.dtype)
    if weighting == "dft":
        ce_weight = labelled * log_p_label.exp()
    elif weighting == "eaft":
        ce_weight = labelled * _entropy_weight(logits.topk(min(_EAFT_TOKENS, logits.shape[1])).values)
    loss = (ce_weight * ce + kl_weight * kl).sum()
    if need_grad:
        grad = student.probs.mul_(ce_weight.unsqueeze(1))
        if grad_kl is not None:
            grad.add_(grad_kl, alpha=kl_weight / temperature)
        grad.scatter_add_(1, target, -ce_weight.unsqueeze(1))
        logits.copy_(transform.backward_(grad, logits))
    return torch.stack([loss, ce.sum(), kl.sum(), entropy.sum(), top1_hits.sum().to(loss.dtype)])
