"""Loss and gradient of a chunk of logits as one Triton kernel: what the GPU does between the matrix products.

A row is read twice, once for its sums and once to write its gradient in place (JSD: three times); without the kernel PyTorch
goes through it 33 times. One program takes one row. The plain version beside it is `losses._loss_of_block`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


# Words that one program reads at a time: a thread takes so many neighbours of each, in one transaction.
_WORDS_OF_THREAD = 8
_WARPS = 8
_BLOCK = 32 * _WARPS * _WORDS_OF_THREAD
# What stands for a logit beyond the vocabulary: its probability is 0, and 0 times it is not NaN.
_NONE = tl.constexpr(-1e30)
_IGNORE_INDEX = tl.constexpr(-100)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Exponentials are to the base of 2, which a GPU has an instruction for: exp(z − h) = 2^(z·log₂e − h·log₂e), one more with the
# product in it. Highest logits and logarithms below are in these units, log₂e times theirs.
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _transformed(x, scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    if SCALED:
        x = x * scale
    if SOFTCAP:
        # tanh; Triton has none that the interpreter knows
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x


@triton.jit
def _logits(
    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, words, vocabulary, scale, softcap,
    MASKED: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, TAUGHT: tl.constexpr, GAP: tl.constexpr,
    BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr,
):  # fmt: skip
    """Of the student and, if there is one, of the teacher; only where `MASKED` some words may lie beyond the vocabulary."""
    inside = words < vocabulary if MASKED else None
    nothing = 0.0 if MASKED else None
    x = tl.load(student_ptr + words, mask=inside, other=nothing).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + words, mask=inside, other=nothing).to(tl.float32)
    student = _transformed(x, scale, softcap, SCALED, SOFTCAP)
    teacher = student
    if TAUGHT:
        y = tl.load(other_ptr + words, mask=inside, other=nothing).to(tl.float32)
        if GAP:
            y += x
        if TEACHER_BIAS:
            y += tl.load(teacher_bias_ptr + words, mask=inside, other=nothing).to(tl.float32)
        teacher = _transformed(y, scale, softcap, SCALED, SOFTCAP)
    if MASKED:
        student = tl.where(inside, student, _NONE)
        teacher = tl.where(inside, teacher, _NONE)
    return student, teacher


@triton.jit
def _add(highest, total, logits):
    """One more block to an online softmax: (highest, Σ exp(z − highest), what earlier sums shrink by, exp(z − highest))."""
    new = tl.maximum(highest, tl.max(logits, axis=1) * _LOG2E)
    shrunk = tl.exp2(highest - new)
    exps = tl.exp2(logits * _LOG2E - new[:, None])
    return new, total * shrunk + tl.sum(exps, axis=1), shrunk, exps


@triton.jit
def _add_block(
    s_top, s_sum, s_mean, d_top, d_sum, t_top, t_sum, gap_mean, z, t, per_temperature,
    DIRECTION: tl.constexpr, TEMPERED: tl.constexpr, TAUGHT: tl.constexpr,
):  # fmt: skip
    """One more block to the sums of a row, each thread's relative to its own highest logit."""
    s_top, s_sum, shrunk, exps = _add(s_top, s_sum, z)
    s_mean = s_mean * shrunk + tl.sum(exps * z, axis=1)
    if TAUGHT:
        if TEMPERED:
            z = z * per_temperature
            t = t * per_temperature
            d_top, d_sum, shrunk, exps = _add(d_top, d_sum, z)
        if DIRECTION == "reverse":
            gap_mean = gap_mean * shrunk + tl.sum(exps * (z - t), axis=1)
        t_top, t_sum, shrunk, exps = _add(t_top, t_sum, t)
        if DIRECTION == "forward":
            gap_mean = gap_mean * shrunk + tl.sum(exps * (t - z), axis=1)
    return s_top, s_sum, s_mean, d_top, d_sum, t_top, t_sum, gap_mean


@triton.jit
def _add_jsd_block(
    d_part,
    t_part,
    z,
    t,
    per_temperature,
    d_highest,
    d_log_total,
    t_highest,
    t_log_total,
    mixture,
    TEMPERED: tl.constexpr,
):
    """One more block to Σ p·(log₂ p − log₂ m) of student and teacher."""
    if TEMPERED:
        z = z * per_temperature
        t = t * per_temperature
    log_p = (z * _LOG2E - d_highest) - d_log_total
    log_p_teacher = (t * _LOG2E - t_highest) - t_log_total
    p = tl.exp2(log_p)
    p_teacher = tl.exp2(log_p_teacher)
    # Where both probabilities underflow 0 · log 0 must not become NaN.
    log_mixed = tl.log2(tl.maximum((1.0 - mixture) * p + mixture * p_teacher, _TINY))
    d_part += tl.sum(p * (log_p - log_mixed), axis=1)
    t_part += tl.sum(p_teacher * (log_p_teacher - log_mixed), axis=1)
    return d_part, t_part


