"""Imported by the server that workers are forked from: all that they have in common, once."""

import torch

from gradacc_hf.play import session  # noqa: F401
from gradacc_hf.play.problems import sentences

torch.set_num_threads(1)
sentences("equal"), sentences("long-tailed")
