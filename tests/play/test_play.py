"""The page shows the numbers of the real loop, in a session and in a browser."""

import math
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from transformers import get_scheduler

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.reference import EXACT, norm, relative_error, whole_window_gradient
from gradacc_hf.bench.ui_latency import chromium, served
from gradacc_hf.errors import InputError
from gradacc_hf.play import drawing as pictures
from gradacc_hf.play import loops, tour
from gradacc_hf.play.animation import write_film
from gradacc_hf.play.model_runner import MOMENTUM, WINDOWS
from gradacc_hf.play.session import FEWEST_MICRO_BATCHES, Session
from gradacc_hf.play.sessions import BrowserSessions
from gradacc_hf.play.settings import LINE, MAX_SETTING, WITH_BATCH_NORM, Fault, PlaySettings, steps_of
from gradacc_hf.play.toy_tasks import problem
from gradacc_hf.play.workers import Workers, start_server

QUICK = PlaySettings(micro_batch=2, steps=3)
ON_THE_LINE = PlaySettings(model=LINE, micro_batch=2, steps=2, lr=0.01)


def after(settings, windows, to="window"):
    """Return the picture of a new session after a number of windows or other stops."""
    session = Session(settings)
    for _ in range(windows):
        session.advance(to)
    return session.picture()


def by_the_api(settings, windows):
    """Run the loop of the README through the Python API.

    Return the loss of each window, and the norm and the relative error of each gradient.
    """
    made, accelerator = problem(settings.model, settings.lengths), Accelerator(cpu=True)
    model = made.make_model(settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr_in_use, momentum=MOMENTUM)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = WindowLoader(
        made.examples,
        settings.effective,
        micro_batch_size=settings.micro_batch,
        collate_fn=made.collate,
        num_items=made.num_items,
        cost=FEWEST_MICRO_BATCHES,
        seed=settings.seed,
        accelerator=accelerator,
    )
    scheduler = get_scheduler("linear", optimizer.optimizer, 0, WINDOWS)
    found = []
    while len(found) < windows:
        for window in islice(loader, windows - len(found)):
            batch, reference = loader.collated(window.indices).batch, problem_model(made, model)
            whole = whole_window_gradient(reference, batch)
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(model(**batch).loss))
                    if accelerator.sync_gradients:
                        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
                    optimizer.step()
                    optimizer.zero_grad()
            scheduler.step()
            found.append((window.loss, norm(gradient), relative_error(gradient, whole)))
    return found


def problem_model(made, model):
    copied = made.make_model(0)
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize("settings", [QUICK, ON_THE_LINE], ids=["transformer", "line"])
def test_a_session_shows_the_numbers_of_the_same_run_through_the_python_api(settings):
    session, shown = Session(settings), []
    for _ in range(6):
        session.advance("window")
        picture = session.picture()
        assert picture.error <= EXACT
        shown.append((picture.losses["shown"][-1], picture.norms[-1], picture.whole_norm))
    for (loss, norm_shown, whole), (api_loss, api_norm, _) in zip(
        shown, by_the_api(settings, 6), strict=True
    ):
        assert loss == pytest.approx(api_loss, rel=1e-5)
        assert norm_shown == pytest.approx(api_norm, rel=1e-5)
        assert whole == pytest.approx(api_norm, rel=1e-5)


def test_the_loop_shown_is_that_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [loop] = re.findall(r"    for window in windows:.*?scheduler\.step\(\)", readme, re.DOTALL)
    of_readme = [line.split("  #")[0].strip() for line in loop.splitlines()]
    shown = [line.split("  #")[0].strip() for line in loops.shown(loops.ours)]
    shown = [line.replace("max_norm", "1.0") for line in shown]
    assert shown == [line for line in of_readme if "optimizer_step_was_skipped" not in line]


@pytest.mark.slow
def test_the_same_seed_shows_the_same_run_and_another_another():
    first, again, other = (after(replace(QUICK, seed=seed), 3) for seed in (1, 1, 2))
    assert (first.losses, first.norms, first.error) == (again.losses, again.norms, again.error)
    assert first.losses != other.losses


