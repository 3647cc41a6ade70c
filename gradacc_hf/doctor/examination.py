"""Examine each completed window: compare it with one large batch, and decide whether to observe more.

The first windows are compared, within a budget of work. If a pass over the data ends in a partial window,
that window is compared as well.
"""

from gradacc_hf.doctor.gradients import Subject
from gradacc_hf.doctor.observer import Attention
from gradacc_hf.doctor.packed_rows import change_of_later_examples
from gradacc_hf.doctor.passes import Progress
from gradacc_hf.doctor.record import LoopRecord, ObservedWindow, WindowComparison
from gradacc_hf.doctor.reference import LossOf, compare_window, work

MAX_WORK_RATIO = 1.7  # comparisons over observed windows, in work; with the other costs it stays below 2


class Examination:
    """Compares windows of a record with references, within a budget of work.

    windows: number of windows to compare.
    to_end: whether to observe the end of a pass over the data as well.
    """

    def __init__(
        self, subject: Subject, record: LoopRecord, windows: int, loss_fn: LossOf | None, to_end: bool
    ):
        self._subject, self._record, self._to_end = subject, record, to_end
        self._windows, self._loss_fn = windows, loss_fn
        self._loop_work = self._comparison_work = 0.0

    def examine(self, window: ObservedWindow, progress: Progress) -> Attention:
        """Compare the latest window of the record if the budget allows, and return how to continue."""
        self._compare(window, progress)
        forward = window.micro_batches[0].forward
        if len(self._record.windows) == 1 and forward is not None:
            change = change_of_later_examples(self._subject, forward.inputs)
            self._record.mixed_rows = change, forward.place
        return self._next(window, progress)

    def _is_at_end(self, window: ObservedWindow, progress: Progress) -> bool:
        return progress.is_at_end or len(window) < self._longest()

    def _longest(self) -> int:
        return max(map(len, self._record.windows))

    def _compare(self, window: ObservedWindow, progress: Progress) -> None:
        seen = len(self._record.windows)
        of_loop, at_once = work(window)
        self._loop_work += of_loop
        expected = self._comparison_work + of_loop + at_once / 3  # a forward is a third of a step
        to_come = max(0, self._windows - seen) * of_loop
        is_affordable = expected <= MAX_WORK_RATIO * (self._loop_work + to_come)
        if seen == 1 and not is_affordable:
            times = f"{at_once / of_loop:.0f} × the work, mostly padding"
            window.comparison = WindowComparison(why_not=f"the window in one batch would be {times}")
        elif not is_affordable:
            window.comparison = WindowComparison(why_not="comparing them too would take too long")
        elif seen > self._windows and not self._is_at_end(window, progress):
            window.comparison = WindowComparison(
                why_not=f"only the first {self._windows} and the last of a pass are compared"
            )
        else:
            found = window.comparison = compare_window(
                self._subject, window, self._loss_fn, self._record.autocast
            )
            repeats = sum(each is not None for each in (found.means, found.swamped))
            self._comparison_work += at_once / 3 + of_loop * (1 + repeats)

    def _next(self, window: ObservedWindow, progress: Progress) -> Attention:
        record = self._record
        seen, steps, length = len(record.windows), self._longest(), progress.length
        if seen < self._windows:
            return Attention()
        is_in_later_pass = window.micro_batches[0].data_pass > 1
        if window.micro_batches[0].data_pass < window.micro_batches[-1].data_pass:
            return Attention(stop=True)  # the window contains the end of the data
        if seen > self._windows and (is_in_later_pass or self._is_at_end(window, progress)):
            return Attention(stop=True)  # the end of the data was observed
        lengths = self._in_this_pass()
        batches = max(1, round(progress.batches / len(lengths)))  # of a window
        ends_in_full = len(set(lengths)) == 1 and not (length or 0) % batches
        if length is None or steps == 1 or (ends_in_full and not progress.ends_short):
            return Attention(stop=True)
        if not self._to_end:
            record.stopped_early = True
            return Attention(stop=True)
        before_end = length - 2 * batches  # the last window will be partial, or have a short micro-batch
        return Attention(resume_at=before_end if progress.batches < before_end else None)

    def _in_this_pass(self) -> list[int]:
        """The micro-batches of each observed window in the latest pass."""
        windows = self._record.windows
        latest = windows[-1].micro_batches[0].data_pass
        return [len(window) for window in windows if window.micro_batches[0].data_pass == latest]
