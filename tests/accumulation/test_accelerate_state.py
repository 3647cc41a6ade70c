"""One module alone touches private or mutable state of Accelerate."""

import re

from conftest import ROOT

STATE = re.compile(
    r"_shared_state|_reset_state|(?<!self)\._(optimizers|schedulers|models)\b|plugin_kwargs|ddp_handler"
)


def test_one_module_alone_touches_the_state_of_accelerate():
    sources = {module: module.read_text(encoding="utf-8") for module in (ROOT / "gradacc_hf").rglob("*.py")}
    touching = {str(module.relative_to(ROOT)) for module, source in sources.items() if STATE.search(source)}
    assert touching == {"gradacc_hf/accumulation/accelerate_state.py"}
