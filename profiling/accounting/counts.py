"""Counts a training step's operators, launches, bytes and host waits without a GPU."""

import copy
import dataclasses
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from slotkernels._backends import Backends
from slotkernels._triton import Device, recorded
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interpreter.engine.step import TrainingStep
from interpreter.engine.task import Task
from interpreter.methods.interpreter.config import StageName
from interpreter.models.attention import attend_by_products, prefers_products
from profiling.common.paths import ROOT
from profiling.common.setups import setup

M = TypeVar("M", bound=nn.Module)

H100 = Device(90, 132)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
}


class HostWaits(TorchFunctionMode):
    """Notes each call by which Python waits for the device, and the line of this project that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            self.note(f"Tensor.{WAITS[func]}")
        elif func is Tensor.to and "cpu" in (*args[1:], kwargs.get("device")):
            self.note("Tensor.to('cpu')")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        """One wait."""
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        own = [frame for frame in own if not frame.filename.startswith(str(ROOT / "profiling"))]
        place = f" at {Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else ""
        self.waits.append(what + place)


class Counts(TorchDispatchMode):
    """Counts operators, launches and bytes of what runs inside.

    Args:
        waits: notes operators whose result, or its shape, the host has to wait for.
    """

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits
        self.operators, self.launches, self.bytes = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "slotkernels":
            return self._own(func, args, kwargs)
        name = f"{func.namespace}::{func._schema.name.split('::')[1]}"
        if torch.Tag.data_dependent_output in func.tags or _shape_depends_on_data(func, args):
            self.waits.note(name)
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1  # any value will do
        inputs, out = _tensors((args, kwargs)), func(*args, **kwargs)
        written = _tensors(
            [
                args[index] if index < len(args) else kwargs.get(argument.name)
                for index, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        )
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in storages]
        if name.split("::")[1] not in ALLOCATIONS and (new or written):
            self.operators[name] += 1
            self.bytes[name] += sum(map(_nbytes, (*inputs, *new, *written)))
        return out

    def _own(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of the project's ops: Triton kernels by their launch code, one kernel of csrc, or PyTorch's operators."""
        name, served_by = func._schema.name, set()

        def run(op: Backends, requested: str, arguments: Any) -> Any:
            backend = next(known for known in ("triton", "cuda", "reference") if known in op._backends)
            served_by.add(backend)
            if backend == "cuda":
                return func(*args, **kwargs)  # on tensors without data: its shapes
            with self, recorded(H100) as launches:
                out = op.load(backend)(arguments)
            for launch in launches:
                self._launched(launch.kernel.fn.__name__, launch.arguments)
            return out

        with mock.patch.object(Backends, "run", run):
            out = OPDEFS[name]._init_fn(*args, **kwargs)
        if "cuda" in served_by:
            self._launched(f"{name} (csrc)", (args, kwargs, out))
        return out

    def _launched(self, kernel: str, tensors: Any) -> None:
        self.launches[kernel] += 1
        self.bytes[kernel] += sum(map(_nbytes, _tensors(tensors)))


def _shape_depends_on_data(func: Any, args: Any) -> bool:
    """Whether the host has to wait for the result's shape; indexing with numbers has the shape of the numbers."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of what it repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def branches_of_a_gpu() -> Iterator[None]:
    """Attention and norms of all gradients at once as on a GPU; no other code asks for the device."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if prefers_products("cuda", q):
            return attend_by_products(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    with (
        mock.patch("interpreter.models.transformer.attend", attend),
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True),
    ):
        yield


def without_data(model: M) -> M:
    """A copy under a FakeTensorMode."""
    buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}  # copy.deepcopy copies parameters alone there
    return copy.deepcopy(model, buffers)


def count(task: Task) -> dict[str, Any]:
    """Launches, bytes and waits of one eager step; the optimiser's state exists already."""
    with ExitStack() as stack:
        stack.enter_context(branches_of_a_gpu())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        task = dataclasses.replace(task, model=without_data(task.model))
        inputs = tuple(torch.empty(shape, dtype=kind) for shape, kind in zip(task.shapes(), task.dtypes(), strict=True))
        step = TrainingStep(task, task.optim, torch.device("cpu"))
        step.start(0, {})
        for _ in range(2):
            waits = HostWaits()
            counts = Counts(waits)
            with waits, counts:
                step.run(inputs)
    return {
        "operators": counts.operators.total(),
        "own launches": dict(sorted(counts.launches.items())),
        "host waits": waits.waits,
        "bytes": counts.bytes.total(),
        "bytes of": dict(sorted(counts.bytes.items(), key=lambda pair: (-pair[1], pair[0]))),
        "calls of": dict(sorted(counts.operators.items(), key=lambda pair: (-pair[1], pair[0]))),
    }


def count_compiled(stage: StageName) -> dict[str, int]:
    """Graphs, breaks, recompilations and generated kernels of compiled steps of the demo's model on the CPU, in fp32.

    Two videos or frames a step; three steps, so that a recompilation would show.
    """
    stage_setup = setup(stage, "demo", torch.device("cpu"), batch_size=2)
    optim = dataclasses.replace(stage_setup.task.optim, precision="fp32")
    torch.compiler.reset()
    counters.clear()
    metrics.reset()
    # A graph from a cache generates no kernels, and how loops are fused depends on the number of threads.
    alike = torch._inductor.config.patch({"fx_graph_cache": False, "cpp.threads": 1})
    with alike, torch._functorch.config.patch(enable_autograd_cache=False):
        step = TrainingStep(stage_setup.task, optim, torch.device("cpu"), compiled=True)
        step.start(0, {})
        for _ in range(3):
            step.run(stage_setup.inputs())
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph breaks": sum(counters["graph_break"].values()),
        "recompilations": sum(counters["recompiles"].values()),
        "generated kernels": metrics.generated_kernel_count,
    }


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line of text for each difference between two counts."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}{key}: ")]
    return [] if old == new else [f"{where}was {old}, now {new}"]
