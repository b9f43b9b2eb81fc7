"""Slot attention as in Slot Contrast and VideoSAUR: 324 tokens, 15 slots of width 128."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import VIDEOSAUR, bytes_moved
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to
from profiling.bench.recurrent_slot_attention import textbook_frame

Form = Callable[[SlotAttention, Tensor, Tensor], Tensor]  # slots [B, N, D] of tokens [B, M, D] and slots [B, N, D]
TOKENS, SLOTS, DIM, ITERATIONS = 324, 15, 128, 3


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run the block with this number of PyTorch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def textbook(module: SlotAttention, tokens: Tensor, slots: Tensor) -> Tensor:
    """Tokens are projected to keys and values, and each iteration is einsum, softmax, GRU cell and MLP."""
    return textbook_frame(module, tokens, slots, module.iterations)


def ours(module: SlotAttention, tokens: Tensor, slots: Tensor) -> Tensor:
    """The module."""
    return module(tokens, slots).slots


def forward(module: SlotAttention, form: Form, number: int) -> Function:
    """Without gradients, on a number of threads."""

    def run(tokens: Tensor, slots: Tensor, grad: Tensor) -> Outputs:
        with threads(number), torch.no_grad():
            return {"slots": form(module, tokens, slots)}

    return run


def backward(module: SlotAttention, form: Form, number: int) -> Function:
    """Forward, and backward to tokens, initial slots and parameters, on a number of threads."""

    def run(tokens: Tensor, slots: Tensor, grad: Tensor) -> Outputs:
        with threads(number):
            leaves = {"tokens": tokens.detach().requires_grad_(), "slots": slots.detach().requires_grad_()}
            leaves |= dict(module.named_parameters())
            for leaf in leaves.values():
                leaf.grad = None
            found = form(module, leaves["tokens"], leaves["slots"])
            found.backward(grad)
            gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            return {"slots": found.detach(), **gradients}

    return run


def cases(device: str) -> Iterator[Case]:
    """1 to 8 frames, on one thread and on two."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"iterations": ITERATIONS, "implicit": "none", "conventions": VIDEOSAUR, "prior": False}
    module = SlotAttention(SLOTS, DIM, **options).to(device)
    exact = copy.deepcopy(module).double()
    batches, numbers = ((1, 2, 4, 8), (1, 2)) if device == "cpu" else ((64,), (1,))
    for number in numbers:
        for batch in batches:
            for what, step in (("forward", forward), ("forward and backward", backward)):
                counted = (batch, SLOTS, TOKENS, DIM)

                def inputs(batch: int = batch) -> tuple[Tensor, ...]:
                    return tuple(torch.randn(batch, n, DIM, device=device) for n in (TOKENS, SLOTS, SLOTS))

                passes = ("",) if what == "forward" else ("", "tokens")
                yield Case(
                    shape={"B": batch, "M": TOKENS, "N": SLOTS, "D": DIM, "threads": number, "pass": what},
                    dtype=torch.float32,
                    inputs=inputs,
                    variants={
                        name: step(module, form, number) for name, form in (("textbook", textbook), (OURS, ours))
                    },
                    judge=close_to(step(exact, textbook, number), 1e-3, norm=("gradient",)),
                    bytes=ITERATIONS * sum(bytes_moved(*counted, backward=kind) for kind in passes),
                    flops=None,
                )


SLOT_CONTRAST_ATTENTION = Benchmark(
    "slot_contrast_attention",
    "`SlotAttention` with the conventions of VideoSAUR and Slot Contrast and three iterations: forward only, or "
    "forward and backward through all iterations to tokens, initial slots and parameters",
    {"textbook": "as in the public code: keys and values of all tokens, einsum, softmax, `nn.GRUCell`, MLP"},
    cases,
)
