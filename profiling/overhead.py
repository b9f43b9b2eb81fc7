"""Measure what a small eager call costs besides its arithmetic: checks, choice of a backend, autograd of an op.

    python -m profiling.overhead --out profiling/results/overhead-cpu.json

Each public op and module runs at a tiny size. The functions of its backend and their arguments are recorded once,
forward and backward. Then two variants run in turns:

- *bare*: the recorded functions on the recorded arguments. With gradients, a ``torch.autograd.Function`` that saves its
  tensors and the results that the backward pass needs, calls the forward function, and in its backward pass the
  backward function. A user would write the same code. A module runs as it is, with these functions instead of its ops.
- *public*: the public call, without gradients, or forward and backward.

The overhead is their difference, divided by the number of calls of ops inside. A registered op that goes through
PyTorch's dispatcher costs 70 µs more than its body.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import slotkernels
import torch
import tyro
from rich.console import Console
from rich.table import Table
from slotkernels._backends import Backends, tensors_of
from slotkernels._op import Op
from slotkernels.slot_update import add_norm, gru_norm
from torch import Tensor

from profiling.common.machine import machine, save

LIMIT_US = 25.0  # of a call of an op
BACKWARD = "_backward"  # what names of backward functions end with


@dataclass
class Options:
    """Measure what a small eager call costs besides its arithmetic."""

    only: tuple[str, ...] = ()
    """Names of calls. Default: all."""

    rounds: int = 40
    """Number of turns of each variant."""

    calls: int = 40
    """Number of calls per turn."""

    threads: int = 1
    """Threads of PyTorch."""

    out: Path | None = None
    """File for the results, as JSON."""


@dataclass(frozen=True)
class Call:
    """A public call: so many of its ``results`` are differentiated with respect to ``leaves``."""

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    results: int = 1
    module: bool = False  # several ops between other operations


@dataclass(frozen=True)
class Recorded:
    """One call of an op: its backend's function and arguments, and those of its backward pass."""

    forward: Callable[[Any], Any]
    arguments: Any
    results: tuple[Tensor, ...]
    own_gradient: bool  # whether a backward function differentiates it, and not PyTorch
    backward: Callable[[Any], Any] | None = None  # None if it was not called
    backward_arguments: Any = None

    @property
    def kept(self) -> list[int]:
        """Places of the results that the backward pass reads."""
        if self.backward is None:
            return []
        read = {tensor.data_ptr() for tensor in tensors_of(self.backward_arguments)}
        return [i for i, tensor in enumerate(tensors_of(self.results)) if tensor.numel() and tensor.data_ptr() in read]


