"""KeOps as a backend: its results, its trial on a GPU, its absence, and processes that compile at the same time.

KeOps compiles its formulas (some 6 s each) when its cache in ~/.cache is cold.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence
from slotkernels.sinkhorn.op import make_problem
from slotkernels.sinkhorn.streaming import STREAMING, keops
from torch._subclasses import FakeTensorMode

from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, tensorized, weights

needs_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None, reason="pykeops is not installed: pip install pykeops"
)


def problem_of(x, y):
    return make_problem("test", x, y, p=2, blur=0.05, scaling=0.5, diameter="batch")


@needs_keops
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
def test_keops_equals_geomloss_in_value_and_gradient(p, debias):
    x, y = points(2, 33, 20)
    a, b = weights(2, 33), weights(2, 20)
    options = {"p": p, "debias": debias}
    ours = partial(SamplesLoss, **options, backend="keops")
    assert_same_loss(ours(), tensorized(**options), a, x, b, y)
    a, b = a.detach(), b.detach()
    assert_same_potentials(ours(potentials=True), tensorized(**options, potentials=True), a, x, b, y)


@needs_keops
def test_keops_in_lower_precision_stays_near_the_float64_oracle():
    def tolerance(name, tensor):
        return 1e-5 if name == "value" else 1e-3 + 2**-7

    # Distances are float32 here: 1e-6 at costs of 10, which eps = 0.0025 makes 4e-4 of a plan.
    ours = partial(sinkhorn_divergence, backend="keops")
    assert_same_loss(ours, tensorized(), *points(2, 33, 20, dtype=torch.bfloat16), tolerance=tolerance)


def test_missing_pykeops_raises_by_name_but_not_for_auto(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pykeops" else find(name))
    keops._why_not_imported.cache_clear()
    x, y = points(1, 4, 5)
    try:
        with pytest.raises(RuntimeError, match="pykeops is not installed: pip install pykeops"):
            sinkhorn_divergence(x, y, backend="keops")
        assert STREAMING.select("auto", problem_of(x, y)) == "blocks"
    finally:
        keops._why_not_imported.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A call that behaves as on a GPU; ``on_gpu.trial(code)`` sets the code of the child process."""
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU/2")
    monkeypatch.setattr(metadata, "version", lambda name: "2.3")
    imports = []
    monkeypatch.setattr(keops, "_why_not_imported", lambda: imports.append("pykeops"))
    monkeypatch.setattr(keops, "_why_not_found", lambda device: None)

    def trial(code):
        keops._why_not_on_gpu.cache_clear()
        monkeypatch.setattr(keops, "_TRIAL", code)

    with FakeTensorMode():
        x = torch.empty(1, 1, 1, device="cuda")
    yield SimpleNamespace(problem=problem_of(x, x), trial=trial, imports=imports)
    keops._why_not_on_gpu.cache_clear()


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"died by signal 11 \(Segmentation fault\)"),
        ("import sys; sys.exit('one line\\nno libcuda')", "failed: no libcuda"),
        ("import sys; sys.exit(3)", "failed: exit status 3"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
    ids=["crash", "error", "silent", "hang"],
)
def test_keops_failure_on_gpu_falls_back_to_blocks(code, failure, on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(keops, "_TRIAL_SECONDS", 1 if "sleep" in code else 60)
    on_gpu.trial(code)
    with pytest.warns(RuntimeWarning, match=failure):
        assert STREAMING.select("auto", on_gpu.problem) == "blocks"
    versions = rf"pykeops 2.3, torch {torch.__version__}, CUDA {torch.version.cuda}".replace("+", r"\+")
    reason = rf"KeOps cannot compute on Toy GPU/2: .*{failure} \({versions}\)\. backend='blocks' .*check_health"
    with pytest.raises(RuntimeError, match=reason):
        STREAMING.select("keops", on_gpu.problem)
    assert not on_gpu.imports  # which could crash too
    assert not list(tmp_path.iterdir())  # failure is not remembered: the next process tries again
    on_gpu.trial("")
    assert STREAMING.select("auto", on_gpu.problem) == "keops"


def test_keops_success_on_gpu_is_cached_by_version_and_device(on_gpu, monkeypatch):
    lock = "os.environ['KEOPS_CACHE_FOLDER'] + '/slotkernels_keops.lock'"  # free: the child takes it
    monkeypatch.setattr(keops, "_TRIAL_SECONDS", 20)
    on_gpu.trial(f"import fcntl, os; fcntl.flock(open({lock}, 'w'), fcntl.LOCK_EX)")
    assert STREAMING.select("keops", on_gpu.problem) == "keops"
    on_gpu.trial("import sys; sys.exit('a second child')")
    assert STREAMING.select("keops", on_gpu.problem) == "keops"
    changes = [(metadata, "version", lambda name: "2.4"), (torch, "__version__", "9.0")]
    for owner, name, value in [*changes, (torch.cuda, "get_device_name", lambda device: "Other GPU")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keops._why_not_on_gpu.cache_clear()
            with pytest.warns(RuntimeWarning, match="failed: a second child"):
                assert STREAMING.select("auto", on_gpu.problem) == "blocks"


def test_unwritable_cache_folder_falls_back_to_blocks(on_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="was not started .*File exists"):
        assert STREAMING.select("auto", on_gpu.problem) == "blocks"


@needs_keops
@pytest.mark.parametrize("sums", ["8", "9"])
def test_trial_process_reports_wrong_sums(sums, monkeypatch):
    """The child's own program, on the CPU."""
    monkeypatch.setattr(keops, "_TRIAL", keops._TRIAL.replace("zeros + 8", f"zeros + {sums}"))
    failure = keops._trial(torch.device("cpu"))
    assert failure == (None if sums == "8" else f"failed: sums of 8 came out as {[8.0] * 8}")


@needs_keops
@pytest.mark.gpu
def test_keops_equals_blocks_on_gpu_or_names_the_reason():
    x, y = (t.detach().cuda() for t in points(2, 33, 20))
    problem = problem_of(x, y)
    expected = STREAMING.apply(problem, "blocks")[:3]
    keops._why_not_on_gpu.cache_clear()
    if keops.why_not(problem) is None:
        torch.testing.assert_close(STREAMING.apply(problem, "keops")[:3], expected, rtol=1e-9, atol=1e-10)
        return
    torch.testing.assert_close(STREAMING.apply(problem, "auto")[:3], expected)
    with pytest.raises(RuntimeError, match="KeOps cannot compute on"):
        STREAMING.apply(problem, "keops")


def test_keops_waits_for_the_stream_of_the_tensors_device(monkeypatch):
    class Stream:
        waited = False

        def synchronize(self):
            self.waited = True

    streams = {index: Stream() for index in range(2)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams[0])
    keops.synchronize(torch.device("cuda:0"))
    keops.synchronize(torch.device("cuda:1"))
    assert [stream.waited for stream in streams.values()] == [False, True]


def python(code, **environment):
    command = [sys.executable, "-c", code]
    roots = [str(Path(__file__).parents[2] / "kernels")]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_pykeops_is_imported_on_demand_only():
    code = (
        "import sys, torch, slotkernels\n"
        "slotkernels.sinkhorn_divergence(torch.rand(1, 1100, 2), torch.rand(1, 9, 2), diameter=1.0, blur=0.9)\n"
        "print('pykeops' in sys.modules)"
    )
    out, errors = python(code).communicate()
    assert out == "False\n", errors


@needs_keops
@pytest.mark.slow
def test_processes_compile_side_by_side_in_silence(tmp_path):
    """An empty cache and two processes at once: neither reads a partial file, and only the result is printed."""
    code = (
        "import torch, slotkernels\n"
        "x = torch.arange(12.).view(1, 4, 3).requires_grad_()\n"
        "value = slotkernels.sinkhorn_divergence(x, x.detach() ** 2 / 9, backend='keops')\n"
        "value.sum().backward()\n"
        "print(round(value.item(), 3), round(x.grad.sum().item(), 3))"
    )
    processes = [python(code, KEOPS_CACHE_FOLDER=str(tmp_path)) for _ in range(2)]
    results = [process.communicate() for process in processes]
    assert results[0][0] == results[1][0], results
    assert len(results[0][0].split()) == 2, results
