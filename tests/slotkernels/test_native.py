"""Compiled ops that are missing or do not load: one warning, or an error with the command that builds them."""

import sys
import warnings
from importlib.machinery import ModuleSpec

import pytest
import torch
from slotkernels import _native, cluster_slots, use_backend

SLOTS = torch.randn(2, 4, 3)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(_native, "why_not_loaded", lambda library: f"slotkernels.{library} is not built (build it)")
    monkeypatch.setattr(_native, "_reasons_given", [])


def test_only_the_first_call_without_the_extension_warns(not_built):
    with pytest.warns(RuntimeWarning, match=r"slower than it could: slotkernels\._C is not built \(build it\)"):
        labels, _ = cluster_slots(SLOTS, 0.5)
    assert torch.equal(labels, cluster_slots(SLOTS, 0.5, backend="reference")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster_slots(SLOTS, 0.5)


def test_calls_that_never_use_the_extension_do_not_warn(not_built):
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


def test_a_library_that_does_not_load_is_named_with_the_remedy(monkeypatch, tmp_path):
    reason = _native.why_not_loaded("_C_of_tomorrow")
    assert "slotkernels._C_of_tomorrow is not built (install the wheel of the release" in reason
    assert "to build it, run `pip install --no-build-isolation" in reason
    (tmp_path / "_C_garbage.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr("slotkernels.__path__", [str(tmp_path)])
    reason = _native.why_not_loaded("_C_garbage")
    assert "slotkernels._C_garbage does not load" in reason
    assert torch.__version__ in reason
    assert "pip install" in reason


def test_the_library_of_another_copy_is_not_taken(monkeypatch):
    class EditableInstallation:
        def find_spec(self, name, path=None, target=None):
            return ModuleSpec(name, None, origin="/another/copy/_C_lent.abi3.so")

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, EditableInstallation()])
    assert "slotkernels._C_lent is not built" in _native.why_not_loaded("_C_lent")
