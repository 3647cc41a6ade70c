"""The doctor on the loops of `loops/`: each fault by its name and line, nothing in a healthy loop."""

import re
import shutil

import pytest
from doctor.confusion import LOOPS, diagnose_loop, modules_of, paths, table

from gradacc_hf.doctor.report import NOTHING_JUDGED

MIN_HEALTHY, MIN_JUDGED, MIN_FAULTY = 40, 30, 40


@pytest.fixture(scope="module")
def results():
    return [diagnose_loop(path) for path in paths()]


def test_each_fault_is_found_at_its_line_and_none_in_a_healthy_loop(results):
    wrong = [
        f"{each.name}: planted {sorted(each.planted)}, found {sorted(each.found)}, exit code {each.code}"
        for each in results
        if not each.is_right
    ]
    assert not wrong, "\n".join(["", *wrong, table(results)])


def test_there_are_enough_loops_and_most_healthy_ones_are_judged(results):
    healthy = [each for each in results if each.name.startswith("healthy")]
    assert len(healthy) >= MIN_HEALTHY
    assert sum(each.is_judged for each in healthy) >= MIN_JUDGED
    assert len(results) - len(healthy) >= MIN_FAULTY
    assert sum(len({name for name, _ in each.planted}) > 1 for each in results) >= 10, (
        "several faults at once"
    )


def test_the_guide_prints_the_table(results):
    """The guide counts without the loops of Lightning."""
    guide = (LOOPS.parents[2] / "gradacc_hf/doctor/README.md").read_text(encoding="utf-8")
    printed = table([r for r in results if "lightning" not in modules_of(LOOPS / f"{r.name}.py")])
    assert printed in guide, printed


def test_each_window_is_compared_or_a_line_says_why_not(results):
    for each in results:
        for report in re.split(r"(?=^gradacc doctor)", each.output, flags=re.MULTILINE):
            observed = re.search(r"observed (\d+) window", report)
            if observed is None:
                continue
            equal = re.search(
                r"^✓ (each gradient|in (\d+) of \d+ windows, the gradient) equals", report, re.M
            )
            number = 0 if equal is None else int(equal[2] or observed[1])
            not_compared = "was not compared with the window" in report
            assert number == int(observed[1]) or not_compared or "✗" in report, each.name + "\n" + report


def test_a_script_of_which_nothing_was_judged_ends_with_a_line_that_states_it(results):
    unjudged = {each.name for each in results if each.output.rstrip().endswith(NOTHING_JUDGED)}
    assert "healthy_gradients_averaged_in_a_buffer" in unjudged
    assert unjudged <= {each.name for each in results if each.code == 0 and not each.is_judged}


HALF = """
import torch
model = torch.nn.Linear(5, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(1, 13):
    loss = (model(torch.randn(4, 5)) - 1).square().mean() / 2
    loss.backward()
    if step % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
"""


def test_a_weight_that_the_loop_may_have_chosen_is_stated_and_no_fault(tmp_path):
    (tmp_path / "half.py").write_text(HALF)
    found = diagnose_loop(tmp_path / "half.py")
    assert (found.code, found.found) == (0, set())
    assert (
        "sum up to 2 over the window, and not to 1: the loop chose a weight for the loss, or" in found.output
    )
    assert found.output.rstrip().endswith(NOTHING_JUDGED)


@pytest.mark.parametrize("windows", ["3", "6"])
def test_a_leak_of_sliced_tensors_is_found_with_any_number_of_windows(windows):
    found = diagnose_loop(LOOPS / "faulty_shuffled_slices_leaked_with_one_counter.py", "--windows", windows)
    assert found.is_right, found.output
    equal = "each gradient equals" if windows == "3" else "in 5 of 6 windows, the gradient equals"
    assert equal in found.output


def test_an_optimizer_that_steps_after_another_is_compared_at_the_weights_of_its_window():
    found = diagnose_loop(LOOPS / "healthy_two_optimizers.py")
    first, second = found.output.split("SGD: observed 3 windows")
    assert "each gradient equals the gradient of the window in one batch" in first
    assert "in 2 of 3 windows, the gradient equals the gradient of the window in one batch" in second


def test_a_packed_row_of_a_model_without_outputs_by_token_is_stated_as_not_judged(tmp_path):
    text = (LOOPS / "faulty_packed_rows_of_an_encoder.py").read_text()
    only_loss = "model.forward = lambda f=model.forward, **given: {'loss': f(**given).loss}\noptimizer = "
    (tmp_path / "loop.py").write_text(
        text.replace("optimizer = ", only_loss, 1).replace(").loss  #", ")['loss']  #")
    )
    found = diagnose_loop(tmp_path / "loop.py")
    assert "? whether the examples of a packed row attend to each other was not judged" in found.output


def test_stop_ends_the_script_at_the_step_that_ends_the_watched_windows(tmp_path):
    shutil.copy(LOOPS / "tiny.py", tmp_path)
    script = tmp_path / "train.py"
    text = (LOOPS / "faulty_leaked.py").read_text()
    zero = "            optimizer.zero_grad()"
    script.write_text(text.replace(zero, f"            print('stepped')\n{zero}"))
    stopped = diagnose_loop(script, "--stop", "--windows", "2")
    assert stopped.output.count("stepped") == 1, "the second step is the last"
    assert "observed 2 windows" in stopped.output
    assert "? the end of a pass over the data was not observed, because of --stop" in stopped.output
    assert stopped.code == 0


@pytest.mark.parametrize(("rows", "fault"), [(72, "dropped"), (72, "leaked"), (74, "leaked")])
def test_the_cure_of_a_lost_last_window_passes(rows, fault, tmp_path):
    body = """
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(ROWS, 5), torch.randint(3, (ROWS,))
loader = DataLoader(TensorDataset(x, y), 4)
model = torch.nn.Linear(5, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    ZERO
    for step, (x, batch) in enumerate(loader, start=1):
        loss = F.cross_entropy(model(x), batch)
        (loss / 4).backward()
        if step % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
"""
    body = body.replace("ROWS", str(rows)).replace(
        "ZERO", "optimizer.zero_grad()" if fault == "dropped" else ""
    )
    script = tmp_path / "loop.py"
    script.write_text(body)
    wrong = diagnose_loop(script)
    assert {name for name, _ in wrong.found} >= {f"partial_window_{fault}"}, wrong.output
    fix = re.search(r"✗ partial_window.*?instead (.*?)\n[✗✓?]", wrong.output, re.DOTALL)[1]
    lines = [line.strip() for line in fix.splitlines()]
    removed = [line[1:].strip() for line in lines if line.startswith("-")]
    added = [re.sub(r"  #.*", "", line[1:]).strip() for line in lines if line.startswith("+")]
    indented = ["        " + line for line in added]
    cured = body.replace("        " + removed[0], "\n".join(indented[:-1]))
    script.write_text(cured.replace("        " + removed[1], indented[-1]))
    healthy = diagnose_loop(script)
    assert healthy.found == set(), healthy.output
    assert "in one batch" in healthy.output
    assert healthy.code == 0
