"""dpojax: direct preference optimization in JAX, as pure functions on plain pytrees.

The package itself imports nothing heavy, so that ``dpojax --help`` answers at once.
"""

__version__ = "0.1.0"
