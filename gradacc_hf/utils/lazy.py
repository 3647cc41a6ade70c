"""Lazy exports of a package: each loads its module at its first use, as in transformers and TRL."""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, modules: Mapping[str, str], renamed: Mapping[str, str] = {}
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    The package assigns them only at run time: to a type checker, a module with a `__getattr__` has every
    name. Editors read the exports from the imports under `TYPE_CHECKING`.

    Args:
        package: `__name__` of the package, whose `__all__` are the public names.
        modules: export → the module that defines it, relative to the package.
        renamed: export of version 0.1.0 → the export that replaces it. Its use gives a DeprecationWarning.
    """

    def __getattr__(name: str) -> object:
        if name in renamed:
            message = f"{package}.{name} is now {package}.{renamed[name]}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(sys.modules[package], renamed[name])
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        export = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, export)
        return export

    def __dir__() -> list[str]:
        names = vars(sys.modules[package])
        return sorted({*names["__all__"], *(name for name in names if name.startswith("__"))})

    return __getattr__, __dir__
