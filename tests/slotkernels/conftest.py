"""Each test runs on one thread, from one seed, with uninitialised memory full of NaN: an unwritten output fails."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    # In the interpreter of Triton 3.7.1, a constant times a tensor is a constant that holds a tensor, which it then
    # refuses; 3.9.0 takes it, and so do the compilers of all versions.
    from triton.language import constexpr
    from triton.language.semantic import TritonSemantic

    _to_tensor = TritonSemantic.to_tensor

    def _to_tensor_unwrapped(self, x, check_type=True):
        is_tensor = isinstance(x, constexpr) and isinstance(x.value, self.tensor)
        return _to_tensor(self, x.value if is_tensor else x, check_type)

    TritonSemantic.to_tensor = _to_tensor_unwrapped


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = (
        True  # training, in another test of this process, turns it off
    )
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_num_threads(threads)
