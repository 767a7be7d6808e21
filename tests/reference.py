"""The plainest dense version of the loss, for comparison. Legend: N tokens, V vocabulary."""

import math

import torch
import torch.nn.functional as F


def dense_loss(
    student_hidden,
    teacher_hidden,
    weight,
    labels,
    kl_weight,
    *,
    bias=None,
    teacher_weight=None,
    teacher_bias=None,
    scale=1.0,
    softcap=None,
    direction="forward",
    mixture=0.5,
    temperature=1.0,
    dft=False,
    eaft=False,
):
    """Returns the sums (loss, ce, kl, entropy, top-1 hits) with all logits in memory."""

    def logits_of(hidden, weight, bias):
        logits_NV = F.linear(hidden, weight, bias) * scale
        return softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV

    z_s = logits_of(student_hidden, weight, bias)
    own_head = teacher_weight is not None
    z_t = logits_of(teacher_hidden, teacher_weight if own_head else weight, teacher_bias if own_head else bias).detach()
    labelled = labels != -100

    ce_N = F.cross_entropy(z_s, labels, ignore_index=-100, reduction="none")
    log_ps, log_pt = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
    if direction == "forward":
        kl_N = F.kl_div(log_ps, log_pt, log_target=True, reduction="none").sum(-1)
    elif direction == "reverse":
        kl_N = F.kl_div(log_pt, log_ps, log_target=True, reduction="none").sum(-1)
    else:
        log_m = torch.logaddexp(log_ps + math.log(1 - mixture), log_pt + math.log(mixture))
        kl_N = mixture * F.kl_div(log_m, log_pt, log_target=True, reduction="none").sum(-1)
        kl_N = kl_N + (1 - mixture) * F.kl_div(log_m, log_ps, log_target=True, reduction="none").sum(-1)

    weighted_ce_N = ce_N * torch.exp(-ce_N.detach()) if dft else ce_N
    if eaft:
        top_NK = z_s.detach().topk(min(20, z_s.shape[-1])).values.softmax(-1)
        entropy_N = torch.special.entr(top_NK).sum(-1)
        weighted_ce_N = ce_N * entropy_N / math.log(top_NK.shape[-1])
    loss = (weighted_ce_N * labelled).sum() + kl_weight * kl_N.sum()
    log_p = F.log_softmax(z_s, -1)
    entropy = (-(log_p.exp() * log_p).sum(-1) * labelled).sum()
    hits = ((z_s.argmax(-1) == labels) & labelled).sum()
    return loss, ce_N.sum(), kl_N.sum(), entropy, hits