DOCTOR_SAYS = {
    # Of a window that is much padding in one batch, the doctor reports that it is not compared.
    "none": r"^(each|in [12] of 3 windows, the) gradient equals the gradient of the window in one batch",
    "zeroed too early": "gradients are zeroed between the micro-batches of a window",
    "step on every micro-batch": "the optimizer steps on every micro-batch",
    "not divided": "the loss is not divided by the accumulation steps",
    "divided by steps, not items": "micro-batches with unequal numbers of items get equal weight",
    "scheduler on every micro-batch": "the scheduler steps on every micro-batch",
}


@pytest.mark.parametrize("fault", get_args(Fault))
def test_each_fault_shows_in_what_the_doctor_says_and_in_the_numbers(fault):
    picture = after(replace(QUICK, steps=4, fault=fault), 8)
    assert re.search(DOCTOR_SAYS[fault], picture.doctor)
    assert picture.is_healthy == (fault == "none")
    exact = picture.losses.get("ours", picture.losses["shown"])
    assert exact == pytest.approx(picture.losses["at once"], rel=1e-4)
    if fault == "none":
        assert picture.error <= EXACT
        return
    assert picture.losses["shown"] != pytest.approx(exact, rel=1e-4)
    assert (picture.error <= EXACT) == (fault == "scheduler on every micro-batch")
    assert any("✗" in line for line in picture.code)


def test_batch_norm_is_not_fixed_by_an_exact_loop():
    picture = after(replace(QUICK, model=WITH_BATCH_NORM, micro_batch=4), 4)
    assert not picture.is_healthy
    assert "BatchNorm" in picture.doctor
    assert picture.error > 0.1


def test_where_items_are_equal_dividing_by_steps_is_right():
    picture = after(replace(QUICK, fault="divided by steps, not items", lengths="equal"), 2)
    assert picture.is_healthy
    assert picture.error <= EXACT


def test_a_line_is_marked_as_it_runs_and_the_bucket_empties():
    session, seen = Session(QUICK), []
    while not seen or seen[-1].window < 2:
        session.advance("line")
        seen.append(session.picture())
    lines = [picture.code[picture.line].strip() for picture in seen[:4]]
    assert lines[0].startswith("loss = model(**batch).loss")
    assert lines[1:] == [
        "accelerator.backward(window.weigh(loss))",
        "optimizer.step()",
        "optimizer.zero_grad()",
    ]
    of_a_window = [picture.stop for picture in seen if picture.window == 0]
    skipping = ["forward", "backward", "skipped", "skipped"]
    assert of_a_window == [*skipping, *skipping, "forward", "backward", "clip", "step", "zero", "end"]
    assert "does nothing yet" in pictures.code(seen[2])
    assert "does nothing yet" not in pictures.code(seen[11])
    full = [picture.done == 3 and picture.stop == "backward" for picture in seen]
    assert all(picture.error <= EXACT for picture, is_full in zip(seen, full, strict=True) if is_full)
    assert all(picture.is_empty for picture in seen if picture.stop in ("zero", "end"))
    assert not any(picture.is_empty for picture in seen if picture.stop in ("backward", "skipped", "step"))


@pytest.mark.slow
def test_activations_are_those_of_a_micro_batch_and_weights_what_they_are():
    small, large = (
        after(replace(QUICK, steps=4, lengths="equal"), 2),
        after(replace(QUICK, micro_batch=8, steps=1, lengths="equal"), 2),
    )
    assert small.memory.activations_at_once == large.memory.activations_at_once == large.memory.activations
    assert small.memory.activations == pytest.approx(large.memory.activations / 4, rel=0.05)
    weights = sum(4 * p.numel() for p in problem(small.settings.model, "equal").make_model(0).parameters())
    assert small.memory.parameters == small.memory.gradients == small.memory.optimizer == weights


