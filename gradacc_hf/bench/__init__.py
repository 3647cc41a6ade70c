"""The benchmarks: `gradacc bench NAME` measures the figures in the guides.

| name | module | measures |
|---|---|---|
| exactness | `exactness.py` | errors of accumulated gradients |
| speed | `throughput.py` | time of the loop, compared with dense micro-batches |
| profile | `window_profile.py` | operators of one window, with padding and without |
| planning | `planning.py` | time and memory of planning a window |
| balance | `balance.py` | balance over processes, and growth with data and processes |
| lean_loss | `lean_memory.py` | memory of the loss of a large vocabulary |
| memory | `predicted_memory.py` | predicted and measured memory of a step |
| budgets | `budgets.py` | memory of each recipe under each budget file |
| contrastive | `sentence_transformers.py` | the gradient cache, compared with sentence-transformers |
| preference | `preference.py` | the losses of preferences, compared with TRL |
| recipes | `all_recipes.py` | metric, baseline and time of each recipe |
| sizes | `micro_batch_size.py` | the micro-batch size that a run finds, compared with fixed sizes |
| cpu | `cpu_speed.py` | threads, malloc, padding, bf16 and compilation on a CPU |
| out_of_memory | `oom.py` | the same training under real memory limits |
| kills | `crash_recovery.py` | a run that is killed and resumed |
| damages | `crash_recovery.py` | a run whose newest checkpoint is damaged |
| schedules | `schedules.py` | examples that a run needs, by size of the windows |
| watching | `monitoring_overhead.py` | cost of the noise scale and of the doctor |
| gpu | `gpu.py` | speed and memory with and without padding on a GPU; no GPU has run it yet |
| play | `ui_latency.py` | speed of the page of `gradacc play` |

A benchmark returns a frozen result. `--json` prints the result as JSON instead of a table. The contenders of
a benchmark get the same model, the same examples in the same windows, and the same number of optimizer steps.
A benchmark uses one process, unless its description states otherwise. `gradacc compare` times other ways to
train.
"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
require(__name__, "report")