def calls() -> dict[str, Call]:
    """Every public op and module at sizes whose arithmetic takes microseconds."""
    torch.manual_seed(0)
    batch, slots, tokens, dim = 1, 4, 16, 8
    q, k = (torch.randn(batch, n, dim, requires_grad=True) for n in (slots, tokens))
    points = tuple(torch.randn(batch, 5, 2, requires_grad=True) for _ in range(2))
    cost = torch.rand(batch, 5, 6, requires_grad=True)
    attention = torch.rand(batch, tokens, slots).softmax(-1).requires_grad_()
    labels, counts = torch.tensor([[0, 1, 0, 2]]), torch.rand(batch, 3, 3)
    hidden, weight, bias = torch.randn(batch, slots, tokens, dim, requires_grad=True), torch.randn(dim), torch.zeros(1)
    maps = (
        torch.rand(1, 2, tokens, slots).softmax(-1).requires_grad_(),
        torch.rand(1, 2, slots, 3).softmax(-1).requires_grad_(),
    )
    grid, guide = (4, 4), torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8)
    module = slotkernels.SlotAttention(slots, dim, implicit="none")
    invariant = slotkernels.InvariantSlotAttention(slots, dim)
    loss, corners = slotkernels.SamplesLoss(), torch.rand(tokens, 2)
    gates, state = torch.randn(2, batch, slots, 3 * dim), torch.randn(batch, slots, dim, requires_grad=True)
    gates_input, gates_hidden = (t.clone().requires_grad_() for t in gates)
    scale, shift = (t.requires_grad_() for t in (torch.ones(dim), torch.zeros(dim)))
    unit = torch.nn.functional.normalize(torch.randn(2, batch, tokens, dim), dim=-1)
    learned = tuple(module.parameters())[2:]  # all but the prior
    of_invariant = tuple(invariant.parameters())
    return {
        "inverted_attention": Call(lambda: slotkernels.inverted_attention(q, k), (q, k)),
        "gru_norm": Call(
            lambda: gru_norm(gates_input, gates_hidden, state, scale, shift),
            (gates_input, gates_hidden, state, scale, shift),
            results=2,
        ),
        "add_norm": Call(lambda: add_norm(q, state, scale, shift), (q, state, scale, shift), results=2),
        "SlotAttention": Call(lambda: module(k, q), (q, k, *learned), module=True),
        "InvariantSlotAttention": Call(lambda: invariant(k, corners), (k, *of_invariant), module=True),
        "sinkhorn_divergence": Call(lambda: slotkernels.sinkhorn_divergence(*points), points),
        "sinkhorn_plan": Call(lambda: slotkernels.sinkhorn_plan(cost, eps=0.1, iterations=5), (cost,)),
        "SamplesLoss": Call(lambda: loss(*points), points),
        "merge_slots": Call(lambda: slotkernels.merge_slots(q, attention, labels), (q, attention)),
        "cluster_slots": Call(lambda: slotkernels.cluster_slots(q, 0.5)),
        "match_slots": Call(lambda: slotkernels.match_slots(counts)),
        "mix_slots": Call(lambda: slotkernels.mix_slots(hidden, weight, bias), (hidden,)),
        "propagate_attention": Call(lambda: slotkernels.propagate_attention(*maps), maps),
        "propagate_labels": Call(lambda: slotkernels.propagate_labels(*maps, grid, (8, 8))),
        "propagate_masks": Call(
            lambda: slotkernels.propagate_masks(maps[0].detach(), maps[1].detach(), grid, (8, 8), objects=[0, 2])
        ),
        "guided_labels": Call(lambda: slotkernels.guided_labels(*maps, grid, guide)),
        "transport_targets": Call(lambda: slotkernels.transport_targets(unit[0], unit[1], unit[0])),
    }


def differentiated(call: Call) -> tuple[Tensor, ...]:
    """Results of the call that get a gradient."""
    results = call.run()
    return (results,) if isinstance(results, Tensor) else tuple(results[: call.results])


def runner(call: Call, gradients: bool) -> Callable[[], Any]:
    """Forward, or forward and backward."""
    if not gradients:
        return call.run
    cotangents = [torch.ones_like(result) for result in differentiated(call)]

    def run() -> None:
        torch.autograd.grad(differentiated(call), call.leaves, cotangents, allow_unused=True)

    return run


def record(run: Callable[[], Any]) -> list[Recorded]:
    """What the backends are called with, in the order of the forward pass."""
    entries: list[tuple[Backends, Callable[[Any], Any], Any, Any]] = []
    load = Backends.load

    def recording(op: Backends, backend: str) -> Callable[[Any], Any]:
        function = load(op, backend)

        def observed(arguments: Any) -> Any:
            results = function(arguments)
            entries.append((op, function, arguments, (results,) if isinstance(results, Tensor) else tuple(results)))
            return results

        return observed

    with mock.patch.object(Backends, "load", recording):
        run()
    forward = [entry for entry in entries if not entry[0].function.endswith(BACKWARD)]
    backward = [entry for entry in entries if entry[0].function.endswith(BACKWARD)]
    recorded: list[Recorded] = []
    for op, function, arguments, results in reversed(forward):  # backward passes come in the reverse order
        differentiated = bool(backward) and backward[0][0].function == op.function + BACKWARD
        _, of_backward, its_arguments, _ = backward.pop(0) if differentiated else (op, None, None, None)
        recorded.append(Recorded(function, arguments, results, isinstance(op, Op), of_backward, its_arguments))
    assert not backward, f"backward passes without their forward ones: {backward}"
    return recorded[::-1]