def test_a_change_takes_effect_at_the_next_window():
    session = Session(QUICK)
    session.advance("micro-batch")
    session.change(replace(QUICK, steps=2, lr=0.05, fault="not divided"))
    session.advance("micro-batch")
    assert (session.picture().settings, len(session.picture().cells)) == (QUICK, 3)
    session.advance("window")
    assert session.picture().settings == QUICK
    session.advance("micro-batch")
    picture = session.picture()
    assert (len(picture.cells), picture.settings.fault, picture.changes) == (2, "not divided", (1,))
    assert picture.lr == pytest.approx(0.05 * (1 - 1 / WINDOWS))
    session.change(replace(session.settings, fault="none"))
    session.advance("window")
    session.advance("window")
    picture = session.picture()
    assert picture.losses["shown"] == pytest.approx(picture.losses["at once"], rel=1e-4)
    session.change(replace(session.settings, seed=7))
    session.advance("window")
    assert session.picture().window == 0


@pytest.mark.slow
def test_another_fault_begins_where_gradacc_s_loop_is():
    session = Session(replace(QUICK, fault="zeroed too early"))
    for fault in ("scheduler on every micro-batch", "not divided"):
        for _ in range(3):
            session.advance("window")
        session.change(replace(QUICK, fault=fault))
        session.advance("micro-batch")
        picture = session.picture()
        assert picture.settings.fault == fault
        assert picture.lr == pytest.approx(0.2 * (1 - picture.window / WINDOWS))
        session.advance("window")
        picture = session.picture()
        assert picture.losses["shown"] == pytest.approx(picture.losses["ours"])
        assert picture.is_right == (fault != "not divided")


def test_near_a_minimum_rounding_is_that_of_gradients_before():
    session = Session(ON_THE_LINE)
    while not session.is_over:
        session.advance("window")
        picture = session.picture()
        assert picture.is_right or picture.is_over, (picture.error, picture.whole_norm)


def test_a_run_ends_and_its_rate_has_come_down():
    session = Session(ON_THE_LINE)
    for _ in range(WINDOWS + 5):
        session.advance("window")
    picture = session.picture()
    assert picture.is_over
    assert picture.lr == pytest.approx(0)
    assert len(picture.losses["shown"]) == WINDOWS


def test_bf16_and_clipping_and_a_rate_that_follows():
    picture = after(replace(QUICK, precision="bf16", max_grad_norm=0.5, lr_scaling="linear"), 3)
    assert EXACT < picture.error < 2e-2
    assert picture.lr == pytest.approx(0.2 * 6 / 16 * (1 - 2 / WINDOWS))
    assert picture.is_healthy, picture.doctor


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"micro_batch": 0}, "micro-batch size: found 0; allowed: a whole number from 1 to 32"),
        ({"micro_batch": 2.5}, "micro-batch size: found 2.5; allowed: a whole number"),
        ({"steps": 17}, "accumulation steps: found 17; allowed: a whole number from 1 to 16"),
        (
            {"micro_batch": 32, "steps": 3},
            "effective batch size: found 32 × 3 = 96; allowed: up to 64 examples",
        ),
        ({"model": LINE}, "found 4 × 4 = 16; allowed: up to 8 examples per window with the model 'line"),
        ({"lr": 0}, "learning rate: found 0; allowed: a number above 0 to 10"),
        ({"lr": None}, "learning rate: found nothing; allowed"),
        ({"lr": math.nan}, "learning rate: found nan; allowed"),
        ({"lr": math.inf}, "learning rate: found inf; allowed"),
        ({"max_grad_norm": -1}, "clipping: found -1; allowed: a number from 0 (off)"),
        ({"seed": True}, "seed: found True; allowed"),
        ({"model": "/etc/passwd"}, "model: found /etc/passwd; allowed: one of: line"),
        ({"fault": ["none"]}, "fault: found ['none']; allowed: one of: none"),
    ],
)
def test_what_cannot_be_is_one_line(given, said):
    with pytest.raises(InputError) as error:
        replace(PlaySettings(), **given)
    assert said in str(error.value)


def test_any_two_sizes_set_the_third():
    assert steps_of(16, 4) == 4
    with pytest.raises(
        InputError, match="effective batch size: found 10; allowed: a multiple of the micro-batch"
    ):
        steps_of(10, 4)


