"""What a process sets for its computations: who else computes, where compiled programs are kept, how memory is."""

import ctypes
import sys

from dpojax import processes
from dpojax.cachedir import user_cache

RESERVE = 8 << 30  # bytes of address space; memory is taken when it is touched


def prepare() -> None:
    """Join the other processes (:func:`~dpojax.processes.start`), and keep compiled programs for the next run.

    Every command that computes calls this first.

    Compiled programs lie in ``~/.cache/dpojax/xla`` (``$XDG_CACHE_HOME`` moves it), unless JAX's own option
    ``JAX_COMPILATION_CACHE_DIR`` names another place.
    """
    import jax

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    processes.start()


def keep_memory() -> None:
    """On a CPU, ask the C library to keep freed memory and to take it in large pages.

    XLA's CPU client allocates the temporary memory of a step anew each time. The C library would get it from the
    kernel and give it back, page by page: a sixth of a step's time for SmolLM2-135M. To be called once the model is
    loaded: what was allocated before is given back as ever.
    """
    import jax

    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):  # another C library than glibc
        return
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.argtypes, madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # malloc.h: one arena for all threads (M_ARENA_MAX), no block with a mapping of its own (M_MMAP_MAX), nothing
    # given back (M_TRIM_THRESHOLD).
    for option, value in ((-8, 1), (-4, 0), (-1, -1)):
        mallopt(option, value)
    start = malloc(RESERVE)
    if not start:
        return
    page = 2 << 20
    first = -(-start // page) * page
    madvise(first, (start + RESERVE - first) // page * page, 14)  # sys/mman.h: MADV_HUGEPAGE
    free(start)
