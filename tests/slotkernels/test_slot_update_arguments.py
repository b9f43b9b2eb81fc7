"""The slot update's two ops: errors for invalid arguments, and the formulas of their cost."""

import pytest
import torch
from slotkernels.slot_update import (
    add_norm,
    add_norm_bytes_moved,
    add_norm_flops,
    gru_norm,
    gru_norm_bytes_moved,
    gru_norm_flops,
)

BAD_SHARED = [
    ({"slots": torch.zeros(())}, r"slots is float32 \[\], expected \[..., D\] with D > 0"),
    ({"slots": torch.zeros(2, 0)}, r"slots is float32 \[2, 0\], expected \[..., D\] with D > 0"),
    ({"slots": torch.zeros(2, 4, dtype=torch.int32)}, r"slots is int32 \[2, 4\], expected dtype float32, float64"),
    ({"weight": torch.zeros(3)}, r"weight is float32 \[3\], expected \[4\] for slots float32 \[2, 4\]"),
    ({"bias": torch.zeros(1, 4)}, r"bias is float32 \[1, 4\], expected \[4\]"),
    ({"weight": torch.zeros(4).double()}, r"weight is float64 \[4\], expected dtype float32, bfloat16 or float16"),
    ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, expected the device of slots: cpu"),
    ({"norm_eps": -1.0}, r"norm_eps=-1.0, expected a finite number >= 0"),
    ({"norm_eps": float("nan")}, r"norm_eps=nan"),
    ({"backend": "metal"}, r"backend='metal' is unknown"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD_SHARED,
        ({"gates_input": torch.zeros(2, 4)}, r"gates_input is float32 \[2, 4\], expected \[2, 12\]"),
        ({"gates_input": torch.zeros(3, 12)}, r"gates_input is float32 \[3, 12\], expected \[2, 12\]"),
        ({"gates_hidden": torch.zeros(12)}, r"gates_hidden is float32 \[12\], expected \[2, 12\]"),
        ({"gates_hidden": torch.zeros(2, 12).half()}, r"gates_hidden is float16 .*expected the dtype of gates_input"),
        ({"gates_input": torch.zeros(2, 12).long()}, r"gates_input is int64 \[2, 12\], expected dtype float32"),
        ({"slots": torch.zeros(2, 4).double()}, r"gates_input is float32 \[2, 12\], expected dtype float64"),
    ],
)
def test_bad_input_of_gru_norm_is_a_value_error_that_names_it(arguments, message):
    good = {"gates_input": torch.zeros(2, 12), "gates_hidden": torch.zeros(2, 12), "slots": torch.zeros(2, 4)}
    good |= {"weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        gru_norm(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD_SHARED,
        ({"update": torch.zeros(4)}, r"update is float32 \[4\], expected \[2, 4\]"),
        ({"update": torch.zeros(2, 4).bool()}, r"update is bool \[2, 4\], expected dtype float32"),
    ],
)
def test_bad_input_of_add_norm_is_a_value_error_that_names_it(arguments, message):
    good = {"slots": torch.zeros(2, 4), "update": torch.zeros(2, 4), "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        add_norm(**(good | arguments))


def test_cost_formulas():
    # 2 rows of 3, bf16 gates, fp32 state: gates 2·3, state in and out, norm; two statistics a row; weight and bias.
    assert gru_norm_bytes_moved(2, 3, 2) == 2 * (3 * (6 * 2 + 4 + 4 + 2) + 8) + 8 * 3
    # Backward: gates, state, both cotangents; gradients of gates and state; weight read, two gradients written.
    assert gru_norm_bytes_moved(2, 3, 2, backward=True) == 2 * (3 * (12 + 4 + 4 + 2 + 12 + 4) + 8) + 12 * 3
    assert add_norm_bytes_moved(2, 3, 2) == 2 * (3 * (4 + 2 + 4 + 2) + 8) + 8 * 3
    assert add_norm_bytes_moved(2, 3, 2, backward=True) == 2 * (3 * (4 + 4 + 2 + 4 + 2) + 8) + 12 * 3
    assert add_norm_bytes_moved(2, 3, 4, backward=True) == 2 * (3 * (4 + 4 + 4 + 4) + 8) + 12 * 3
    assert (gru_norm_flops(2, 3), add_norm_flops(2, 3)) == (6 * 27, 6 * 8)
    assert (gru_norm_flops(2, 3, backward=True), add_norm_flops(2, 3, backward=True)) == (6 * 49, 6 * 14)