@pytest.mark.slow
def test_every_picture_can_be_drawn_whatever_the_numbers():
    diverges = after(replace(QUICK, lr=10.0, fault="not divided"), 30)
    assert not math.isfinite(diverges.losses["shown"][-1])
    largest = PlaySettings(micro_batch=4, steps=MAX_SETTING["steps"])
    for picture in (diverges, Session(QUICK).picture(), after(largest, 1), after(ON_THE_LINE, 2)):
        for draw in (
            getattr(pictures, n) for n in ("code", "window", "bucket", "memory", "losses", "doctor")
        ):
            drawn = draw(picture)
            assert not re.search(r'="[^"]*(nan|inf)[^"]*"', drawn), drawn
    assert "✗ diverged" in pictures.losses(diverges)
    assert "the training has diverged" in pictures.bucket(diverges)


def test_the_tour_has_seven_steps_each_with_lessons_that_there_are():
    assert len(tour.STEPS) == 7
    for number, step in enumerate(tour.STEPS):
        page = tour.page_of(number)
        assert f"{number + 1} of 7" in page
        for name in step.lessons:
            assert f"gradacc lessons {name}" in page


@pytest.mark.slow
def test_a_film_is_a_moving_svg_of_the_run(tmp_path):
    path = write_film(tmp_path / "run.svg")
    text = path.read_text(encoding="utf-8")
    import xml.etree.ElementTree as tree

    assert tree.fromstring(text).tag.endswith("svg")
    assert "@keyframes" in text
    assert ".coming {" in text  # micro-batches that are not done are pale
    assert "<script" not in text
    with pytest.raises(InputError, match=r"--film: found .*run\.gif; allowed: a file that ends in \.svg"):
        write_film(tmp_path / "run.gif")


# Several browser sessions, each with a process


@pytest.fixture
def workers():
    start_server()
    workers = Workers(2)
    yield workers
    workers.end()


@pytest.fixture
def sessions(workers):
    return BrowserSessions(workers)


def test_sessions_have_separate_runs_and_a_session_too_many_is_refused(sessions):
    assert sessions.go_on("a", "micro-batch").picture.done == 1
    assert sessions.go_on("b", "window").picture.done == 4
    assert sessions.go_on("a", "micro-batch").picture.done == 2
    for click in (sessions.enter, sessions.pause, lambda name: sessions.restart(name, QUICK)):
        refused = click("c")
        assert refused.is_wrong
        assert "all 2 sessions of this page are in use; try again later" in refused.message
    sessions.leave("b")
    assert sessions.enter("c").picture.window == 0
    assert sessions.go_on("b", "window").message == "this page was closed: press Restart"


def test_a_process_that_has_ended_says_so_and_a_restart_has_another(sessions, workers):
    sessions.enter("a")
    sessions.change("a", QUICK)
    workers.of("a").end()
    gone = sessions.go_on("a", "window")
    assert gone.message == "the training process has ended: press Restart"
    assert gone.has_ended
    assert sessions.restart("a", QUICK).picture.settings == QUICK
    assert sessions.go_on("a", "window").picture.done == 3


def test_ended_processes_take_no_slot(sessions, workers):
    for name in "ab":
        sessions.enter(name)
        workers.of(name).end()
    assert sessions.enter("c").picture is not None


def test_what_is_refused_is_said_until_it_is_taken_back(sessions):
    assert sessions.refuse("a", "found 10").message == "found 10"
    assert sessions.go_on("a", "window").message == "found 10"
    assert sessions.change("a", QUICK).message == "The change takes effect at the next window."
    assert sessions.go_on("a", "window").message == ""
    other = replace(QUICK, seed=3)
    assert (
        sessions.change("a", other).message
        == "The change takes effect at the next window and begins a new run."
    )


def test_it_plays_until_there_is_a_pause(sessions):
    plays = sessions.play("a")
    assert [next(plays).picture.done for _ in range(3)] == [1, 2, 3]
    sessions.set_speed("a", "windows")
    assert next(plays).picture.done == 4
    sessions.pause("a")
    assert list(plays) == []


# In a browser


def test_no_file_is_taken(server):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n1\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("/gradio_api/upload", "/upload"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server[0] + path, body, kind), timeout=30)
        assert refused.value.code == 404


def there_is_a_browser():
    """Whether Chromium is installed, by the system or by `playwright install chromium`."""
    home = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or os.path.expanduser("~/.cache/ms-playwright")
    return chromium() is not None or any(Path(home).glob("chromium-*"))


