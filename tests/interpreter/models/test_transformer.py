"""Encoder and decoder of the transformer: attention in both orders, the choice between them, masks."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from interpreter.models.transformer import Attention, TransformerDecoder, TransformerEncoder, absorbs, init_transformer


def written_out(attention, x, memory, mask=None):
    """Multi-head attention as in the paper: projections, a softmax for each head, concatenated results."""
    heads = attention.heads
    q = attention.to_q(x.expand(len(memory), -1, -1)).unflatten(-1, (heads, -1)) * attention.sharpness
    k, v = attention.to_kv(memory).unflatten(-1, (2, heads, -1)).unbind(2)
    logits = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return attention.to_out(torch.einsum("bhls,bshd->blhd", logits.softmax(-1), v).flatten(2))


def decoded(decoder, queries, slots, mask=None):
    """The decoder for each sample by itself, with attention in plain operations."""
    x, memory = queries.expand(len(slots), -1, -1), decoder.norm_slots(slots)
    for block in decoder.blocks:
        h = block.norm_self(x)
        x = x + written_out(block.attend_self, h, h)
        x = x + written_out(block.attend_cross, block.norm_cross(x), memory, mask)
        x = x + block.mlp(block.norm_mlp(x))
    return decoder.head(decoder.norm(x))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_same(actual, expected, leaves, names):
    """Values and gradients of a random cotangent."""
    tolerance = TOLERANCE[expected.dtype]
    cotangent = torch.randn_like(expected)
    found = [actual, *torch.autograd.grad(actual, leaves, cotangent)]
    wanted = [expected, *torch.autograd.grad(expected, leaves, cotangent)]
    for name, one, other in zip(["output", *names], found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, atol=tolerance, rtol=100 * tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("heads", "length", "size", "absorbed"),
    [(4, 50, 3, True), (2, 30, 7, True), (1, 9, 1, True), (4, 50, 8, False), (2, 5, 7, False), (4, 1, 1, False)],
)
@pytest.mark.parametrize("shared", [False, True], ids=["own queries", "shared queries"])
def test_attention_and_its_gradients_equal_the_definition(shared, heads, length, size, absorbed, masked):
    torch.manual_seed(0)
    attention = Attention(16, heads, sharpness=1.5).double()
    assert absorbs(length, size, heads, 16) == absorbed
    x = torch.randn(1 if shared else 3, length, 16, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(3, size, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, size) < 0.5 if masked else None
    if mask is not None:
        mask[:, -1] = True
    names, parameters = zip(*attention.named_parameters(), strict=True)
    leaves = [x, memory, *parameters]
    assert_same(attention(x, memory, mask), written_out(attention, x, memory, mask), leaves, ["x", "memory", *names])


def test_masked_memory_reaches_nothing_and_gets_no_gradient():
    torch.manual_seed(0)
    attention, x, memory = Attention(16, 2), torch.randn(2, 30, 16), torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2:] = mask[1, 0] = False
    other = memory.masked_fill(~mask[..., None], 1e4).requires_grad_()
    out = attention(x, other, mask)
    torch.testing.assert_close(out, attention(x, memory, mask))
    grad = torch.autograd.grad(out.sum(), other)[0]
    assert not grad[~mask].any()
    assert grad[mask].abs().min() > 0


@pytest.mark.parametrize("length", [2, 9, 40])
@pytest.mark.parametrize("size", [1, 3, 6, 12])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_order_with_fewer_operations_is_taken(heads, size, length, monkeypatch):
    def operations(order):
        monkeypatch.setattr("interpreter.models.transformer.absorbs", order)
        with FlopCounterMode(display=False) as counter:
            Attention(64, heads)(torch.randn(2, length, 64), torch.randn(2, size, 64)).sum().backward()
        # The formula leaves out vectors that are multiplied with the bias of the queries.
        return counter.get_total_flops() - (3 * 2 * 2 * size * 64 if order(0, 0, 0, 0) else 0)

    plain, absorbed = operations(lambda *_: False), operations(lambda *_: True)
    assert absorbs(length, size, heads, 64) == (absorbed < plain)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)  # the norms of float32 are C++, where that is built
@pytest.mark.parametrize("masked", [False, True])
def test_decoder_and_its_gradients_equal_the_definition(masked, dtype, recompute):
    torch.manual_seed(0)
    decoder = TransformerDecoder(16, 5, 3, 2, recompute).to(dtype)
    init_transformer(decoder)
    queries = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    slots = torch.randn(3, 4, 16, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [False, False, False, True]]) if masked else None
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    actual, expected = decoder(queries, slots, mask), decoded(decoder, queries, slots, mask)
    assert_same(actual, expected, [queries, slots, *parameters], ["queries", "slots", *names])


def test_an_encoder_is_not_rounded_by_autocast():
    """Slot attention normalises its result once more."""
    with torch.autocast("cpu", torch.bfloat16):
        assert TransformerEncoder(16, 2, 2)(torch.randn(3, 5, 16)).dtype == torch.float32


def test_the_first_self_attention_is_computed_once_for_all_samples():
    decoder, rows = TransformerDecoder(16, 5, 2, 2), []
    for block in decoder.blocks:
        block.attend_self.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    decoder(torch.randn(20, 16), torch.randn(3, 4, 16))
    assert rows == [1, 3]


def test_no_softmax_of_a_step_has_a_mask(monkeypatch):
    """Flash attention takes no mask, so the mask of the slots is a part of the logits' bias."""
    masks = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: masks.append(k["attn_mask"]) or original(*a, **k)
    )
    decoder, slots = TransformerDecoder(16, 5, 2, 2), torch.randn(3, 4, 16)
    decoder(torch.randn(20, 16), slots, torch.ones(3, 4, dtype=torch.bool)).sum().backward()
    assert masks == [None, None]


@pytest.mark.parametrize("length", [5, 50])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_any_precision_obeys_its_mask(masked, precision, grad, length):
    torch.manual_seed(0)
    attention = Attention(16, 2).to(precision)
    x, memory = torch.randn(2, length, 16, dtype=precision), torch.randn(2, 7, 16, dtype=precision)
    mask = torch.rand(2, 7) < 0.5 if masked else None
    with torch.set_grad_enabled(grad):
        out = attention(x, memory, mask)

    exact = Attention(16, 2).double()
    exact.load_state_dict(attention.state_dict())
    with torch.no_grad():
        expected = written_out(exact, x.double(), memory.double(), mask)
    assert out.dtype == precision
    # bf16 keeps 8 bits, through three products.
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_encoder_ignores_masked_tokens():
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, 2, 2)
    x = torch.randn(1, 6, 16)
    mask = torch.tensor([[True, True, True, True, False, False]])
    base = encoder(x, mask)[:, :4]
    torch.testing.assert_close(base, encoder(x[:, :4]))
    x[:, 4:] = 100 * torch.randn(1, 2, 16)
    torch.testing.assert_close(encoder(x, mask)[:, :4], base)


def test_the_mlp_works_in_pieces_unless_gradients_are_needed(monkeypatch):
    torch.manual_seed(0)
    encoder, x = TransformerEncoder(16, 2, 2), torch.randn(2, 11, 16)
    lengths = []
    encoder.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    whole = encoder(x)
    monkeypatch.setattr("interpreter.models.transformer.MLP_TOKENS", 4)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), whole)
    torch.testing.assert_close(encoder(x), whole)
    assert lengths == [11, 4, 4, 3, 11]
