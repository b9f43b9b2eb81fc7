"""The commands keep freed memory; importing the package changes nothing, and settings of the user stay."""

import ctypes
import os
import subprocess
import sys

import pytest

from interpreter.heap import CHOSEN_BY_USER, keep_freed_memory

# Pages that the system maps while eight blocks of 4 MiB are allocated, written and freed, in each of 20 rounds.
ROUNDS = """
import resource
def pages():
    blocks = [bytearray(b"x") * 2**22 for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [pages() for _ in range(20)]
print((counts[-1] - counts[9]) // 10)
"""


def pages_of_a_round(program, **chosen):
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    command = [sys.executable, "-c", program + ROUNDS]
    return int(subprocess.run(command, capture_output=True, text=True, env=clean | chosen, check=True).stdout)


AS_COMMAND = "import sys; sys.argv[0] = 'interpreter'; import interpreter\n"  # as the installed script is called


@pytest.fixture(scope="module", autouse=True)
def gnu():
    """Skip with another C library, or where the system maps huge pages, of which few are needed."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library has no mallopt")
    if pages_of_a_round("") < 1000:
        pytest.skip("this system hands out huge pages, or keeps freed memory itself")


def test_commands_keep_freed_memory():
    assert pages_of_a_round(AS_COMMAND) < 100  # and not 8192


def test_an_import_leaves_the_memory_of_its_program_alone():
    assert pages_of_a_round("import interpreter, interpreter.heap\n") > 1000


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_the_users_choice_stays(chosen):
    assert pages_of_a_round(AS_COMMAND, **chosen) > 1000
    for name in CHOSEN_BY_USER:
        assert not keep_freed_memory({name: "1"})