needs_a_browser = pytest.mark.skipif(
    not there_is_a_browser(), reason="no Chromium: apt-get install chromium (./launch.sh test does, as root)"
)


@pytest.fixture(scope="module")
def server():
    with served(cwd=ROOT) as (address, process):
        yield address, process.pid


@pytest.fixture
def address(server):
    return server[0]


@pytest.fixture
def served_by(server):
    return server[1]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    page = context.new_page()
    page.elsewhere = []
    page.on("request", lambda r: page.elsewhere.append(r.url) if not r.url.startswith(address) else None)
    opened(page, address)
    yield page
    assert [url for url in page.elsewhere if not url.startswith(("data:", "blob:"))] == []
    context.close()


def opened(page, address):
    page.goto(address)
    page.wait_for_selector("#see-code .line")


def number(page, name):
    return page.inner_text(f"[data-number={name}]")


def shows(page, name, value):
    page.wait_for_function(
        "([name, value]) => document.querySelector(`[data-number=${name}]`).innerText === value",
        arg=[name, str(value)],
        timeout=30_000,
    )


def set_number(page, name, value):
    page.fill(f"#{name} input", str(value))


def choose(page, name, value):
    page.click(f"#{name} label:has-text('{value}') >> nth=0")


@needs_a_browser
def test_ten_windows_on_the_page_are_those_of_the_python_api(page):
    set_number(page, "micro_batch", 2)
    shows(page, "window", 1)
    page.wait_for_function("document.querySelector('#effective input').value === '8'")
    set_number(page, "effective", 6)
    page.wait_for_function("document.querySelector('#steps input').value === '3'")
    for window in range(10):
        page.click("#window")
        shows(page, "window", window + 1)
        shows(page, "done", 3)
    loss, gradient_norm, _ = by_the_api(QUICK, 10)[-1]
    assert float(number(page, "loss-shown")) == pytest.approx(loss, abs=2e-4)
    assert float(number(page, "loss-at-once")) == pytest.approx(loss, abs=2e-4)
    assert float(number(page, "norm")) == pytest.approx(gradient_norm, rel=1e-3)
    assert float(number(page, "error")) <= EXACT


@needs_a_browser
def test_each_fault_changes_what_the_doctor_says(page):
    for fault in get_args(Fault)[1:]:
        choose(page, "fault", fault)
        said = DOCTOR_SAYS[fault].lower()
        page.wait_for_function(
            "said => document.querySelector('#see-doctor').innerText.toLowerCase().includes(said)",
            arg=said,
            timeout=30_000,
        )
        assert "✗" in page.inner_text("#see-code")


@needs_a_browser
def test_it_plays_pauses_and_steps(page):
    page.click("#play")
    page.wait_for_function("Number(document.querySelector('[data-number=window]').innerText) >= 3")
    page.click("#pause")
    time.sleep(1)
    at = number(page, "window"), number(page, "done")
    time.sleep(1)
    assert (number(page, "window"), number(page, "done")) == at
    page.keyboard.press("m")
    page.wait_for_function("at => document.querySelector('[data-number=done]').innerText !== at", arg=at[1])
    page.keyboard.press("r")
    shows(page, "window", 1)
    shows(page, "done", 0)


@needs_a_browser
def test_two_sessions_have_separate_runs_and_a_closed_tab_ends_its_training(
    browser, page, address, served_by
):
    other = browser.new_context().new_page()
    opened(other, address)
    before = number(page, "whole")
    set_number(page, "seed", 5)
    page.wait_for_function(
        "before => document.querySelector('[data-number=whole]').innerText !== before", arg=before
    )
    for _ in range(2):
        page.click("#window")
        other.click("#micro-batch")
    shows(page, "window", 2)
    shows(other, "done", 2)
    assert number(other, "window") == "1"
    time.sleep(2)  # a spare worker starts meanwhile
    workers = training_processes(served_by)
    other.click("#play")
    other.context.close()
    until = time.monotonic() + 30
    while len(training_processes(served_by)) >= len(workers) and time.monotonic() < until:
        time.sleep(0.5)
    assert len(training_processes(served_by)) < len(workers)