@triton.jit
def _gradient(
    z, t, ce_factor, kl_factor, per_temperature, top, total, d_highest, d_total, t_highest, t_total, shift, kl, student_part, mixture,
    softcap, DIRECTION: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, TAUGHT: tl.constexpr,
):  # fmt: skip
    """Of λ·D and of the cross-entropy but for its label, with respect to the projection: factors hold all that a row multiplies by."""
    d = z
    e = tl.exp2(z * _LOG2E - top)
    grad = e * (ce_factor / total)
    if TAUGHT:
        if TEMPERED:
            d = z * per_temperature
            t = t * per_temperature
            e = tl.exp2(d * _LOG2E - d_highest)
        if DIRECTION == "forward":
            grad += e * (kl_factor / d_total) - tl.exp2(t * _LOG2E - t_highest) * (kl_factor / t_total)
        elif DIRECTION == "reverse":
            grad += e * (kl_factor / d_total) * ((d - t) + (shift - kl))
        else:
            p = e * (1.0 / d_total)
            p_teacher = tl.exp2(t * _LOG2E - t_highest) * (1.0 / t_total)
            log_p = (d * _LOG2E - d_highest) - tl.log2(d_total)
            log_mixed = tl.log2(tl.maximum((1.0 - mixture) * p + mixture * p_teacher, _TINY))
            grad += kl_factor * (1.0 - mixture) * p * ((log_p - log_mixed) * _LN2 - student_part)
    if SOFTCAP:
        grad *= 1.0 - (z / softcap) * (z / softcap)
    return grad


