"""``Op``: its schema and its gradient follow from the annotations of its arguments, nested ones in order."""

import itertools
import sys
import types
from typing import NamedTuple

import pytest
import torch
from slotkernels._op import Op, Saved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Arguments(NamedTuple):
    x: Tensor
    shift: Tensor | None
    factor: float


class Results(NamedTuple):
    product: Tensor
    size: Tensor


class BackwardArguments(NamedTuple):
    grad: Tensor
    forward: Arguments
    needs: list[bool]


NAMES = (f"toy_{number}" for number in itertools.count())


def make(monkeypatch, **options):
    """The op ``factor * x + shift`` with one backend, and the arguments of the backend's calls."""
    name, calls = next(NAMES), []

    def empty(arguments: Arguments) -> Results:
        return Results(torch.empty_like(arguments.x), arguments.x.new_empty(1))

    def empty_gradients(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
        shift = arguments.forward.shift
        return torch.empty_like(arguments.grad), arguments.grad.new_empty(0 if shift is None else shift.shape)

    def forward(arguments):
        calls.append(arguments)
        product = arguments.factor * arguments.x
        return Results(product if arguments.shift is None else product + arguments.shift, product.new_ones(1))

    def backward(arguments):
        calls.append(arguments)
        shift = arguments.forward.shift
        return arguments.forward.factor * arguments.grad, arguments.grad.new_empty(
            0
        ) if shift is None else arguments.grad.clone()

    module = types.ModuleType(f"{name}_reference")
    setattr(module, name, forward)
    setattr(module, f"{name}_backward", backward)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    op = Op(name, empty, **options)
    op.add("reference", module.__name__)
    op_backward = op.backward_op(empty_gradients)

    @op.differentiable(constant=("size",))
    def gradients(saved: Saved[Arguments, Results], grad, _):
        return op_backward.apply(BackwardArguments(grad, saved.arguments, saved.needs), saved.backend)

    return op, op_backward, calls


def test_schema_lists_nested_arguments_in_order(monkeypatch):
    op, op_backward, _ = make(monkeypatch)
    schema = str(getattr(torch.ops.slotkernels, op.function).default._schema)
    assert schema.endswith("(Tensor x, Tensor? shift, float factor, str backend) -> (Tensor, Tensor)")
    schema = str(getattr(torch.ops.slotkernels, op_backward.function).default._schema)
    arguments = "Tensor grad, Tensor forward_x, Tensor? forward_shift, float forward_factor, bool[] needs, str backend"
    assert schema.endswith(f"({arguments}) -> (Tensor, Tensor)")


@pytest.mark.parametrize("with_shift", [False, True])
def test_backends_get_the_arguments_as_they_were_given(monkeypatch, with_shift):
    op, _, calls = make(monkeypatch)
    x = torch.randn(3, requires_grad=True)
    shift = torch.randn(3, requires_grad=True) if with_shift else None
    results = op(Arguments(x, shift, 2.0))
    assert isinstance(results, Results)
    results.product.sum().backward()
    assert [type(call) for call in calls] == [Arguments, BackwardArguments]
    assert calls[0].shift is None or torch.equal(calls[0].shift, shift)
    assert calls[1].forward.factor == 2.0
    assert calls[1].needs == [True, with_shift]
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert not with_shift or torch.equal(shift.grad, torch.ones(3))


def test_opcheck_and_fullgraph_compilation(monkeypatch):
    op, *_ = make(monkeypatch)
    x, shift = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.slotkernels, op.function), (x, shift, 2.0, "reference"))
    compiled = torch.compile(lambda x, s: op(Arguments(x, s, 2.0)).product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, shift), 2 * x + shift)


def test_check_runs_before_the_op(monkeypatch):
    def check(arguments):
        raise ValueError(f"factor={arguments.factor}")

    op, _, calls = make(monkeypatch, check=check)
    with pytest.raises(ValueError, match=r"factor=2\.0"):
        op(Arguments(torch.zeros(3), None, 2.0))
    assert not calls


def test_contiguous_ops_get_contiguous_tensors(monkeypatch):
    op, _, calls = make(monkeypatch, contiguous=True)
    op(Arguments(torch.randn(4, 3).t(), None, 2.0))
    assert calls[0].x.is_contiguous()


def test_second_derivative_is_refused_or_composite(monkeypatch):
    op, *_ = make(monkeypatch)
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(op(Arguments(x, None, 2.0)).product.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name}: .*cannot be differentiated a second time"):
        torch.autograd.grad(grad.sum(), x)
    op.composite(lambda arguments: (arguments.factor * arguments.x,))
    (grad,) = torch.autograd.grad(op(Arguments(x, None, 2.0)).product.pow(2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], torch.full((3,), 8.0))
    assert torch.equal(torch.func.jvp(lambda x: op(Arguments(x, None, 2.0))[0], (x,), (x,))[1], 2 * x)


def test_the_dispatcher_is_passed_over_where_nothing_observes(monkeypatch):
    op, op_backward, calls = make(monkeypatch)

    def results():
        x = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        product = op(Arguments(x, None, 2.0)).product
        return product.detach(), *torch.autograd.grad(product.square().sum(), x)

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    with Recording():
        expected = results()
    both = [f"slotkernels.{name}.default" for name in (op.function, op_backward.function)]
    assert [name for name in seen if name.startswith("slotkernels")] == both
    with torch.profiler.profile() as profile:
        results()
    assert {f"slotkernels::{op.function}", f"slotkernels::{op_backward.function}"} <= {e.key for e in profile.events()}
    monkeypatch.setattr(op, "_registered", None)
    monkeypatch.setattr(op_backward, "_registered", None)
    assert all(map(torch.equal, results(), expected))
    assert len(calls) == 6


def test_tensors_without_memory_and_subclasses_reach_the_dispatcher(monkeypatch):
    op, _, calls = make(monkeypatch)
    assert op(Arguments(torch.randn(3, device="meta"), None, 2.0)).product.is_meta
    with FakeTensorMode():
        fake = torch.randn(3)
    assert isinstance(op(Arguments(fake, None, 2.0)).product, FakeTensor)
    assert not calls
