"""Helpers of several test files.

Large libraries are imported before any module of qexp: while such a module is imported, jaxtyping's
import hook keeps Python from its cache of bytecode, so that every library is compiled again.
"""

import importlib

for library in ("lightning", "scipy.stats", "transformers.models.llama.modeling_llama"):
    importlib.import_module(library)
