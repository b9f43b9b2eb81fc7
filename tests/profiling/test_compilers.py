"""Kernels compile with every Triton that users have."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from profiling import compilers
from profiling.gpu.resource_tables import PINNED, VERSIONS

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "slotkernels"
# Compiles one launch of each kernel and mode of Sinkhorn and prints what is wrong with it.
ONE_OF_EACH = [sys.executable, "-m", "profiling.resources", "--one-of-each", "--sm", "90", "--only"]


def test_versions_span_the_oldest_allowed_to_the_installed():
    (oldest,) = set(re.findall(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert VERSIONS[0].startswith(oldest + ".")
    assert PINNED in VERSIONS
    assert f"triton=={PINNED}\n" in (ROOT / "constraints.txt").read_text()


def calls_of_triton_in_constants(source: str) -> list[str]:
    """Lines ``NAME: tl.constexpr = tl.f(...)``, of which Triton 3.6 makes a tensor in place of a constant."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "tl.constexpr" and node.value is not None
        for call in ast.walk(node.value)
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("tl.", "triton."))
    ]


def test_no_kernel_constant_calls_a_function_of_triton():
    assert calls_of_triton_in_constants("A: tl.constexpr = tl.cdiv(B, C)")
    calls = {path: calls_of_triton_in_constants(path.read_text()) for path in KERNELS.rglob("*.py")}
    assert not {path: lines for path, lines in calls.items() if lines}


def test_one_of_each_covers_every_kernel_and_switch():
    code = """
from profiling.gpu.compile_launches import Choice, launches, mode
few, all_ = (launches(Choice("", (90,), one)) for one in (True, False))
modes = [mode(launch) for _, launch, _ in few]
assert len(modes) == len(set(modes)) < len(all_) / 2
assert set(modes) == {mode(launch) for _, launch, _ in all_}
"""
    environment = compilers.environment(None)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.fixture
def broken(tmp_path):
    """A copy of what is compiled, whose add_norm kernels do not compile."""
    for name in ("kernels", "profiling"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "sitecustomize.py").write_text(
        "import triton\n"
        "compile = triton.compile\n"
        "def broken(source, *a, **k):\n"
        "    if 'add_norm_forward' in source.fn.fn.__name__:\n"
        "        raise RuntimeError('tensor, not a constant')\n"
        "    return compile(source, *a, **k)\n"
        "triton.compile = broken\n"
    )
    return tmp_path


@pytest.mark.slow
def test_a_launch_that_fails_to_compile_stops_no_other(broken):
    environment = compilers.environment(broken)
    command = [*ONE_OF_EACH, "add_norm", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr
    assert failed[0].endswith("add_norm_forward_kernel: RuntimeError: tensor, not a constant")
    assert len(failed) == 2  # bfloat16 and float32
    assert len(lines) > 2
    assert "2 launches do not compile, spill or do not fit" in done.stderr


def test_faults_of_a_version_fail_the_command(monkeypatch, capsys):
    outputs = {
        "3.6.0": (1, "a row  0.5\nerror: sm_90 sinkhorn: no constant\nb row  8 bytes are spilled\n"),
        "3.7.1": (1, "a row  0.5\n"),  # an old Triton that cannot even start
        "3.9.0": (0, "a row  0.5\n"),
    }
    monkeypatch.setattr(compilers, "install", lambda version: Path("/triton") / version)

    def run(command, env, **options):
        code, printed = outputs[Path(env["PYTHONPATH"].split(os.pathsep)[0]).name]
        return subprocess.CompletedProcess(command, code, printed, "no such module" if code else "")

    monkeypatch.setattr(compilers.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["compilers"])
    with pytest.raises(SystemExit, match=r"faults with triton 3\.6\.0: 2, triton 3\.7\.1: 1$"):
        compilers.main()
    printed = capsys.readouterr().out
    assert "triton 3.6.0: 2 launches" in printed
    assert "  error: sm_90 sinkhorn: no constant\n" in printed
    assert "  no such module\n" in printed


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_sinkhorn_compiles_without_a_spill(version):
    """The kernel that is nearest to spilling; `make compilers` compiles the others, too."""
    folder = compilers.folder_of(version)
    if folder is not None and not folder.exists():
        pytest.skip(f"triton {version} is not in {folder}: run `make compilers`")
    command = [*ONE_OF_EACH, "sinkhorn forward B512 N128 M128", "--workers", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=compilers.environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sinkhorn_kernel") == 5
