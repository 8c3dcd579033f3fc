"""Freed memory stays with the process: the system has fewer pages to hand out again."""

import os
import platform
import subprocess
import sys

import pytest

from mmgrpo.trainer import memory

CHURN = """
import ctypes, resource, sys
from mmgrpo.trainer.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = 2**22
for _ in range(3):
    before = faults()
    for _ in range(20):
        blocks = [libc.malloc(size) for _ in range(6)]
        for block in blocks:
            libc.memset(block, 1, size)
        for block in reversed(blocks):  # the free memory then lies at the end of the heap
            libc.free(block)
print(faults() - before)
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def page_faults(how):
    """Of a process in which glibc does not adapt its limits by itself."""
    limits = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", CHURN, how],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_process_that_keeps_its_memory_asks_for_it_once():
    assert page_faults("keep") < page_faults("give back") / 20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # would fail if it were called
    assert not memory.keep_freed_memory()
