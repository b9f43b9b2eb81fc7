"""A training step as one CUDA graph."""

from collections.abc import Callable

import torch
from slotkernels.ranges import annotate
from torch import Tensor

EAGER_STEPS = 11  # steps before a graph is captured: kernels are compiled, buffers allocated (DDP needs 11)


class StepGraph:
    """A function of tensors on a GPU, replayed as one CUDA graph.

    From the first call on, each batch is copied into tensors that the graph owns. So inputs must keep their shapes and
    dtypes; strides may change. The first ``EAGER_STEPS`` calls run eagerly, and the next one captures the function.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.calls = function, 0
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def run(self, batch: tuple[Tensor, ...]) -> None:
        """Compute the function, or replay the graph.

        Raises:
            ValueError: if shapes or dtypes differ from those of the first batch; names the input.
        """
        self.calls += 1
        if self.side is None:
            # A capture needs a side stream, and warm-up should run on the stream that is captured. Always use the same
            # one: the caching allocator keeps free memory per stream, so a new stream would allocate everything again.
            self.side = torch.cuda.Stream()
            self.inputs = own_tensors(batch)
        check_same_inputs(self.inputs, batch)
        for own, new in zip(self.inputs, batch, strict=True):
            own.copy_(new)
        if self.calls <= EAGER_STEPS:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.side)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": threads of a loader may allocate and copy during the capture.
            capture = torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local")
            with annotate("graph capture"), capture:
                self.function(*self.inputs)
        with annotate("graph replay"):
            self.graph.replay()


def own_tensors(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous tensors that each batch is copied into.

    torch.compile compiles a function again if strides change, which a capture does not allow. So eager steps use these
    tensors too, instead of a batch that may hold slices or broadcast tensors.
    """
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in batch)


def check_same_inputs(captured: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> None:
    """Raise ValueError for the first input of a batch whose shape or dtype differs from the captured step."""
    for index, (old, new) in enumerate(zip(captured, batch, strict=True)):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(
                f"input {index} of the step is {list(new.shape)} {new.dtype}, but the step was captured in a CUDA "
                f"graph with {list(old.shape)} {old.dtype}; give batches of one size, or train with --no-cuda-graph"
            )
