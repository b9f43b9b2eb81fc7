"""Iterations without gradients multiply consecutive weights once: same slots and gradients, fewer operations."""

import itertools

import pytest
import torch
from slotkernels import SlotAttention, slot_attention
from slotkernels.slot_attention import SAVI, STANDARD, prepared
from slotkernels.slot_attention.reference import textbook_slot_attention
from torch.utils.flop_counter import FlopCounterMode

BATCH, TOKENS, SLOTS, DIM, WIDTH = 2, 9, 6, 5, 7
OPTIONS = [
    {},
    {"qkv_dim": 4, "conventions": SAVI._replace(qkv_bias=True)},
    {"update": "residual", "conventions": STANDARD._replace(qkv_bias=True)},
    {"groups": 3, "implicit": "detach"},
    {"implicit": "none"},
]


def make(dim=DIM, width=WIDTH, dtype=torch.float64, iterations=3, hidden_dim=10, **options):
    module = SlotAttention(SLOTS, dim, width, iterations, hidden_dim, prior=False, **options).to(dtype)
    for parameter in module.parameters():  # biases and norms away from their special initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture(params=[True, False], ids=["merged", "apart"])
def merged(request, monkeypatch):
    monkeypatch.setattr(prepared, "saved_by_merging", lambda *sizes: request.param)
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: True)
    return request.param


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_slots_and_gradients_equal_the_textbook(merged, options, hides):
    module = make(**options)
    inputs = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(BATCH, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(BATCH, TOKENS) > 0.4 if hides else None
    leaves = [inputs, initial, *module.parameters()]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            actual = module(inputs, initial, mask)
            expected = textbook_slot_attention(module, inputs, initial, mask)
        torch.testing.assert_close(tuple(actual), expected)
        if enabled:
            cotangents = [torch.randn_like(t) for t in expected]
            torch.testing.assert_close(
                *(torch.autograd.grad(made, leaves, cotangents, allow_unused=True) for made in (actual, expected))
            )


def test_sharper_attention_is_sharper_with_merged_weights(monkeypatch):
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: True)
    module, inputs = make(conventions=SAVI._replace(qkv_bias=True)), torch.randn(BATCH, TOKENS, WIDTH).double()
    initial, outputs = torch.randn(BATCH, SLOTS, DIM).double(), []
    for merges in (True, False):
        monkeypatch.setattr(prepared, "saved_by_merging", lambda *sizes, merges=merges: merges)
        outputs.append(tuple(module(inputs, initial, sharpness=3.0)))
    torch.testing.assert_close(*outputs)


def in_turn(answers):
    left = iter(answers)
    return lambda *sizes: next(left)


def operations(module, rows, decide, monkeypatch):
    """Operations of the forward products, merging included; the first iteration has no gradients."""
    monkeypatch.setattr(prepared, "saved_by_merging", decide)
    inputs, initial = torch.randn(rows, 2, module.input_dim), torch.randn(rows, SLOTS, module.dim)
    with FlopCounterMode(display=False) as counter:
        module(inputs, initial)
    return counter.get_total_flops()


@pytest.mark.parametrize("update", ["gru", "residual"])
@pytest.mark.parametrize(("dim", "width", "qkv_dim"), [(16, 16, 16), (16, 32, 8), (24, 8, 48)])
def test_weights_are_merged_where_that_takes_fewer_operations(monkeypatch, dim, width, qkv_dim, update):
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: True)
    qkv_dim = qkv_dim if update == "gru" else dim
    module = make(dim, width, torch.float32, 2, 4, qkv_dim=qkv_dim, update=update)
    formula, chosen = prepared.saved_by_merging, set()
    for rows in (1, 2, 4, 16):
        # In the order of the calls: queries and keys, then values and gates.
        counts = {
            pair: operations(module, rows, in_turn(pair), monkeypatch) for pair in itertools.product((1, 0), repeat=2)
        }
        count = operations(module, rows, formula, monkeypatch)
        assert count == min(counts.values()), f"{rows} samples: {count} of {counts}"
        chosen.add(min(counts, key=counts.get))
    assert (len(chosen) > 1) == (qkv_dim >= min(dim, width)), chosen  # narrow projections are never merged


@pytest.mark.parametrize("rows", [1, 8])
def test_a_result_without_gradients_does_not_depend_on_the_batch(monkeypatch, rows):
    def refuse(*sizes):
        raise AssertionError("the choice depends on the batch")

    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: True)
    monkeypatch.setattr(prepared, "saved_by_merging", refuse)
    with torch.no_grad():
        make()(torch.randn(rows, TOKENS, WIDTH).double(), torch.randn(rows, SLOTS, DIM).double())
