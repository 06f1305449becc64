"""The C library's allocator, told to keep what it has."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of giving it back to the system.

    By default every large tensor is mapped, zeroed page by page and unmapped again, at each step; on a CPU that costs
    about a quarter of a training step (half of it with large batches). Elsewhere than on Linux with glibc this does
    nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
