"""The measured figures, each with the command that measures it. README.md holds them.

    python -m gradacc_hf.bench exactness     # exactness.py: errors of accumulated gradients
    python -m gradacc_hf.bench speed         # throughput.py: the loop beside the dense limit
    python -m gradacc_hf.bench planning      # planning.py: time and memory of planning a window
    python -m gradacc_hf.bench balance       # balance.py: balance over processes, and what grows with data
    python -m gradacc_hf.bench lean_loss     # lean_memory.py: memory of the loss of a large vocabulary
    python -m gradacc_hf.bench memory        # predicted_memory.py: predicted beside measured memory of a step
    python -m gradacc_hf.bench budgets       # budgets.py: memory of each recipe under each budget file
    python -m gradacc_hf.bench contrastive   # sentence_transformers.py: the gradient cache beside theirs
    python -m gradacc_hf.bench recipes       # all_recipes.py: metric, baseline and time of each recipe
    python -m gradacc_hf.bench sizes         # micro_batch_size.py: the size that a run finds, and fixed ones
    python -m gradacc_hf.bench cpu           # cpu_speed.py: threads, malloc, padding, bf16, compile on a CPU
    python -m gradacc_hf.bench out_of_memory # oom.py: the same training under real memory limits
    python -m gradacc_hf.bench kills         # crash_recovery.py: a run that is killed and resumed
    python -m gradacc_hf.bench damages       # crash_recovery.py: a run whose newest checkpoint is damaged
    python -m gradacc_hf.bench schedules     # schedules.py: examples that a run needs, by sizes of windows
    python -m gradacc_hf.bench watching      # monitoring_overhead.py: cost of the noise scale and the doctor
    python -m gradacc_hf.bench play          # ui_latency.py: speed of the page of `gradacc play`

A benchmark returns a frozen result. `--json` prints the result instead of a table. Contenders of a benchmark
get the same model, the same examples in the same windows, and as many optimizer steps. A benchmark uses one
process unless it says otherwise. `gradacc compare` times other ways to accumulate.
"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
require(__name__, "report")
