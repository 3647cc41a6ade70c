"""The text of each finding: the fault, the effect on training, and the code to write instead.

Braces hold numbers of the run: `n` is the accumulation steps; `rules.py` passes the others by name.
"""

LAST_WINDOW = """
  for step, batch in enumerate(loader, start=1):  # batch: all examples of a micro-batch
+     before = (step - 1) // {n} * {n} * loader.batch_size  # examples before this window
+     examples = min({n} * loader.batch_size, len(loader.dataset) - before)  # examples of this window
-     (loss / {n}).backward()
+     (loss * len(batch) / examples).backward()  # for a loss that is a mean over examples
-     if step % {n} == 0:
+     if step % {n} == 0 or step == len(loader):"""
MESSAGES: dict[str, tuple[str, str, str]] = {
    "stepped_on_every_micro_batch": (
        "the optimizer steps on every micro-batch",
        "batches are {n} × smaller than intended; with SGD and a divided loss, steps are {n} × too short",
        """
- optimizer.step()
+ if step % {n} == 0:
+     optimizer.step()
+     optimizer.zero_grad()""",
    ),
    "zeroed_inside_the_window": (
        "gradients are zeroed between the micro-batches of a window",
        "only the backwards after the last zeroing reach the optimizer; the others are wasted",
        """
- optimizer.zero_grad()  # before every backward
+ optimizer.zero_grad()  # only after optimizer.step()""",
    ),
    "never_zeroed": (
        "gradients are not zeroed after the step",
        "each step uses the sum of the gradients of all windows so far",
        """
  optimizer.step()
+ optimizer.zero_grad()""",
    ),
    "clipped_too_early": (
        "gradients are clipped before the window is complete",
        "early micro-batches count less than late ones, and the threshold applies to partial gradients",
        """
+ if step % {n} == 0:  # or accelerator.sync_gradients
      clip_grad_norm_(model.parameters(), max_norm)
      optimizer.step()""",
    ),
    "unscaled_too_early": (
        "gradients are unscaled before the window is complete",
        "later micro-batches add scaled gradients to unscaled ones, so almost only the later ones count",
        """
+ if step % {n} == 0:
      scaler.unscale_(optimizer)
      clip_grad_norm_(model.parameters(), max_norm)
      scaler.step(optimizer)""",
    ),
    "clipped_while_scaled": (
        "gradients are clipped before they are unscaled",
        "the threshold applies to the scaled gradient, so the step uses a much smaller gradient",
        """
+ scaler.unscale_(optimizer)
  clip_grad_norm_(model.parameters(), max_norm)
  scaler.step(optimizer)""",
    ),
    "clipped_too_late": (
        "gradients are clipped after the step",
        "the optimizer has already used the unclipped gradient, so clipping has no effect",
        """
+ clip_grad_norm_(model.parameters(), max_norm)
  optimizer.step()
- clip_grad_norm_(model.parameters(), max_norm)""",
    ),
    "scheduler_per_micro_batch": (
        "the scheduler steps on every micro-batch",
        "if the schedule is as long as the number of steps, warm-up and decay end {n} × too early",
        """
- scheduler.step()  # for each micro-batch
+ scheduler.step()  # only after optimizer.step()""",
    ),
    "schedule_sized_in_micro_batches": (
        "the schedule counts micro-batches, not steps",
        "the run ends at 1/{n} of the schedule: the learning rate hardly decays",
        """
- num_training_steps={schedule_length}
+ num_training_steps={passes} * math.ceil(len(loader) / {n})""",
    ),
    "synchronised_every_micro_batch": (
        "processes synchronise gradients on every micro-batch",
        "the gradient is correct, but communication takes more time than necessary",
        """
+ with nullcontext() if step % {n} == 0 else model.no_sync():  # or accelerator.accumulate(model)
      loss.backward()""",
    ),
    "not_divided": (
        "the loss is not divided by the accumulation steps",
        "with SGD, steps are {n} × too long; with Adam, clipping, weight decay and logged norms are wrong",
        """
- loss.backward()
+ (loss / {n}).backward()  # for unequal micro-batches: loss * (items / items_of_the_window)""",
    ),
    "divided_twice": (
        "the loss is divided twice",
        "with SGD, steps are {n} × too short; with Adam, clipping, weight decay and logged norms are wrong",
        """
- loss = loss / {n}  # accelerator.backward(loss) already divides by the accumulation steps""",
    ),
    "mis_scaled": (
        "the loss is multiplied by a factor",
        "with SGD and with clipping, the factor changes the step size like another learning rate",
        "keep the factor if it is intended, such as the weight of an auxiliary loss; otherwise remove it",
    ),
    "mean_of_means": (
        "micro-batches with unequal numbers of items get equal weight",
        "an item counts more in a micro-batch with few items, so a different loss is minimised",
        """
- loss = loss / {n}
+ loss = loss * (items / items_of_the_window)  # as gradacc_hf.WindowLoader weighs""",
    ),
    "another_gradient": (
        "the gradient differs from the gradient of the window",
        "training minimises a different loss from the one reported",
        "correct the other findings, then look for code that changes weights, gradients or the loss",
    ),
    "examples_coupled": (
        "BatchNorm normalises each example with the statistics of the micro-batch",
        "accumulation is not equivalent to a larger batch, whatever the weights of the losses",
        "use LayerNorm or GroupNorm, or freeze BatchNorm in evaluation mode",
    ),
    "packed_examples_mixed": (
        "the examples of a packed row attend to each other",
        "each example is learned together with the texts before and after it",
        "pad instead, or pass a mask that keeps the examples apart. Without a mask and a cache, position_ids "
        "keep them apart in some causal models only",
    ),
    "in_batch_negatives_cut": (
        "in-batch negatives come only from the micro-batch",
        "with fewer negatives than in the whole window the task is easier, so the loss looks better",
        "gradacc_hf.ContrastiveLoss uses the negatives of the whole window (a gradient cache)",
    ),
    "loss_is_a_sum": (
        "the loss is a sum over the micro-batch",
        "the gradient grows with the number of examples; dividing by the accumulation steps gives no mean",
        """
- reduction='sum'
+ divide by the items of the window""",
    ),
    "padding_reaches_the_loss": (
        "the loss of an example depends on the amount of padding",
        "the gradient of an example depends on the other examples in the micro-batch",
        "mask padded positions in the loss, or pad all micro-batches of a window to the same length",
    ),
    "partial_window_mis_scaled": (
        "a partial window is scaled like a full window",
        "the step of the partial window is too short",
        LAST_WINDOW,
    ),
    "partial_window_dropped": (
        "the examples of the last, partial window are dropped",
        "in every pass over the data, these examples are computed but never reach a step",
        LAST_WINDOW,
    ),
    "partial_window_leaked": (
        "a window continues in the next pass over the data",
        "a step mixes two passes; evaluating or saving between the passes misses gradients not yet applied",
        LAST_WINDOW,
    ),
    "swamped_in_16_bits": (
        "gradients are summed in 16 bits, which rounds small contributions away",
        "the rounding error grows with the number of micro-batches",
        """
+ gradacc_hf.accumulate_in_float32(model, optimizer)""",
    ),
    "logged_loss_inflated": (
        "the logged loss is inflated",
        "loss curves of runs with different accumulation steps cannot be compared",
        "divide the logged loss by {n}, or log the mean over the window",
    ),
    "logged_loss_of_the_last_micro_batch": (
        "only the loss of the last micro-batch is logged",
        "the logged loss has {n} × the variance of the window's loss",
        "multiply each loss by the micro-batch's share of the window's items, and log the sum",
    ),
    "learning_rate_unchanged": (
        "the learning rate is a default value, although the window is large",
        "a larger batch takes fewer steps and often allows a larger learning rate",
        "also try {twice:g} and {four_times:g} (see gradacc lessons learning_rate)",
    ),
}
EXACT_TRAINER = """
- trainer = Trainer(model, args, …)
+ trainer = gradacc_hf.ExactTrainer(model, args, …)"""
ACCUMULATE = """
+ with accelerator.accumulate(model):  # around forward, backward, step and zero_grad
      accelerator.backward(loss)"""
FIXES: dict[str, dict[str, str]] = {  # by the library that runs the loop
    "trainer": dict.fromkeys(
        ("not_divided", "mean_of_means", "partial_window_mis_scaled", "logged_loss_inflated"), EXACT_TRAINER
    ),
    "accelerate": {
        "stepped_on_every_micro_batch": ACCUMULATE,
        "synchronised_every_micro_batch": ACCUMULATE,
        "mean_of_means": """
- accelerator.backward(loss)
+ accelerator.backward(window.weigh(loss))  # windows of gradacc_hf.WindowLoader""",
    },
}
CONSEQUENCES: dict[str, set[str]] = {  # finding → other findings that it causes
    "swamped_in_16_bits": {"another_gradient", "mis_scaled"},
}
