import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dense_loss

from trl_ema.losses import LogitTransform, default_chunk_size, fused_linear_cross_entropy_kl


N, H, V = 13, 8, 29
DIRECTIONS = ["forward", "reverse", "jsd"]


@pytest.fixture(scope="module", autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where every tensor of a test is made."""
    with torch.device(request.param):
        yield request.param


def normal(generator, *shape, dtype=None):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


def inputs(seed=0, n=N, dtype=torch.float64, requires_grad=True):
    g = torch.Generator("cpu").manual_seed(seed)
    student = normal(g, n, H, dtype=dtype)
    teacher = student + 0.5 * normal(g, n, H, dtype=dtype)
    weight = normal(g, V, H, dtype=dtype)
    bias = normal(g, V, dtype=dtype)
    labels = torch.randint(V, (n,), generator=g, device="cpu").to(student.device)
    labels[::4] = -100
    return student.requires_grad_(requires_grad), teacher, weight, bias, labels


def compare(kl_weight=0.7, with_bias=False, own_head=False, seed=0, chunk_size=5, transform=None, **options):
    """Values and gradients of ours against the dense float64 reference."""
    student, teacher, weight, bias, labels = inputs(seed)
    weight.requires_grad_()
    bias = bias.requires_grad_() if with_bias else None
    heads = {}
    if own_head:
        heads = dict(teacher_weight=weight.detach() * 1.1, teacher_bias=bias.detach() + 0.3 if with_bias else None)
    leaves = [student, weight] + ([bias] if with_bias else [])
    transform = transform or LogitTransform()

    ours = fused_linear_cross_entropy_kl(
        student, teacher, weight, labels, kl_weight, bias=bias, chunk_size=chunk_size, transform=transform, **heads, **options
    )  # fmt: skip
    our_grads = torch.autograd.grad(ours.loss * 0.3, leaves)
    dense = dense_loss(
        student, teacher, weight, labels, kl_weight, bias=bias, scale=transform.scale, softcap=transform.softcap,
        **heads, **options,
    )  # fmt: skip
    dense_grads = torch.autograd.grad(dense[0] * 0.3, leaves)
    for mine, theirs in zip(vars(ours).values(), dense, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(our_grads, dense_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weighting", [dict(), dict(dft=True), dict(eaft=True)], ids=["ce", "dft", "eaft"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_equal_the_dense_reference(direction, weighting, temperature):
    compare(direction=direction, temperature=temperature, **weighting)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "head", [dict(with_bias=True), dict(transform=LogitTransform(softcap=3.0)), dict(transform=LogitTransform(scale=0.25)),
             dict(with_bias=True, own_head=True, transform=LogitTransform(scale=2.0, softcap=5.0)),
             dict(with_bias=True, eaft=True, transform=LogitTransform(scale=2.0, softcap=5.0))],
    ids=["bias", "softcap", "scale", "all, teacher's own head", "all, entropy weighting"],
)  # fmt: skip
def test_heads_equal_the_dense_reference(direction, temperature, head):
    compare(direction=direction, temperature=temperature, **head)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("taught", [0, 6, N])
def test_tokens_beyond_the_teachers_have_their_cross_entropy_alone(direction, taught):
    student, teacher, weight, _, labels = inputs()
    ours = fused_linear_cross_entropy_kl(
        student, teacher[:taught], weight, labels, 0.7, chunk_size=4, direction=direction
    )
    with_teacher = dense_loss(student[:taught], teacher[:taught], weight, labels[:taught], 0.7, direction=direction)
    alone = dense_loss(student[taught:], student[taught:], weight, labels[taught:], 0.7, direction=direction)
    for mine, *theirs in zip(vars(ours).values(), with_teacher, alone, strict=True):
        torch.testing.assert_close(mine, sum(theirs).to(mine.dtype), rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (ours.loss, with_teacher[0] + alone[0]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_entropy_weighting_leaves_out_what_the_student_is_sure_of_and_keeps_what_it_is_not():
    """Of a student that is sure, right or wrong, nothing is learned; of one that knows nothing all is."""
    weight, labels = torch.eye(V, dtype=torch.float64), torch.tensor([3, 4])
    for size, share in ((60.0, 0.0), (0.0, 1.0)):
        student = (size * torch.eye(V, dtype=torch.float64)[3]).repeat(2, 1).requires_grad_()
        out = fused_linear_cross_entropy_kl(student, student[:0].detach(), weight, labels, 0.0, eaft=True)
        assert out.loss.item() == pytest.approx(share * out.ce_loss.item(), abs=1e-12)
        (grad,) = torch.autograd.grad(out.loss, [student])
        plain = fused_linear_cross_entropy_kl(student, student[:0].detach(), weight, labels, 0.0)
        torch.testing.assert_close(grad, share * torch.autograd.grad(plain.loss, [student])[0], rtol=1e-9, atol=1e-12)


def test_two_weightings_at_once_are_refused():
    student, teacher, weight, _, labels = inputs()
    with pytest.raises(ValueError, match="`dft` and `eaft` both weight the cross-entropy.*Give one of them"):
        fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0, dft=True, eaft=True)


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
def test_jsd_mixture_equals_the_dense_reference(mixture):
    compare(direction="jsd", mixture=mixture)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dft", [False, True])
def test_gradcheck(direction, dft):
    student, teacher, weight, bias, labels = inputs(n=4)
    if dft:  # the weight of DFT is held constant, so only the divergence is a plain derivative
        labels = torch.full_like(labels, -100)

    def loss(student, weight, bias):
        return fused_linear_cross_entropy_kl(
            student, teacher, weight, labels, 0.7, bias=bias, teacher_weight=weight.detach().clone() * 0 + 0.3,
            teacher_bias=torch.zeros(V, dtype=torch.float64), direction=direction, temperature=1.5, dft=dft,
            transform=LogitTransform(0.8, 4.0), chunk_size=3,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, weight.requires_grad_(), bias.requires_grad_()))


@settings(max_examples=30, deadline=None)
@given(chunk_size=st.integers(1, 20), direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 5))
def test_chunk_size_never_changes_the_result(chunk_size, direction, seed):
    student, teacher, weight, _, labels = inputs(seed)
    results = []
    for size in (chunk_size, N):
        out = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.3, direction=direction, chunk_size=size)
        results.append((*vars(out).values(), *torch.autograd.grad(out.loss, [student])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_vocabulary_larger_than_the_cache_equals_the_dense_reference(direction, monkeypatch):
    monkeypatch.setattr("trl_ema.losses._BLOCK_MIB_OF_CORE", 0)  # a row for each thread
    compare(direction=direction, chunk_size=N, with_bias=True, transform=LogitTransform(2.0, 5.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearly_equal_models_have_a_small_divergence_whatever_their_logits_are_added_to(direction, offset):
    student, _, weight, _, labels = inputs(n=64, dtype=torch.float32)
    teacher = student.detach() + 1e-2 * normal(torch.Generator("cpu").manual_seed(1), 64, H)
    bias = torch.full((V,), offset)
    ours = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0, bias=bias, direction=direction)
    exact = (t.double() for t in (student, teacher, weight))
    dense = dense_loss(*exact, labels, 1.0, bias=bias.double(), direction=direction)
    # The logits themselves are rounded: to 4e-6 around 100.
    assert ours.kl_loss.item() == pytest.approx(dense[2].item(), abs=64 * (5e-8 if offset == 0 else 2e-6))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_probabilities_that_underflow_equal_the_dense_reference(direction):
    student, teacher, weight, _, labels = inputs(dtype=torch.float32)
    ours = fused_linear_cross_entropy_kl(student * 60, teacher * 60, weight, labels, 0.7, direction=direction)
    exact = (t.double() for t in (student * 60, teacher * 60, weight))
    dense = dense_loss(*exact, labels, 0.7, direction=direction)
    for mine, theirs in zip(vars(ours).values(), dense, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-4)
    (mine,) = torch.autograd.grad(ours.loss, [student])
    (theirs,) = torch.autograd.grad(dense[0], [student])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    direction=st.sampled_from(DIRECTIONS), temperature=st.floats(0.3, 4), mixture=st.floats(0.05, 0.95), seed=st.integers(0, 99)
)  # fmt: skip
def test_divergence_is_never_negative(direction, temperature, mixture, seed):
    student, teacher, weight, _, labels = inputs(seed)
    out = fused_linear_cross_entropy_kl(
        student, teacher, weight, labels, 1.0, direction=direction, temperature=temperature, mixture=mixture
    )
    assert out.kl_loss >= -1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_is_zero_when_teacher_equals_student(direction):
    student, _, weight, _, labels = inputs(dtype=torch.float32)
    out = fused_linear_cross_entropy_kl(student, student.detach(), weight, labels, 1.0, direction=direction)
    assert out.kl_loss.item() == pytest.approx(0.0, abs=1e-6)
    alone = fused_linear_cross_entropy_kl(student, student.detach(), weight, labels, 0.0, direction=direction)
    (grad,), (grad_alone,) = torch.autograd.grad(out.loss, [student]), torch.autograd.grad(alone.loss, [student])
    torch.testing.assert_close(grad, grad_alone, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_add_no_cross_entropy():
    student, teacher, weight, _, labels = inputs()
    kept = labels != -100
    everything = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 0.0)
    only_kept = fused_linear_cross_entropy_kl(student[kept], teacher[kept], weight, labels[kept], 0.0)
    torch.testing.assert_close(everything.loss, only_kept.loss)
    torch.testing.assert_close(everything.top1_hits, only_kept.top1_hits)
    assert everything.entropy.item() == pytest.approx(only_kept.entropy.item())


def test_no_tokens_give_an_attached_zero():
    student = torch.randn(5, H, requires_grad=True)
    none = torch.zeros(5, dtype=torch.bool)
    labels = torch.zeros(0, dtype=torch.long)
    out = fused_linear_cross_entropy_kl(student[none], student[none].detach(), torch.randn(V, H), labels, 1.0)
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_frozen_head_gets_no_gradient():
    student, teacher, weight, _, labels = inputs()
    fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0).loss.backward()
    assert weight.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_is_at_most_slightly_worse_than_plain_torch(monkeypatch, device, dtype, direction):
    monkeypatch.setattr("trl_ema.losses._UPCAST_ROWS", 10)  # a CPU upcasts the head in parts
    student, teacher, weight, _, labels = inputs(n=64, dtype=torch.float32)
    half = [t.detach().to(dtype) for t in (student, teacher, weight)]

    def run(function, student, teacher, weight):
        student = student.clone().requires_grad_()
        out = function(student, teacher, weight, labels, 1.0, direction=direction)
        out = list(vars(out).values()) if hasattr(out, "kl_loss") else out
        return out[2].detach().double(), torch.autograd.grad(out[0], [student])[0].double()

    true = run(dense_loss, *(t.double() for t in half))
    plain = run(dense_loss, *half)
    ours = run(fused_linear_cross_entropy_kl, *half)
    for mine, theirs, exact in zip(ours, plain, true, strict=True):
        # On a GPU the logits are rounded, as plain PyTorch's are.
        tolerance = 1e-3 if device == "cpu" else 2e-3
        assert (mine - exact).norm() <= 1.1 * (theirs - exact).norm() + tolerance * exact.norm()


@pytest.mark.parametrize("upstream", [2.0**16, 1 / 999])
def test_what_comes_from_upstream_is_not_rounded_to_half_precision(device, upstream):
    """Neither a loss scale, which would overflow float16, nor one over the number of tokens."""
    student, teacher, weight, _, labels = inputs(dtype=torch.float32)
    student, teacher, weight = (t.detach().half() for t in (student * 1e-2, teacher * 1e-2, weight * 1e-2))
    student.requires_grad_()
    loss = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0).loss
    found = torch.autograd.grad(loss * upstream, [student])[0]
    exact = [t.detach().double() for t in (student, teacher, weight)]
    exact[0].requires_grad_()
    expected = torch.autograd.grad(dense_loss(*exact, labels, 1.0)[0] * upstream, [exact[0]])[0]
    assert found.dtype == torch.float16
    if device == "cpu":
        tolerance = dict(rtol=1e-3, atol=1e-6 * expected.abs().max().item() + 2.0**-24)
        torch.testing.assert_close(found.double(), expected, **tolerance)
    else:  # the gradient of the logits is rounded, before a factor that it can be divided by
        assert (found - expected).norm() <= 2e-3 * expected.norm() + 2.0**-24 * expected.numel() ** 0.5


def test_under_autocast_the_logits_stay_float32(device):
    if device != "cpu":
        pytest.skip("a GPU multiplies in the precision of autocast: see test_kernels.py")
    student, teacher, weight, _, labels = inputs(dtype=torch.float32)
    plain = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0)
    assert torch.equal(out.kl_loss, plain.kl_loss)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """The largest tensor made is a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    tokens, vocab = 256, 512
    student = torch.randn(tokens, H, requires_grad=True)
    weight, labels = torch.randn(vocab, H), torch.randint(vocab, (tokens,))
    with Watch():
        fused_linear_cross_entropy_kl(
            student, student.detach() + 0.1, weight, labels, 1.0, chunk_size=16
        ).loss.backward()
    assert largest == 16 * vocab


def test_the_logits_of_a_chunk_take_a_bounded_part_of_memory():
    assert default_chunk_size("cpu", 49152) == 512  # large enough for the products
    for device, mib in (("cpu", 150), ("cuda", 256)):
        assert default_chunk_size(device, 151936) * 151936 * 4 <= mib * 2**20
    assert default_chunk_size("cpu", 10**9) == 1
    # With the kernel: a power of two; few tokens take less, but not so little that the products suffer.
    rows = {
        tokens: default_chunk_size("cuda", 151936, torch.bfloat16, tokens) for tokens in (10, 1024, 3000, 8192, 10**6)
    }
    assert rows == {10: 128, 1024: 128, 3000: 256, 8192: 512, 10**6: 512}


def test_unknown_direction_is_refused():
    student, teacher, weight, _, labels = inputs()
    with pytest.raises(ValueError, match=r"must be one of .*got 'backward'"):
        fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0, direction="backward")
