"""What this machine can run is found out right."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import tvm

from bitwright.errors import UsageError
from bitwright.targets.kernels.host import AVX2, GENERIC, Isa, detect, find, target

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="the kernel's own list of features is the oracle")
def test_avx2_is_found_where_the_kernel_lists_it() -> None:
    flags = CPUINFO.read_text().split()
    assert (detect() == AVX2) == (platform.machine() == "x86_64" and "avx2" in flags)


@pytest.mark.parametrize("isa", [AVX2, GENERIC], ids=lambda isa: isa.name)
def test_targets_are_known_to_tvm(isa: Isa) -> None:
    assert tvm.target.Target(target(isa)).kind.name == "llvm"


def test_instruction_sets_by_name() -> None:
    assert find("avx2") == AVX2
    assert find("generic") == GENERIC
    assert find("") == detect()
    with pytest.raises(UsageError, match="no instruction set 'mmx'"):
        find("mmx")
