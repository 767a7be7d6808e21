"""Loss and gradient of a chunk of logits as one Triton kernel: what the GPU does between the matrix products.

A row is read twice, once for its sums and once to write its gradient in place (JSD: three times); without the kernel PyTorch
goes through it 33 times. One program takes one row. The plain version beside it is `losses._loss_of_block`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# Words that one program reads at a time: a thread takes so many neighbours of each, in one transaction.
_WORDS_OF_THREAD = 8
_WARPS = 8
_BLOCK = 32 * _WARPS * _WORDS_OF_THREAD
# Blocks that are on their way at a time. Float32 logits would wait in shared memory, where four have no room on smaller cards.
_STAGES = 4
_STAGES_OF_FLOAT32 = 1
# What stands for a logit beyond the vocabulary: its probability is 0, and 0 times it is not NaN.
_NONE = tl.constexpr(-1e30)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _transformed(x, scale, softcap, SOFTCAP: tl.constexpr):
    x = x * scale
    if SOFTCAP:
        x = softcap * (
            1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0)
        )  # tanh; Triton has none that the interpreter knows
    return x


@triton.jit
def _logits(
    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, words, vocabulary, scale, softcap,
    SOFTCAP: tl.constexpr, TAUGHT: tl.constexpr, GAP: tl.constexpr, BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr,
):  # fmt: skip
    """Of the student and, if there is one, of the teacher."""
    inside = words < vocabulary
    x = tl.load(student_ptr + words, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + words, mask=inside, other=0.0).to(tl.float32)
    student = _transformed(x, scale, softcap, SOFTCAP)
    teacher = student
    if TAUGHT:
        y = tl.load(other_ptr + words, mask=inside, other=0.0).to(tl.float32)
        if GAP:
            y += x
        if TEACHER_BIAS:
            y += tl.load(teacher_bias_ptr + words, mask=inside, other=0.0).to(tl.float32)
        teacher = _transformed(y, scale, softcap, SOFTCAP)
    return tl.where(inside, student, _NONE), tl.where(inside, teacher, _NONE)


@triton.jit
def _add(highest, total, logits):
    """One more block to an online softmax: (highest, Σ exp(z − highest), what earlier sums shrink by, exp(z − highest))."""
    new = tl.maximum(highest, tl.max(logits, axis=1))
    shrunk = tl.exp(highest - new)
    exps = tl.exp(logits - new[:, None])
    return new, total * shrunk + tl.sum(exps, axis=1), shrunk, exps


@triton.jit
def _loss_and_gradient(
    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, labels_ptr, ce_weights_ptr, sums_ptr, stride, kl_weight, mixture, temperature, scale, softcap, factor, vocabulary: tl.constexpr,
    DIRECTION: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, DFT: tl.constexpr, WEIGHTED: tl.constexpr, TAUGHT: tl.constexpr,
    GAP: tl.constexpr, BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, NEED_GRAD: tl.constexpr,
    THREADS: tl.constexpr, WORDS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * stride
    other_ptr += row * stride
    label = tl.load(labels_ptr + row)
    BLOCK: tl.constexpr = THREADS * WORDS
    within = tl.arange(0, THREADS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]

    # Each thread has its own highest logit and sums relative to it, so that nothing waits within the loop.
    # s: student; d: student of the divergence, at its temperature; t: teacher
    s_top = tl.full((THREADS,), _NONE, tl.float32)
    d_top = s_top
    t_top = s_top
    label_logit = s_top
    s_sum = tl.zeros((THREADS,), tl.float32)
    d_sum = s_sum
    t_sum = s_sum
    s_mean = s_sum  # Σ exp(z − highest)·z
    gap_mean = s_sum  # Σ exp·(difference of logits), by the teacher (forward) or the student (reverse)
    for i in tl.range(0, BLOCKS, num_stages=STAGES):
        words = i * BLOCK + within
        z, t = _logits(
            student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, words, vocabulary, scale, softcap,
            SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
        )  # fmt: skip
        label_logit = tl.maximum(label_logit, tl.max(tl.where(words == label, z, _NONE), axis=1))
        s_top, s_sum, shrunk, exps = _add(s_top, s_sum, z)
        s_mean = s_mean * shrunk + tl.sum(exps * z, axis=1)
        if TAUGHT:
            if TEMPERED:
                z = z / temperature
                t = t / temperature
                d_top, d_sum, shrunk, exps = _add(d_top, d_sum, z)
            if DIRECTION == "reverse":
                gap_mean = gap_mean * shrunk + tl.sum(exps * (z - t), axis=1)
            t_top, t_sum, shrunk, exps = _add(t_top, t_sum, t)
            if DIRECTION == "forward":
                gap_mean = gap_mean * shrunk + tl.sum(exps * (t - z), axis=1)

    top = tl.max(s_top, axis=0)
    shrunk = tl.exp(s_top - top)
    total = tl.sum(s_sum * shrunk, axis=0)
    log_total = tl.log(total)
    z_label = tl.max(label_logit, axis=0)
    labelled = tl.where(label >= 0, 1.0, 0.0)
    ce = labelled * ((top - z_label) + log_total)
    entropy = labelled * ((top - tl.sum(s_mean * shrunk, axis=0) / total) + log_total)
    ce_weight = labelled
    if DFT:
        ce_weight = labelled * tl.exp(-ce)
    if WEIGHTED:
        ce_weight = labelled * tl.load(ce_weights_ptr + row)

    kl = 0.0
    if TAUGHT:
        if TEMPERED:
            d_highest = tl.max(d_top, axis=0)
            shrunk = tl.exp(d_top - d_highest)
            d_total = tl.sum(d_sum * shrunk, axis=0)
        else:
            d_highest = top
            d_total = total
        t_highest = tl.max(t_top, axis=0)
        t_shrunk = tl.exp(t_top - t_highest)
        t_total = tl.sum(t_sum * t_shrunk, axis=0)
        # log p_s − log p_t = z_s − z_t + shift
        shift = (t_highest - d_highest) + (tl.log(t_total) - tl.log(d_total))
        if DIRECTION == "forward":
            kl = tl.sum(gap_mean * t_shrunk, axis=0) / t_total - shift
        elif DIRECTION == "reverse":
            kl = tl.sum(gap_mean * shrunk, axis=0) / d_total + shift
        else:
            d_log_total = tl.log(d_total)
            t_log_total = tl.log(t_total)
            d_part = tl.zeros((THREADS,), tl.float32)
            t_part = d_part
            for i in tl.range(0, BLOCKS, num_stages=STAGES):
                z, t = _logits(
                    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, i * BLOCK + within, vocabulary, scale, softcap,
                    SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
                )  # fmt: skip
                if TEMPERED:
                    z = z / temperature
                    t = t / temperature
                log_p = z - d_highest - d_log_total
                log_p_teacher = t - t_highest - t_log_total
                p = tl.exp(log_p)
                p_teacher = tl.exp(log_p_teacher)
                # Where both probabilities underflow 0 · log 0 must not become NaN.
                log_mixed = tl.log(tl.maximum((1.0 - mixture) * p + mixture * p_teacher, _TINY))
                d_part += tl.sum(p * (log_p - log_mixed), axis=1)
                t_part += tl.sum(p_teacher * (log_p_teacher - log_mixed), axis=1)
            student_part = tl.sum(d_part, axis=0)
            kl = mixture * tl.sum(t_part, axis=0) + (1.0 - mixture) * student_part

    sums_ptr += row * 5
    tl.store(sums_ptr, ce_weight * ce + kl_weight * kl)
    tl.store(sums_ptr + 1, ce)
    tl.store(sums_ptr + 2, kl)
    tl.store(sums_ptr + 3, entropy)
    tl.store(sums_ptr + 4, tl.where(z_label == top, labelled, 0.0))

    if NEED_GRAD:
        for i in tl.range(0, BLOCKS, num_stages=STAGES):
            words = (BLOCKS - 1 - i) * BLOCK + within  # backwards: what was read last may still be in the cache
            z, t = _logits(
                student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, words, vocabulary, scale, softcap,
                SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
            )  # fmt: skip
            p = tl.exp(z - top) / total
            grad = ce_weight * p - tl.where(words == label, ce_weight, 0.0)
            if TAUGHT:
                d = z
                if TEMPERED:
                    d = z / temperature
                    t = t / temperature
                    p = tl.exp(d - d_highest) / d_total
                if DIRECTION == "forward":
                    kl_grad = p - tl.exp(t - t_highest) / t_total
                elif DIRECTION == "reverse":
                    kl_grad = p * ((d - t) + (shift - kl))
                else:
                    log_p = d - d_highest - d_log_total
                    p_teacher = tl.exp(t - t_highest - t_log_total)
                    log_mixed = tl.log(tl.maximum((1.0 - mixture) * p + mixture * p_teacher, _TINY))
                    kl_grad = (1.0 - mixture) * p * (log_p - log_mixed - student_part)
                grad += (kl_weight / temperature) * kl_grad
            if SOFTCAP:
                grad *= 1.0 - (z / softcap) * (z / softcap)
            grad *= scale * factor
            tl.store(student_ptr + words, grad.to(student_ptr.dtype.element_ty), mask=words < vocabulary)


def loss_and_gradient_(
    student: Tensor, other: Tensor | None, labels: Tensor, sums: Tensor, *, gap: bool, bias: Tensor | None,
    teacher_bias: Tensor | None, kl_weight: float, direction: int, mixture: float, temperature: float, scale: float,
    softcap: float | None, dft: bool, factor: float, need_grad: bool, ce_weights: Tensor | None = None,
    block: int | None = None,
) -> None:  # fmt: skip
    """
    Write the five sums of each row to `sums`, `(n, 5)` float32, and `factor` times the gradient of the loss with respect to the
    student's projection in its place.

    Args:
        student (`torch.Tensor` of shape `(n, V)`): The student's projection, without bias and transform.
        other (`torch.Tensor` of shape `(n, V)`, *optional*): The teacher's minus the student's (`gap`) or the teacher's
            own, with the strides of `student`; none for tokens without a teacher.
        ce_weights (`torch.Tensor` of shape `(n,)`, *optional*): Float32 weights of the cross-entropies, 1 by default. Without
            `dft`.
        block (`int`, *optional*): Words that are read at a time, a power of two.
    """
    taught = other is not None
    assert student.stride(1) == 1 and (other is None or other.stride() == student.stride())
    n, vocabulary = student.shape
    block = min(block or _BLOCK, max(_WORDS_OF_THREAD, triton.next_power_of_2(vocabulary)))
    with torch.cuda.device_of(student):
        _loss_and_gradient[(n,)](
            student, other if taught else student, student if bias is None else bias,
            student if teacher_bias is None else teacher_bias, labels, sums if ce_weights is None else ce_weights, sums,
            student.stride(0),
            float(kl_weight), float(mixture), float(temperature), float(scale), float(softcap or 1.0), float(factor), vocabulary,
            DIRECTION=direction, TEMPERED=temperature != 1.0, SOFTCAP=softcap is not None, DFT=dft, WEIGHTED=ce_weights is not None,
            TAUGHT=taught, GAP=gap,
            BIAS=bias is not None, TEACHER_BIAS=taught and not gap and teacher_bias is not None, NEED_GRAD=need_grad,
            THREADS=block // _WORDS_OF_THREAD, WORDS=_WORDS_OF_THREAD, BLOCKS=triton.cdiv(vocabulary, block),
            STAGES=_STAGES if student.element_size() == 2 else _STAGES_OF_FLOAT32, num_warps=_WARPS,
        )  # fmt: skip
