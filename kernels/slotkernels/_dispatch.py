"""The former way to dispatch an op. To be removed with the last op that uses it; see ``_op.py``."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backends import (  # noqa: F401
    Backends,
    KernelBuildError,
    check_name,
    requested_backend,
    use_backend,
    why_not_triton,
    without_autocast,
)


class Call(NamedTuple):
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def device(self) -> torch.device:
        return next(t for t in self.tensors if t is not None).device


class Op(Backends):
    def load(self, requested: str, call: Call) -> ModuleType:  # type: ignore[override]
        return importlib.import_module(self._backends[self.select(requested, call)][0])

    def run(self, requested: str, call: Call, function: str, *args: Any) -> Any:  # type: ignore[override]
        return _Function(self, function, args).run(requested, call)


class _Function(Backends):
    def __init__(self, op: Op, function: str, args: tuple[Any, ...]) -> None:
        super().__init__(op.name, function, like=op)
        self.args = args

    def load(self, backend: str) -> Any:
        function = super().load(backend)
        return lambda call: function(*self.args)
