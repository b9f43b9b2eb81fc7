"""Encoder and decoder of the transformer: shapes of work, masks, recomputation."""

import pytest
import torch

from interpreter.models.transformer import Attention, TransformerEncoder


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_over_what_the_mask_allows(masked, precision, grad):
    torch.manual_seed(0)
    attention = Attention(16, 2).to(precision)
    x, memory = torch.randn(2, 5, 16, dtype=precision), torch.randn(2, 7, 16, dtype=precision)
    mask = torch.rand(2, 7) < 0.5 if masked else None
    with torch.set_grad_enabled(grad):
        out = attention(x, memory, mask)

    exact = Attention(16, 2).double()
    exact.load_state_dict(attention.state_dict())
    with torch.no_grad():
        q = exact.to_q(x.double()).unflatten(-1, (2, 8))
        k, v = exact.to_kv(memory.double()).unflatten(-1, (2, 2, 8)).unbind(2)
        logits = torch.einsum("blhd,bshd->bhls", q, k) / 8**0.5
        if mask is not None:
            logits[~mask[:, None, None].expand_as(logits)] = -torch.inf
        expected = exact.to_out(torch.einsum("bhls,bshd->blhd", logits.softmax(-1), v).flatten(2))
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
