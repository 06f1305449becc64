"""Objects that tables name as ``module:name``, imported when they are asked for, so that the tables are light."""

import importlib
from typing import Any


def loaded(name: str) -> Any:
    """Return the object that ``name`` ("module:name") names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
