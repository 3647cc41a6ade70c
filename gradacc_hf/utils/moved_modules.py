"""Import paths of version 0.1.0 that recipe files use. They still work, with a DeprecationWarning.

`gradacc cp` copies recipes into the projects of users, so these paths stay until version 1.0.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "gradacc_hf.contrastive": ("gradacc_hf.accumulation.gradient_cache",),
    "gradacc_hf.items": ("gradacc_hf.accumulation.loss_items",),
    "gradacc_hf.labels": ("gradacc_hf.data.columns",),
    "gradacc_hf.loop": ("gradacc_hf.training.loop", "gradacc_hf.training.finetune"),
    "gradacc_hf.tasks.joined": ("gradacc_hf.tasks.encoder_decoder",),
    "gradacc_hf.tasks.masked": ("gradacc_hf.tasks.masked_head",),
}
"""Old module path → the modules that hold its names now."""


class MovedModuleFinder:
    """Find the modules of `MOVED` under their old paths, and load them from their new paths.

    The class has no base classes, as `importlib.abc` takes 10 ms to import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old path and None for any other path."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module, not the new one: the import machinery sets attributes of the result."""
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the names of the new module, and warn of the old path."""
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(new)}", DeprecationWarning, stacklevel=2)
        for path in reversed(new):
            found = vars(importlib.import_module(path))
            module.__dict__.update({name: value for name, value in found.items() if name[:2] != "__"})


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
