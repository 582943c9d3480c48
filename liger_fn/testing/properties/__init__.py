"""What must hold for every op, derived from its spec; importing this fills `PROPERTIES`."""

import importlib

from liger_fn.testing.properties.registry import (
    PROPERTIES,
    NotApplicable,
    Property,
    Trial,
    trials,
)

__all__ = ["PROPERTIES", "NotApplicable", "Property", "Trial", "trials"]

# In the order of the report.
for _module in ("words", "values", "autograd", "transforms", "compiler", "cuda"):
    importlib.import_module(f"{__name__}.{_module}")
