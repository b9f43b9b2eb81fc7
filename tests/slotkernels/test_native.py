import warnings

import pytest
import torch
from slotkernels import _native, cluster_slots, use_backend

SLOTS = torch.randn(2, 4, 3)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(_native, "why_not_loaded", lambda library: f"slotkernels.{library} is not built (build it)")
    monkeypatch.setattr(_native, "_reasons_given", [])


def test_the_first_call_that_misses_the_extension_warns_and_no_other(not_built):
    with pytest.warns(RuntimeWarning, match=r"slower than it could: slotkernels\._C is not built \(build it\)"):
        labels, _ = cluster_slots(SLOTS, 0.5)
    assert torch.equal(labels, cluster_slots(SLOTS, 0.5, backend="reference")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster_slots(SLOTS, 0.5)


def test_nothing_warns_that_would_not_have_used_the_extension(not_built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster_slots(SLOTS.double(), 0.5)
        cluster_slots(SLOTS, 0.5, backend="reference")
        with use_backend("reference"):
            cluster_slots(SLOTS, 0.5)


def test_asking_for_it_by_name_says_how_to_build_it(not_built):
    with pytest.raises(RuntimeError, match=r"'cpp' cannot .* not built \(build it\)"), pytest.warns(RuntimeWarning):
        cluster_slots(SLOTS, 0.5, backend="cpp")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot .* tensors on cpu"):
        cluster_slots(SLOTS, 0.5, backend="cuda")


def test_a_library_that_is_missing_or_does_not_load_is_named_with_the_remedy(monkeypatch, tmp_path):
    assert "slotkernels._C_of_tomorrow is not built (`pip install" in _native.why_not_loaded("_C_of_tomorrow")
    (tmp_path / "_C_garbage.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr("slotkernels.__path__", [str(tmp_path)])
    reason = _native.why_not_loaded("_C_garbage")
    assert "slotkernels._C_garbage does not load" in reason
    assert torch.__version__ in reason
    assert "pip install" in reason
