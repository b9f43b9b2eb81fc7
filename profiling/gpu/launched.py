"""Records the kernels that training steps and benchmarks launch on an H100 or H200, without a GPU.

Steps and benchmarks run on tensors without data, so nothing is computed. PyTorch behaves as on a GPU: backends are
chosen as for tensors on a GPU, block sizes are those for 132 multiprocessors of compute capability 9.0, and autocast
casts the same operators to float32 (layer_norm, for example). The launch code of the ops runs, and its launches are
recorded instead of executed.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from slotkernels import _backends
from slotkernels._backends import Backends
from slotkernels._triton import INTERPRETED, Device, Launch, recorded
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from interpreter.engine.step import TrainingStep
from profiling.accounting.counts import branches_of_a_gpu
from profiling.bench import BENCHMARKS, load
from profiling.bench.case import OURS
from profiling.common.setups import setup
from profiling.gpu.shipped import shipped

HOPPER = Device(90, 132)  # an H100 or H200
ON_GPU = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda", 0))  # what backends ask of a tensor
STEPS = {"train_image": "image", "train_video": "video"}
SHIPPED = "shipped"  # the launches of profiling/gpu/shipped.py
SOURCES = (*STEPS, *(name for name in BENCHMARKS if name not in STEPS), SHIPPED)
ADDRESS = 1 << 20  # address of a storage, as a kernel sees it: PyTorch aligns it to 512 bytes
# Operators that autocast widens to float32 on a GPU and leaves alone on a CPU, where the tensors without data are: of
# the lists in ATen/autocast_mode.h, those that a model may contain.
WIDENED = (
    "exp", "expm1", "log", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "softplus", "layer_norm", "native_layer_norm", "group_norm", "cosine_similarity", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "kl_div", "nll_loss", "cdist", "logsumexp", "prod", "prod.dim_int", "softmax.int",
    "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "norm.Scalar", "norm.ScalarOpt_dim", "sum",
    "sum.dim_IntList", "upsample_bilinear2d", "upsample_nearest2d",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What Triton reads of a tensor argument: the element type, and whether 16 divides the address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """Address of the first element."""
        return self.address


def pointer(tensor: Tensor) -> Pointer:
    """The replacement of a tensor; its storage is aligned, as all memory that PyTorch allocates."""
    return Pointer(tensor.dtype, ADDRESS + int(tensor.storage_offset()) * tensor.element_size())


class _OnCpu(TorchFunctionMode):
    """Create tensors on the CPU where the code asks for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(value: Any) -> Any:
            named = isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"
            return torch.device("cpu") if named else value

        return func(*map(moved, args), **{name: moved(value) for name, value in (kwargs or {}).items()})


class _OtherBackend(Exception):
    """Triton would not serve an op."""


class Launches(TorchDispatchMode):
    """Records what the project's ops launch inside.

    Args:
        number: the value of every floating-point number that the host reads; other values are 1 or true.
    """

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number, self.recorded = number, list[Launch]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.number if args[0].is_floating_point() else 1
        if func.namespace != "slotkernels" or func._schema.name not in OPDEFS:
            return func(*args, **(kwargs or {}))

        def run(op: Backends, requested: str, arguments: Any) -> Any:
            with (
                mock.patch.object(_backends, "first_tensor", return_value=ON_GPU),
                mock.patch("torch.cuda.get_device_capability", return_value=divmod(HOPPER.capability, 10)),
            ):
                if op.select(requested, arguments) != "triton":
                    raise _OtherBackend
            with self, recorded(HOPPER) as launches:
                out = op.load("triton")(arguments)
            self.add(launches)
            return out

        try:
            with mock.patch.object(Backends, "run", run):
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        except _OtherBackend:
            return func(*args, **(kwargs or {}))  # shapes and dtypes of its results

    def add(self, launches: Iterable[Launch]) -> None:
        """Keep launches, with pointers for tensors."""
        for launch in launches:
            arguments = tree_map(lambda leaf: pointer(leaf) if isinstance(leaf, Tensor) else leaf, launch.arguments)
            self.recorded.append(launch._replace(arguments=arguments))


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """Let autocast on the CPU also widen what it widens on a GPU."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    key = torch._C.DispatchKey.AutocastCPU

    def widening(op: Any) -> Callable[..., Any]:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*tree_map_only(Tensor, wide, args), **tree_map_only(Tensor, wide, kwargs))

        return run

    for name in WIDENED:
        operator, _, overload = name.partition(".")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            library.impl(name, widening(getattr(getattr(torch.ops.aten, operator), overload or "default")))
    try:
        yield
    finally:
        library._destroy()


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces ``nn.Module._apply``, which cannot convert parameters without data."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


@contextmanager
def pretended(number: float = 1.0) -> Iterator[Launches]:
    """Run the block as if on a GPU, on tensors without data; every ``number`` that it reads of them is the same.

    Raises:
        RuntimeError: if kernels are to run in Triton's interpreter.
    """
    if INTERPRETED:
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1, so nothing can be compiled; unset it")
    with ExitStack() as stack:
        for context in (branches_of_a_gpu(), autocast_of_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True)):
            stack.enter_context(context)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(_OnCpu())
        launches = stack.enter_context(Launches(number))
        called = stack.enter_context(recorded(HOPPER))  # by calls of a backend's functions, not through an op
        stack.callback(lambda: launches.add(called))
        yield launches


def step(stage: Any, preset: Any) -> list[Launch]:
    """The launches of a training step in bfloat16 autocast."""
    stage_setup = setup(stage, preset, torch.device("cpu"))
    optim = dataclasses.replace(stage_setup.task.optim, precision="bf16")
    with pretended() as launches:
        task = dataclasses.replace(stage_setup.task, model=copy.deepcopy(stage_setup.task.model), optim=optim)
        taker = TrainingStep(task, optim, torch.device("cpu"))
        taker.start(0, {})
        taker.run(tuple(torch.empty(shape) for shape in stage_setup.shapes))
    return launches.recorded


def benchmark(name: str) -> list[Launch]:
    """The launches of our own variants of a benchmark's cases on a GPU, those through Inductor left out."""
    with pretended() as launches:
        for case in load(name).cases("cuda"):
            for variant, function in case.variants.items():
                if variant.startswith(OURS) and "compiled" not in variant:
                    function(*case.inputs())
    return launches.recorded


def launched(source: str, preset: Any = "ytvis19") -> list[Launch]:
    """The launches of one of ``SOURCES``: a training step at a preset's sizes, a benchmark, or ``"shipped"``.

    Raises:
        ValueError: if there is no such source.
    """
    if source in STEPS:
        return step(STEPS[source], preset)
    if source in BENCHMARKS:
        return benchmark(source)
    if source != SHIPPED:
        raise ValueError(f"{source}: unknown source of launches, choose from {', '.join(SOURCES)}")
    launches = Launches()
    for _, call in shipped():
        with recorded(HOPPER) as calls:
            call()
        launches.add(calls)
    return launches.recorded
