"""Each test runs on one thread, from one seed, with uninitialised memory full of NaN: an unwritten output fails."""

import pytest
import torch


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
    torch.compiler.reset()
