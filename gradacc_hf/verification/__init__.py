"""Verify that accumulation is exact for a model and its data, and find the reason if it is not."""

from typing import TYPE_CHECKING

from gradacc_hf.utils.lazy import lazy_exports

__all__ = ["Reason", "Verification", "print_verification", "verify"]

if TYPE_CHECKING:
    from gradacc_hf.verification.causes import Reason
    from gradacc_hf.verification.exactness import Verification, verify
    from gradacc_hf.verification.table import print_verification
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "Reason": "causes",
            "Verification": "exactness",
            "print_verification": "table",
            "verify": "exactness",
        },
    )
