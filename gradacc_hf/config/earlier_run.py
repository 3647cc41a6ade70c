"""A run that `model.name` names: the new run starts from its best model.

A whole model is trained as any other model in a folder. Adapters are trained further: the base model is the
base of the earlier run, and rank, alpha, targets and kind are the adapters'. `gradacc merge RUN` writes a
whole model to start from, `RUN/merged`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SETTINGS = ("rank", "alpha", "targets")
NEW_ADAPTER_SETTINGS = {"dora": False, "rslora": False, "init": "default"}
"""Further settings, with their values in runs of 0.1.0, which do not record them."""


@dataclass(frozen=True)
class EarlierRun:
    """The run that a new run starts from.

    folder: the folder of the run.
    model: the folder of the model in it, such as best/.
    """

    folder: Path
    model: Path

    @classmethod
    def of(cls, name: str) -> "EarlierRun | None":
        """Return the run that `model.name` names, or the run of best/ or last/; None for any other model."""
        folder = Path(name).expanduser()
        if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            return cls(folder, folder / "best")
        if folder.name in ("best", "last") and (folder.parent / "config.yaml").is_file():
            return cls(folder.parent, folder)
        return None

    @property
    def has_adapters(self) -> bool:
        """Whether the run saved adapters, and not a whole model."""
        return (self.model / ADAPTER_CONFIG).is_file()

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """The settings of `model.lora` that the adapters were made with."""
        lora = self._settings["model"]["lora"]
        found = {name: lora[name] for name in ADAPTER_SETTINGS}
        found |= {name: lora.get(name, value) for name, value in NEW_ADAPTER_SETTINGS.items()}
        if found["init"] == "pissa":  # saved as plain adapters of twice the rank, with the same scale
            found |= {"init": "default", "rank": 2 * found["rank"]}
            found["alpha"] = None if found["alpha"] is None else 2 * found["alpha"]
        return found

    @property
    def base(self) -> str:
        """The name or the folder of the base model below the adapters."""
        name = self._settings["model"]["name"]
        if name.startswith("embedded:"):
            return name
        if (before := EarlierRun.of(name)) is not None and before.has_adapters:
            return before.base
        saved = json.loads((self.model / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return saved["base_model_name_or_path"]

    @property
    def origin(self) -> str:
        """The name of the model that the oldest of the earlier runs started from."""
        name = self._settings["model"]["name"]
        before = EarlierRun.of(name)
        return name if before is None else before.origin

    @property
    def _settings(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
