"""Records the kernels that tests marked gpu launch on an H100 or H200, without a GPU."""

from typing import Any
from unittest import mock

import pytest
from slotkernels._triton import Launch

from profiling.common.paths import ROOT
from profiling.gpu.launched import HOPPER, pretended

TESTS = ROOT / "tests" / "slotkernels"
# These tests compile with Inductor or create their own tensors in loops.
LEFT_OUT = "not opcheck and not compile"


class _Recorder:
    """A plugin of pytest that runs tests on tensors without data: comparisons of values always succeed."""

    def __init__(self) -> None:
        self.run, self.stopped, self.launches = 0, 0, list[Launch]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: Any) -> bool:
        """Run a test in place of pytest; most tests stop where they read a value, after their launches."""
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        with pretended(number=0.0) as recorder:  # errors are small
            try:
                pyfuncitem.obj(**arguments)
            except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                why = str(error).partition("\n")[0]
                print(f"{pyfuncitem.name}: {type(error).__name__}: {why}")
                self.stopped += 1
        self.run += 1
        self.launches += recorder.recorded
        return True


def launched_by_tests(*arguments: str) -> list[Launch]:
    """The launches of the tests in ``TESTS`` that are marked gpu, up to the point where they read a value.

    Args:
        arguments: more arguments of pytest.
    """
    recorder = _Recorder()
    capability = divmod(HOPPER.capability, 10)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.testing.assert_close"),
        mock.patch("torch.equal", return_value=True),
        mock.patch("torch.allclose", return_value=True),
    ):
        pytest.main(
            ["-q", "-s", "-p", "no:cacheprovider", "-m", "gpu", "-k", LEFT_OUT, str(TESTS), *arguments], [recorder]
        )
    print(f"{recorder.run} tests, {recorder.stopped} of them stopped early")
    return recorder.launches
