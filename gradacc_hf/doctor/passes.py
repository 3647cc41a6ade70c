"""Count passes over the training data, from the iterations over loaders."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader

from gradacc_hf.doctor.frames import StartedLoader
from gradacc_hf.doctor.record import LoopRecord


@dataclass(frozen=True)
class Progress:
    """The position of the loop in a pass over the training data.

    batches: batches of this pass so far.
    length: batches of a pass; None if unknown.
    ends_short: whether the last batch of a pass has fewer examples.
    is_at_end: whether the pass is complete.
    """

    batches: int = 0
    length: int | None = None
    ends_short: bool = False
    is_at_end: bool = False


class DataPasses:
    """Counts passes over the training data.

    The training loader is the loader that started last, of all loaders that gave a batch before the first
    backward. A pass begins when this loader, or another in its place, gives the first batch of an iteration.
    """

    def __init__(self, record: LoopRecord, started: Sequence[StartedLoader]):
        self._record = record
        self._started = [(each, 0) for each in started]  # with the batches so far
        self._training: StartedLoader | None = None
        self._number = 0

    def loader_started(self, loader: StartedLoader) -> None:
        """An iteration over a loader begins."""
        self._started.append((loader, 0))

    def number(self) -> int:
        """Passes begun so far; 0 without a loader. Called at each backward."""
        advanced, restarted, going_on = [], False, []
        for index, (started, before) in enumerate(self._started):
            if started.batches != before:
                advanced.append(started)
                going_on += [started] if before and started is not self._training else []
                restarted |= started is self._training and started.batches < before  # a persistent iterator
            self._started[index] = started, started.batches
        if self._training in advanced:
            self._number += restarted
        elif advanced:
            if self._training is None or not going_on:
                self._begin(advanced[-1])
            else:  # one of several loaders begins again, not the data
                self._record.has_several_loaders = True
            self._training = advanced[-1]
        elif self._training is None and self._started:
            self._begin(self._started[-1][0])
        in_use = {id(each) for each in advanced} | {id(self._training)}
        self._started = [pair for pair in self._started if id(pair[0]) in in_use or _is_underway(pair[0])]
        return self._number

    def _begin(self, started: StartedLoader) -> None:
        self._training = started
        self._number += 1
        self._record.is_stream = self._record.is_stream or started.is_stream
        try:
            self._record.pass_lengths.append(len(started.loader))
        except TypeError:  # a stream has no length
            self._record.pass_lengths.append(None)

    def progress(self) -> Progress:
        """The position of the loop in the current pass."""
        lengths, training = self._record.pass_lengths, self._training
        if training is None or not lengths or lengths[-1] is None:
            return Progress()
        batches, length = training.batches, lengths[-1]
        # Accelerate's loader fetches one batch ahead, and states itself when the last one is in use.
        is_at_end = getattr(training.loader, "end_of_dataloader", batches >= length)
        return Progress(batches, length, _ends_short(training.loader), bool(is_at_end))


def _is_underway(started: StartedLoader) -> bool:
    try:
        return 0 < started.batches < len(started.loader)
    except TypeError:
        return started.batches > 0


def _ends_short(loader: DataLoader) -> bool:
    size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    return isinstance(size, int) and not loader.drop_last and len(loader.dataset) % size > 0  # type: ignore[arg-type]
