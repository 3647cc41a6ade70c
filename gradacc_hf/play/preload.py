"""Imports and data that all workers share: loaded once, by the server from which workers are forked."""

from typing import get_args

import torch

from gradacc_hf.play import session  # noqa: F401
from gradacc_hf.play.settings import Lengths
from gradacc_hf.play.toy_tasks import sentences

torch.set_num_threads(1)
for lengths in get_args(Lengths):
    sentences(lengths)
