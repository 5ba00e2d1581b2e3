"""The name of `prunus.runtime` up to version 0.3.0, for programs and pickled models with it."""

import sys
from importlib import import_module

# The modules whose classes a pickled model holds, and those that the documentation named.
for _module in (
    "blocks", "description", "fast_decoding", "linear", "operators", "quantizer", "weight",
):  # fmt: skip
    sys.modules[f"{__name__}.{_module}"] = import_module(f"prunus.runtime.{_module}")
sys.modules[__name__] = import_module("prunus.runtime")