def training_processes(server):
    children = psutil.Process(server).children(recursive=True)
    return [child for child in children if "gradacc_hf.play.preload" in " ".join(child.cmdline())]


@needs_a_browser
def test_a_narrow_screen_has_all_of_it_and_nothing_hangs_over(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = context.new_page()
    opened(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("code", "window", "bucket", "memory", "losses"):
        assert page.locator(f"#see-{name}").bounding_box()["width"] > 250
    assert "dark" in page.evaluate("document.body.className")
    context.close()


@needs_a_browser
def test_no_text_of_a_picture_is_cut_off_or_overlaps_another(page):
    set_number(page, "micro_batch", 1)
    page.wait_for_function("document.querySelector('#effective input').value === '4'")
    set_number(page, "steps", 16)
    page.wait_for_function("document.querySelector('#effective input').value === '16'")
    for window in range(2):
        page.click("#window")
        shows(page, "window", window + 1)
    shows(page, "done", 16)
    cut_off, overlapping = page.evaluate(BAD_TEXTS)
    assert (cut_off, overlapping) == ([], [])


BAD_TEXTS = """() => {
  const cutOff = [], overlapping = [];
  for (const svg of document.querySelectorAll("#pictures figure > svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    const placed = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
    placed.forEach(([words, box], i) => {
      const isInside = box.left >= frame.left - 1 && box.right <= frame.right + 1
        && box.top >= frame.top - 3 && box.bottom <= frame.bottom + 1;
      if (!isInside) cutOff.push(words);
      for (const [other, its] of placed.slice(i + 1)) {
        const width = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const height = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (width > 1 && height > 5) overlapping.push([words, other]);
      }
    });
  }
  return [cutOff, overlapping];
}"""


@needs_a_browser
def test_a_bad_value_is_a_message_on_the_page(page):
    set_number(page, "effective", 10)
    page.wait_for_selector("#message .bad")
    assert (
        "effective batch size: found 10; allowed: a multiple of the micro-batch size, 4"
        in page.inner_text("#message")
    )
    set_number(page, "effective", 8)
    page.wait_for_function("!document.querySelector('#message .bad')")
    page.click("#window")
    shows(page, "done", 2)


@needs_a_browser
def test_another_model_comes_with_sizes_that_suit_it(page):
    choose(page, "model", LINE)
    for name, value in {"micro_batch": "2", "steps": "2", "effective": "4", "lr": "0.01"}.items():
        page.wait_for_function(f"document.querySelector('#{name} input').value === '{value}'")
    for window in range(3):
        page.click("#window")
        shows(page, "window", window + 1)
    loss, _, _ = by_the_api(ON_THE_LINE, 3)[-1]
    assert float(number(page, "loss-shown")) == pytest.approx(loss, rel=1e-3)


@needs_a_browser
def test_the_tour_sets_the_controls(page):
    for step in (1, 2):
        page.click("#tour-next")
        page.wait_for_function(f"document.querySelector('#tour-text').innerText.includes('{step} of 7')")
    page.wait_for_function("document.querySelector('#steps input').value === '8'")
    page.click("#tour-text summary")
    assert "gradacc lessons eight_samples" in page.inner_text("#tour-text")


@pytest.mark.slow
@needs_a_browser
def test_a_space_is_a_page_that_works(browser, tmp_path):
    folder = tmp_path / "space"
    command = [sys.executable, "-m", "gradacc_hf", "play", "--space", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    head = (folder / "README.md").read_text(encoding="utf-8")
    assert re.match(r"---\ntitle: .*\n(.*\n)*sdk: gradio\nsdk_version: \d+\.\d+", head)
    assert "torch==" in (folder / "requirements.txt").read_text()
    again = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert again.returncode == 2
    assert "exists and is not overwritten" in again.stderr
    alone = {**os.environ, "PYTHONPATH": ""}  # its own copy of the package
    with served([sys.executable, "app.py"], cwd=folder, env=alone) as (address, _):
        page = browser.new_page()
        opened(page, address)
        page.click("#window")
        shows(page, "done", 4)
        page.close()
