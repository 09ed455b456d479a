"""gendist: fit, evaluate and serve classic generative models on a Ray cluster.

Importing the package loads neither torch nor ray; the names below load what they need when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gendist.errors import UserError
    from gendist.fitted_model import load
    from gendist.fitting import Run, fit

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "__version__", "fit", "load"]

_HOME = {
    "fit": "gendist.fitting",
    "Run": "gendist.fitting",
    "load": "gendist.fitted_model",
    "UserError": "gendist.errors",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gendist' has no attribute {name!r}")
