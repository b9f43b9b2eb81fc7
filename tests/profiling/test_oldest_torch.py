"""C++ sources that need more than the oldest PyTorch's headers are named."""

import shutil

import pytest

from profiling import oldest_torch


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_what_the_headers_lack_is_an_error_with_its_name(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/old.h").write_text("#define OLD_CHECK(x) (x)\n")
    source = tmp_path / "source.cpp"
    source.write_text("#include <torch/old.h>\nint one() { return OLD_CHECK(1); }\n")
    assert oldest_torch.parse(source, tmp_path, ["-std=c++20"]) == ""
    source.write_text("#include <torch/old.h>\nint one() { return NEW_CHECK(1); }\n")
    assert "NEW_CHECK" in oldest_torch.parse(source, tmp_path, ["-std=c++20"])


def test_oldest_version_is_the_one_required():
    assert oldest_torch.oldest() == "2.11"
