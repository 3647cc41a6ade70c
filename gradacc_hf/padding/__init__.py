"""Compute the layers of a transformers model without padding, where that is exact."""

from typing import TYPE_CHECKING

from gradacc_hf.utils.lazy import lazy_exports

__all__ = ["remove_padding", "restore_padding"]

if TYPE_CHECKING:
    from gradacc_hf.padding.removal import remove_padding, restore_padding
else:
    __getattr__, __dir__ = lazy_exports(__name__, {"remove_padding": "removal", "restore_padding": "removal"})
