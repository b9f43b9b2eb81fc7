import pytest
import slotkernels  # registers the ops
import torch
from slotkernels import inverted_attention
from slotkernels.slot_attention import bytes_moved, flops

# Half types: logits, weights and updates are each rounded once to 8 (bf16) or 11 (fp16) bits; logits here are below
# 4, so one rounding moves the softmax by at most 4 * 2^-9 = 8e-3 (bf16) or 1e-3 (fp16). fp32: sums of <= 1024 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(2, 7, 3, 5), (1, 1, 1, 1), (3, 33, 20, 127), (2, 863, 8, 64), (1, 7, 33, 1024), (0, 7, 3, 5)]  # B, M, N, D


def textbook(q, k, v=None, mask=None, scale=None, eps=1e-8):
    """Float64 oracle, written from the paper: token-major, autograd does the rest."""
    v = k if v is None else v
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attention = (k @ q.transpose(1, 2) * scale).softmax(-1)
    weights = attention + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    total = weights.sum(1, keepdim=True)
    return (weights / total.where(total > 0, torch.ones_like(total))).transpose(1, 2) @ v, attention


def make(shape, dtype, with_v, with_mask):
    batch, tokens, slots, dim = shape
    tensors = [torch.randn(batch, n, dim).to(dtype).requires_grad_() for n in (slots, tokens)]
    if with_v:
        tensors.append(torch.randn(batch, tokens, dim + 2).to(dtype).requires_grad_())
    mask = torch.rand(batch, tokens) > 0.3 if with_mask else None
    if mask is not None and batch:
        mask[:, 0] = True
    return tensors, mask


def relative_error(actual, expected):
    scale = expected.abs().max().clamp_min(1e-3) if expected.numel() else 1.0
    return ((actual.double() - expected).abs() / scale).max().item() if actual.numel() else 0.0


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_equal_the_float64_oracle(shape, dtype, with_v, with_mask):
    tensors, mask = make(shape, dtype, with_v, with_mask)
    oracle = [t.detach().double().requires_grad_() for t in tensors]
    updates, attention = inverted_attention(*tensors, mask=mask, return_attention=True)
    expected_updates, expected_attention = textbook(*oracle, mask=mask)
    assert updates.dtype == dtype
    assert attention.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(updates, expected_updates) < TOLERANCE[dtype]
    assert relative_error(attention, expected_attention) < TOLERANCE[dtype]

    cotangents = [torch.randn_like(expected_updates), torch.randn_like(expected_attention)]
    cotangents = [c.to(t.dtype) for c, t in zip(cotangents, (updates, attention), strict=True)]
    grads = torch.autograd.grad((updates, attention), tensors, cotangents)
    expected = torch.autograd.grad((expected_updates, expected_attention), oracle, [c.double() for c in cotangents])
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, reference) < TOLERANCE[dtype]


def test_masked_tokens_weigh_nothing_not_even_eps():
    (q, k), _ = make((2, 9, 4, 6), torch.float64, False, False)
    mask = torch.arange(9).expand(2, 9) < 5
    updates, attention = inverted_attention(q, k, mask=mask, eps=0.1, return_attention=True)
    short, _ = inverted_attention(q, k[:, :5], eps=0.1)
    torch.testing.assert_close(updates, short, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 9).double())  # masked rows are still softmaxes
    (grad,) = torch.autograd.grad(updates.sum(), k)
    assert (grad[:, 5:] == 0).all()


