"""The heap of the C library, which keeps freed matrices for later allocations."""

import ctypes
import sys


def trim() -> None:
    """Return freed memory to the system, where the C library has a call for it (glibc): temporaries
    of one linear leave gaps that those of the next one do not fit into."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
