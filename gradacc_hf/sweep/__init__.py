"""`gradacc sweep`: one run for each of several settings and seeds, with one table and one plot.

`space.py` reads the settings that vary, and `search.py` chooses points with optuna. `runs.py` trains, and
`state.py` continues a sweep, `page.py` writes the page, and `cli.py` is the command.
"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
require(__name__, "report")
