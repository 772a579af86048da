"""On a CPU under glibc: keep freed memory, so that the next tensor of that size need not be faulted in page by page.

By default every large tensor is a mapping of its own, given back to the kernel when it is freed; a training step then spends
a good part of its time in page faults, more so in a virtual machine.
"""

import ctypes
import sys
from functools import cache

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


@cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator, once for this process; elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    try:
        mallopt = library.mallopt
    except AttributeError:  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_ARENA_MAX, 1)