def test_no_token_left_gives_zero_updates_and_zero_gradients():
    (q, k), _ = make((2, 5, 3, 4), torch.float32, False, False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    updates, _ = inverted_attention(q, k, mask=mask)
    assert (updates == 0).all()
    for grad in torch.autograd.grad(updates.sum(), (q, k)):
        assert (grad == 0).all()


def test_eps_and_scale_are_used():
    (q, k), _ = make((2, 5, 3, 4), torch.float64, False, False)
    for options in ({"eps": 0.3}, {"scale": 2.0}, {"eps": 0.0, "scale": -1.0}):
        updates, _ = inverted_attention(q, k, **options)
        torch.testing.assert_close(updates, textbook(q, k, **options)[0], rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite():
    q, k = torch.full((1, 2, 4), 100.0), torch.full((1, 3, 4), 100.0)
    q[:, 1] = -100
    updates, attention = inverted_attention(q, k, return_attention=True)
    assert updates.isfinite().all()
    torch.testing.assert_close(attention[0, 0], torch.tensor([1.0, 0.0]))


def test_non_contiguous_inputs():
    q, k = torch.randn(4, 2, 3).permute(1, 2, 0), torch.randn(2, 4, 14)[:, :, ::2].transpose(1, 2)
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    expected, _ = inverted_attention(q.contiguous(), k.contiguous())
    torch.testing.assert_close(inverted_attention(q, k)[0], expected)


def test_attention_is_returned_only_on_request():
    q = torch.randn(1, 2, 3)
    assert inverted_attention(q, q)[1] is None


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_argument_alone(needed):
    tensors, _ = make((2, 7, 3, 5), torch.float64, True, False)
    expected = torch.autograd.grad(textbook(*tensors)[0].square().sum(), tensors)
    tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    inverted_attention(*tensors)[0].square().sum().backward()
    for tensor, need, grad in zip(tensors, needed, expected, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, with_v):
    (q, k, *v), mask = make((2, 7, 3, 5), dtype, with_v, True)
    arguments = (q, k, *(v or [None]), mask, 0.5, 1e-8, "auto")
    torch.library.opcheck(torch.ops.slotkernels.inverted_attention, arguments, atol=1e-2, rtol=1e-2)
    attention = torch.randn(2, 3, 7, dtype=torch.float32).softmax(1)
    backward = (torch.randn(2, 3, 7 if with_v else 5, dtype=dtype), None, q.detach(), k.detach())
    backward = (*backward, v[0].detach() if with_v else None, mask, attention, 0.5, 1e-8, True, False, with_v, "auto")
    torch.library.opcheck(torch.ops.slotkernels.inverted_attention_backward, backward)


def test_compiles_fullgraph_with_equal_values_and_gradients():
    tensors, mask = make((2, 7, 3, 5), torch.float64, True, True)

    def loss(q, k, v):
        updates, attention = inverted_attention(q, k, v, mask=mask, return_attention=True)
        return updates.square().sum() + attention.square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q is float32 \[2, 3\], expected \[B, N, D\]"),
        ({"k": torch.zeros(2, 7, 4)}, r"k is float32 \[2, 7, 4\], expected \[B, M, D\] with D = 5"),
        ({"k": torch.zeros(3, 7, 5)}, r"k is .* with B = 2"),
        ({"k": torch.zeros(2, 0, 5)}, r"k is float32 \[2, 0, 5\].* with M > 0"),
        ({"q": torch.zeros(2, 3, 5, dtype=torch.int32)}, r"q is int32 .*expected dtype float32"),
        ({"k": torch.zeros(2, 7, 5).double()}, "k is float64 .*expected the dtype and device of q"),
        ({"v": torch.zeros(2, 6, 5)}, r"v is float32 \[2, 6, 5\], expected \[B, M, Dv\] with M = 7"),
        ({"mask": torch.ones(2, 7)}, r"mask is float32 \[2, 7\], expected dtype bool"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask is bool \[2, 8\].* with M = 7"),
        ({"eps": -1.0}, r"eps=-1.0, expected a number >= 0"),
        ({"eps": float("nan")}, r"eps=nan"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"q": torch.zeros(2, 3, 5), "k": torch.zeros(2, 7, 5)}
    with pytest.raises(ValueError, match=message):
        inverted_attention(**(good | arguments))


def test_cost_formulas():
    # B=1, N=2, M=3, D=4, fp32: 3+2+2 rows of 16 bytes and 6 attention values; 2 products of 2·2·3·4 operations.
    assert bytes_moved(1, 2, 3, 4) == 7 * 16 + 24
    assert bytes_moved(1, 2, 3, 4, backward=True) == (2 * 3 + 3 * 2) * 16 + 24
    assert flops(1, 2, 3, 4) == 96
    assert flops(1, 2, 3, 4, backward=True) == 192


def test_public_names():
    assert set(slotkernels.__all__) <= set(dir(slotkernels))
