"""The formats of exported programs, and how each is loaded again to check it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.export import ExportedProgram

from interpreter.export.trace import Run
from interpreter.methods.programs import Program

Format = Literal["torch", "onnx", "aoti"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".aoti.pt2"}


class NoCounterpartError(Exception):
    """A format cannot express an operation. The message is one line."""


def require_packages(formats: tuple[Format, ...]) -> None:
    """Refuse formats whose packages are not installed.

    Raises:
        ValueError: if one is missing. The message says how to install it.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if not formats:
        raise ValueError(f"--format needs at least one of {', '.join(FORMATS)}")
    if "onnx" in formats and missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}: pip install 'interpreter-slots[export]', or leave onnx out"
        )


def write(kind: Format, traced: ExportedProgram, program: Program, path: Path) -> Run:
    """Write a traced program, and load it again. Returns a function that calls the loaded program.

    Raises:
        NoCounterpartError: if the format cannot express it. Nothing is written then.
        ValueError: if it cannot be compiled.
        OSError: if the file cannot be written.
    """
    if kind == "torch":
        buffer = BytesIO()  # PyTorch's own writer ends the process if the disk is full
        torch.export.save(traced, buffer)
        path.write_bytes(buffer.getbuffer())
        return _as_list(torch.export.load(path).module())
    if kind == "onnx":
        return _write_onnx(traced, program, path)
    return _write_aoti(traced, program, path)


def _write_onnx(traced: ExportedProgram, program: Program, path: Path) -> Run:
    import onnxruntime

    with _quiet():
        try:
            made = torch.onnx.export(
                traced, input_names=[*program.inputs], output_names=[*program.outputs], dynamo=True, verbose=False
            )
        except (torch.onnx.OnnxExporterError, NotImplementedError) as error:
            raise NoCounterpartError(_first_cause(error)) from error
        assert made is not None
        made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(program.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def _write_aoti(traced: ExportedProgram, program: Program, path: Path) -> Run:
    # Users can read it with get_metadata(): the shape of each input, such as "4 T N 192".
    shapes = {name: " ".join(map(str, program.shape(name))) for name in program.inputs}
    with _quiet():
        buffer = BytesIO()
        try:
            torch._inductor.aoti_compile_and_package(
                traced, package_path=buffer, inductor_configs={"aot_inductor.metadata": shapes}
            )
        except InductorError as error:
            raise ValueError(
                f"AOTInductor cannot compile {program.name}: {_first_cause(error)}. It needs a C++ compiler: "
                "apt install g++, or name one by the environment variable CXX"
            ) from error
        path.write_bytes(buffer.getbuffer())
        return _as_list(torch._inductor.aoti_load_package(str(path)))


def _as_list(module: object) -> Run:
    def run(*inputs: Tensor) -> list[Tensor]:
        found = module(*inputs)  # type: ignore[operator]
        return list(found) if isinstance(found, (tuple, list)) else [found]

    return run


def _first_cause(error: BaseException) -> str:
    """The first line of the original error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without the notes that exporters print for their developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
