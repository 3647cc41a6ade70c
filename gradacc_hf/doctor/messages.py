"""Each finding in words: what is wrong, what it does to training, and what to write instead.

In braces stand the numbers of a run: `n`, its accumulation steps, and what the finding names besides.
"""

WORDS: dict[str, tuple[str, str, str]] = {
    "stepped_on_every_micro_batch": (
        "the optimizer steps on every micro-batch",
        "it trains with batches {n} × smaller; with SGD, steps of divided losses are as much too short",
        """
- optimizer.step()
+ if step % {n} == 0:
+     optimizer.step()
+     optimizer.zero_grad()""",
    ),
    "zeroed_inside_the_window": (
        "gradients are zeroed between the micro-batches of a window",
        "all micro-batches but the last of each window are computed for nothing",
        """
- optimizer.zero_grad()  # before every backward
+ optimizer.zero_grad()  # after optimizer.step() alone""",
    ),
    "never_zeroed": (
        "gradients are not zeroed after the step",
        "every window's gradient is that of all windows so far",
        """
  optimizer.step()
+ optimizer.zero_grad()""",
    ),
    "clipped_too_early": (
        "gradients are clipped before the window is complete",
        "early micro-batches count less than late ones, and the threshold is met by parts of a gradient",
        """
+ if step % {n} == 0:  # or accelerator.sync_gradients
      clip_grad_norm_(model.parameters(), max_norm)
      optimizer.step()""",
    ),
    "unscaled_too_early": (
        "gradients are unscaled before the window is complete",
        "later micro-batches come with the scale to what has none any more: they alone count",
        """
+ if step % {n} == 0:
      scaler.unscale_(optimizer)
      clip_grad_norm_(model.parameters(), max_norm)
      scaler.step(optimizer)""",
    ),
    "clipped_too_late": (
        "gradients are clipped after the step",
        "the optimizer has taken the gradient by then as it was: nothing is clipped",
        """
+ clip_grad_norm_(model.parameters(), max_norm)
  optimizer.step()
- clip_grad_norm_(model.parameters(), max_norm)""",
    ),
    "scheduler_per_micro_batch": (
        "the scheduler steps on every micro-batch",
        "warm-up and decay are over {n} × too early, where the schedule is as long as there are steps",
        """
- scheduler.step()  # for each micro-batch
+ scheduler.step()  # after optimizer.step() alone""",
    ),
    "schedule_sized_in_micro_batches": (
        "the schedule is as long as there are micro-batches, not steps",
        "the run ends where the schedule has come to 1/{n} of its way: the rate hardly decays",
        """
- num_training_steps={horizon}
+ num_training_steps={passes} * math.ceil(len(loader) / {n})""",
    ),
    "synchronised_every_micro_batch": (
        "gradients cross the processes on every micro-batch",
        "the gradient is the same; the time is not",
        """
+ with nullcontext() if step % {n} == 0 else model.no_sync():  # or accelerator.accumulate(model)
      loss.backward()""",
    ),
    "not_divided": (
        "the loss is not divided by the accumulation steps",
        "with SGD each step is {n} × too long; with Adam, clipping, weight decay and logged norms are off",
        """
- loss.backward()
+ (loss / {n}).backward()  # exact: × its items / the window's items""",
    ),
    "divided_twice": (
        "the loss is divided twice",
        "with SGD each step is {n} × too short; with Adam, clipping, weight decay and logged norms are off",
        """
- loss = loss / {n}  # accelerator.backward(loss) divides by the accumulation steps already""",
    ),
    "mis_scaled": (
        "the loss is multiplied by something",
        "with SGD, and for clipping, that is another learning rate",
        "all is well if it is meant (the weight of an auxiliary loss); else look where it comes from",
    ),
    "mean_of_means": (
        "micro-batches with unequal items count alike",
        "items of micro-batches with few of them weigh more: the mean of means is another loss",
        """
- loss = loss / {n}
+ loss = loss * (items / items_of_the_window)  # as gradacc_hf.WindowLoader weighs""",
    ),
    "another_gradient": (
        "the gradient is not that of the window",
        "it trains another loss than the one that is read",
        "see the other findings; else look for what changes weights, gradients or the loss in between",
    ),
    "examples_coupled": (
        "BatchNorm normalises each example by its micro-batch",
        "accumulation is no larger batch for it, however the loss is weighed",
        "take LayerNorm or GroupNorm, or freeze BatchNorm in evaluation mode",
    ),
    "in_batch_negatives_cut": (
        "in-batch negatives are those of a micro-batch",
        "the task is easier than that of the window, and the loss looks better for it",
        "gradacc_hf.ContrastiveLoss has the negatives of the whole window (a gradient cache)",
    ),
    "loss_is_a_sum": (
        "the loss is a sum over the micro-batch",
        "the gradient grows with the examples; dividing by the accumulation steps makes no mean of it",
        """
- reduction='sum'
+ divide by the items of the window""",
    ),
    "padding_reaches_the_loss": (
        "an example's loss depends on how far it is padded",
        "the same examples have another gradient in another micro-batch",
        "mask padded positions in the loss, or pad a window's micro-batches alike",
    ),
    "partial_window_mis_scaled": (
        "the last, partial window is scaled as a full one",
        "the last step of each pass is too short",
        """
- loss / {n}
+ loss / micro_batches_of_this_window""",
    ),
    "partial_window_dropped": (
        "the examples that fill no window are dropped",
        "they are computed for nothing, in every pass",
        """
- if step % {n} == 0:
+ if step % {n} == 0 or step == len(loader):""",
    ),
    "partial_window_leaked": (
        "a window goes on in the next pass over the data",
        "a step mixes two passes; what evaluates or saves between them misses what is not stepped yet",
        """
- if step % {n} == 0:
+ if step % {n} == 0 or step == len(loader):""",
    ),
    "swamped_in_16_bits": (
        "gradients add up in 16 bits, where small ones are lost beside large ones",
        "the more micro-batches, the more of each is rounded away",
        """
+ gradacc_hf.accumulate_in_float32(model, optimizer)""",
    ),
    "logged_loss_inflated": (
        "the loss that is logged is inflated",
        "curves of runs with other accumulation steps do not compare",
        "divide what is logged by {n}, or log the window's mean",
    ),
    "logged_loss_of_the_last_micro_batch": (
        "the loss that is logged is that of the last micro-batch only",
        "it is {n} × as noisy as it need be, and of a part of the window",
        "add up the losses of a window, each × its share of the items, and log the sum",
    ),
    "learning_rate_unchanged": (
        "the learning rate is a default, and the window is large",
        "a larger batch takes fewer steps, and often bears a larger rate",
        "try {twice:g} and {four_times:g} beside it (gradacc lessons learning_rate)",
    ),
}
EXACT_TRAINER = """
- trainer = Trainer(model, args, …)
+ trainer = gradacc_hf.ExactTrainer(model, args, …)"""
ACCUMULATE = """
+ with accelerator.accumulate(model):  # around forward, backward, step and zero_grad
      accelerator.backward(loss)"""
FIXES: dict[str, dict[str, str]] = {  # where the loop is not the user's, or half of it
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
EXPLAINS: dict[str, set[str]] = {  # a finding: those that are but its consequences
    "zeroed_inside_the_window": {
        *("another_gradient", "mean_of_means", "divided_twice", "mis_scaled", "not_divided"),
    },
    "never_zeroed": {"another_gradient", "mean_of_means", "not_divided", "mis_scaled"},
    "clipped_too_early": {"another_gradient", "mean_of_means", "mis_scaled", "divided_twice"},
    "unscaled_too_early": {
        *("another_gradient", "mean_of_means", "mis_scaled", "divided_twice", "not_divided"),
    },
    "swamped_in_16_bits": {"another_gradient", "mis_scaled"},
}