@triton.jit
def _loss_and_gradient(
    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, labels_ptr, ce_weights_ptr, sums_ptr, stride, kl_weight, mixture, per_temperature, scale, softcap, factor, vocabulary: tl.constexpr,
    DIRECTION: tl.constexpr, TEMPERED: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, DFT: tl.constexpr, WEIGHTED: tl.constexpr, TAUGHT: tl.constexpr,
    GAP: tl.constexpr, BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, NEED_GRAD: tl.constexpr,
    THREADS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * stride
    other_ptr += row * stride
    label = tl.load(labels_ptr + row)
    word = tl.minimum(tl.maximum(label, 0), vocabulary - 1)
    BLOCK: tl.constexpr = THREADS * WORDS
    # Whole blocks, and whether there is a rest at the end, of which alone words are masked.
    WHOLE: tl.constexpr = vocabulary // BLOCK
    REST: tl.constexpr = 1 if vocabulary % BLOCK else 0
    within = tl.arange(0, THREADS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    # The label's word is looked at by itself, not sought in every block.
    z_label, t_label = _logits(
        student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, word, vocabulary, scale, softcap,
        False, SCALED, SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
    )  # fmt: skip
    # A label of no word: loss and gradient are not finite, which is told. Not by a global: Triton takes one that is NaN, and so not
    # equal to itself, for changed.
    z_label = tl.where(label < vocabulary, z_label, float("nan"))

    # Each thread has its own highest logit and sums relative to it, so that nothing waits within the loop.
    # s: student; d: student of the divergence, at its temperature; t: teacher
    s_top = tl.full((THREADS,), _NONE, tl.float32)
    d_top = s_top
    t_top = s_top
    s_sum = tl.zeros((THREADS,), tl.float32)
    d_sum = s_sum
    t_sum = s_sum
    s_mean = s_sum  # Σ exp(z − highest)·z
    gap_mean = s_sum  # Σ exp·(difference of logits), by the teacher (forward) or the student (reverse)
    for AT_END in tl.static_range(2):
        for i in tl.range(WHOLE * AT_END, WHOLE + AT_END * REST):
            z, t = _logits(
                student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, i * BLOCK + within, vocabulary, scale, softcap,
                AT_END, SCALED, SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
            )  # fmt: skip
            s_top, s_sum, s_mean, d_top, d_sum, t_top, t_sum, gap_mean = _add_block(
                s_top, s_sum, s_mean, d_top, d_sum, t_top, t_sum, gap_mean, z, t, per_temperature,
                DIRECTION, TEMPERED, TAUGHT,
            )  # fmt: skip

    top = tl.max(s_top, axis=0)
    shrunk = tl.exp2(s_top - top)
    total = tl.sum(s_sum * shrunk, axis=0)
    log_total = tl.log2(total)
    labelled = tl.where(label == _IGNORE_INDEX, 0.0, 1.0)
    ce = labelled * (((top - z_label * _LOG2E) + log_total) * _LN2)
    entropy = labelled * ((top + log_total) * _LN2 - tl.sum(s_mean * shrunk, axis=0) / total)
    ce_weight = labelled
    if DFT:
        ce_weight = labelled * tl.exp(-ce)
    if WEIGHTED:
        ce_weight = labelled * tl.load(ce_weights_ptr + row)

    kl = 0.0
    d_highest = top
    d_total = total
    t_highest = top
    t_total = total
    shift = 0.0
    student_part = 0.0
    if TAUGHT:
        if TEMPERED:
            d_highest = tl.max(d_top, axis=0)
            shrunk = tl.exp2(d_top - d_highest)
            d_total = tl.sum(d_sum * shrunk, axis=0)
        t_highest = tl.max(t_top, axis=0)
        t_shrunk = tl.exp2(t_top - t_highest)
        t_total = tl.sum(t_sum * t_shrunk, axis=0)
        # log p_s − log p_t = z_s − z_t + shift
        shift = ((t_highest - d_highest) + (tl.log2(t_total) - tl.log2(d_total))) * _LN2
        if DIRECTION == "forward":
            kl = tl.sum(gap_mean * t_shrunk, axis=0) / t_total - shift
        elif DIRECTION == "reverse":
            kl = tl.sum(gap_mean * shrunk, axis=0) / d_total + shift
        else:
            d_log_total = tl.log2(d_total)
            t_log_total = tl.log2(t_total)
            d_part = tl.zeros((THREADS,), tl.float32)
            t_part = d_part
            for AT_END in tl.static_range(2):
                for i in tl.range(WHOLE * AT_END, WHOLE + AT_END * REST):
                    z, t = _logits(
                        student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, i * BLOCK + within, vocabulary, scale, softcap,
                        AT_END, SCALED, SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
                    )  # fmt: skip
                    d_part, t_part = _add_jsd_block(
                        d_part, t_part, z, t, per_temperature, d_highest, d_log_total, t_highest, t_log_total, mixture,
                        TEMPERED,
                    )  # fmt: skip
            student_part = tl.sum(d_part, axis=0) * _LN2
            kl = mixture * tl.sum(t_part, axis=0) * _LN2 + (1.0 - mixture) * student_part

    sums_ptr += row * 5
    tl.store(sums_ptr, ce_weight * ce + kl_weight * kl)
    tl.store(sums_ptr + 1, ce)
    tl.store(sums_ptr + 2, kl)
    tl.store(sums_ptr + 3, entropy)
    tl.store(sums_ptr + 4, tl.where(z_label * _LOG2E == top, labelled, 0.0))

    if NEED_GRAD:
        ce_factor = ce_weight * (scale * factor)
        kl_factor = kl_weight * per_temperature * (scale * factor)
        # Backwards: what was read last may still be in the cache.
        for BEFORE_END in tl.static_range(2):
            for i in tl.range(0, WHOLE if BEFORE_END else REST):
                words = (WHOLE - BEFORE_END - i) * BLOCK + within
                z, t = _logits(
                    student_ptr, other_ptr, bias_ptr, teacher_bias_ptr, words, vocabulary, scale, softcap,
                    1 - BEFORE_END, SCALED, SOFTCAP, TAUGHT, GAP, BIAS, TEACHER_BIAS,
                )  # fmt: skip
                grad = _gradient(
                    z, t, ce_factor, kl_factor, per_temperature, top, total, d_highest, d_total, t_highest, t_total, shift, kl,
                    student_part, mixture, softcap, DIRECTION, TEMPERED, SOFTCAP, TAUGHT,
                )  # fmt: skip
                inside = None if BEFORE_END else words < vocabulary
                tl.store(student_ptr + words, grad.to(student_ptr.dtype.element_ty), mask=inside)
        grad = _gradient(
            z_label, t_label, ce_factor, kl_factor, per_temperature, top, total, d_highest, d_total, t_highest, t_total, shift,
            kl, student_part, mixture, softcap, DIRECTION, TEMPERED, SOFTCAP, TAUGHT,
        )  # fmt: skip
        slope = ce_factor
        if SOFTCAP:
            slope *= 1.0 - (z_label / softcap) * (z_label / softcap)
        tl.debug_barrier()  # what another thread wrote there comes first
        tl.store(student_ptr + word, (grad - slope).to(student_ptr.dtype.element_ty), mask=label != _IGNORE_INDEX)


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
            float(kl_weight), float(mixture), 1.0 / temperature, float(scale), float(softcap or 1.0), float(factor), vocabulary,
            DIRECTION=direction, TEMPERED=temperature != 1.0, SCALED=scale != 1.0, SOFTCAP=softcap is not None, DFT=dft, WEIGHTED=ce_weights is not None,
            TAUGHT=taught, GAP=gap,
            BIAS=bias is not None, TEACHER_BIAS=taught and not gap and teacher_bias is not None, NEED_GRAD=need_grad,
            THREADS=block // _WORDS_OF_THREAD, WORDS=_WORDS_OF_THREAD,
            num_warps=_WARPS,
        )  # fmt: skip