def bare_function(recorded: Recorded) -> Callable[..., Any]:
    """The recorded call of one op as an autograd function of its tensors."""
    forward_of, backward_of = recorded.forward, recorded.backward
    arguments, backward_arguments, kept = recorded.arguments, recorded.backward_arguments, recorded.kept

    def forward(ctx: Any, *tensors: Tensor) -> Any:
        results = forward_of(arguments)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        ctx.save_for_backward(*tensors, *[results[i] for i in kept])
        ctx.set_materialize_grads(False)
        return results

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        if backward_of is not None:
            backward_of(backward_arguments)
        return tensors[: len(tensors) - len(kept)]  # of the gradients' shapes; their values do not matter

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("Bare", (torch.autograd.Function,), parts)
    return function.apply


def bare(call: Call, one: Recorded, gradients: bool) -> Callable[[], Any]:
    """The arithmetic of an op alone."""
    if not gradients or not one.own_gradient:
        return runner(Call(lambda: one.forward(one.arguments), call.leaves, call.results), gradients)
    function, tensors = bare_function(one), tuple(tensors_of(one.arguments))
    return runner(Call(lambda: function(*tensors), call.leaves, call.results), gradients)


def replaced(recorded: list[Recorded], gradients: bool) -> AbstractContextManager[Any]:
    """Every call of an op in the block is the next of the recorded ones, as a bare function."""
    functions = [bare_function(one) for one in recorded]
    turn = 0

    def instead(op: Any, arguments: Any, *settings: Any) -> Any:
        nonlocal turn
        place, turn = turn, (turn + 1) % len(recorded)
        if gradients:
            return op._results(functions[place](*tensors_of(arguments)))
        return recorded[place].forward(recorded[place].arguments)

    return mock.patch.object(Op, "__call__", instead)


def microseconds(run: Callable[[], None], times: int) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times * 1e6


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


def measure(call: Call, gradients: bool, options: Options) -> dict[str, Any]:
    """Microseconds of the arithmetic alone, of the public call, and of the difference for each op."""
    with torch.set_grad_enabled(gradients):
        public = runner(call, gradients)
        public()  # loads the backends
        recorded = record(public)
        alone = public if call.module else bare(call, recorded[0], gradients)
        times: dict[str, list[float]] = {"bare": [], "public": []}
        for turn in range(-2, options.rounds):  # two turns to warm up
            gc.collect()
            gc.disable()
            with replaced(recorded, gradients) if call.module else nullcontext():
                one = microseconds(alone, options.calls)
            other = microseconds(public, options.calls)
            gc.enable()
            if turn >= 0:
                times["bare"].append(one)
                times["public"].append(other)
    ops = len(recorded)
    overhead = [(b - a) / ops for a, b in zip(times["bare"], times["public"], strict=True)]
    return {"ops": ops, **{f"{name}_us": spread(t) for name, t in times.items()}, "overhead_us": spread(overhead)}


def main() -> None:
    """Parse the command line and run."""
    options = tyro.cli(Options, prog="python -m profiling.overhead", description=__doc__)
    torch.set_num_threads(options.threads)
    known = calls()
    unknown = [name for name in options.only if name not in known]
    if unknown:
        sys.exit(f"--only {unknown[0]}: unknown call, choose from {', '.join(known)}")
    results: dict[str, Any] = {
        "what": "eager overhead of each op and module on tiny inputs: public calls against their arithmetic alone",
        **machine("cpu"),
        "threads": options.threads,
        "load_average": os.getloadavg(),
        "limit_us": LIMIT_US,
        "calls": {},
    }
    table = Table(title="microseconds of a call; overhead of each op in it")
    for column in ("", "ops", "bare", "public", "overhead", "quartiles"):
        table.add_column(column, justify="right" if column else "left")
    for name in options.only or known:
        entry: dict[str, Any] = {}
        for kind in ("forward", "forward and backward")[: 2 if known[name].leaves else 1]:
            entry[kind] = found = measure(known[name], kind != "forward", options)
            cells = [found[key]["median"] for key in ("bare_us", "public_us", "overhead_us")]
            quartiles = f"{found['overhead_us']['lower']:.1f}–{found['overhead_us']['upper']:.1f}"
            table.add_row(f"{name}, {kind}", str(found["ops"]), *(f"{cell:.1f}" for cell in cells), quartiles)
        results["calls"][name] = entry
    Console(width=118, stderr=True).print(table)
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
