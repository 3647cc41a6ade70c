"""The text of each finding: what is wrong, what it does to training, and what to write instead.

Numbers of a run are in braces: `n`, its accumulation steps, and others that the finding names.
"""

MESSAGES: dict[str, tuple[str, str, str]] = {
    "stepped_on_every_micro_batch": (
        "the optimizer steps on every micro-batch",
        "batches are {n} × smaller than meant; with SGD and divided losses, steps are {n} × too short",
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
        "each step takes the sum of the gradients of all windows so far",
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
        "later micro-batches add scaled gradients to unscaled ones, and so they alone count",
        """
+ if step % {n} == 0:
      scaler.unscale_(optimizer)
      clip_grad_norm_(model.parameters(), max_norm)
      scaler.step(optimizer)""",
    ),
    "clipped_too_late": (
        "gradients are clipped after the step",
        "the optimizer has used the unclipped gradient by then: nothing is clipped",
        """
+ clip_grad_norm_(model.parameters(), max_norm)
  optimizer.step()
- clip_grad_norm_(model.parameters(), max_norm)""",
    ),
    "scheduler_per_micro_batch": (
        "the scheduler steps on every micro-batch",
        "warm-up and decay end {n} × too early, if the schedule is as long as there are steps",
        """
- scheduler.step()  # for each micro-batch
+ scheduler.step()  # after optimizer.step() alone""",
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
        "the gradient is the same, but it takes more time",
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
        "with SGD, and for clipping, this acts as another learning rate",
        "nothing, if it is meant (the weight of an auxiliary loss); else find the factor and remove it",
    ),
    "mean_of_means": (
        "micro-batches with unequal items count alike",
        "items in micro-batches with few items weigh more: the mean of means is another loss",
        """
- loss = loss / {n}
+ loss = loss * (items / items_of_the_window)  # as gradacc_hf.WindowLoader weighs""",
    ),
    "another_gradient": (
        "the gradient is not the window's gradient",
        "training minimises another loss than the one that is reported",
        "see the other findings; else look for code that changes weights, gradients or the loss in between",
    ),
    "examples_coupled": (
        "BatchNorm normalises each example by its micro-batch",
        "accumulation does not act as a larger batch, however the loss is weighed",
        "use LayerNorm or GroupNorm, or freeze BatchNorm in evaluation mode",
    ),
    "in_batch_negatives_cut": (
        "in-batch negatives come from the micro-batch only",
        "the task is easier than with the whole window's negatives, and so the loss looks better",
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
        "an example's loss depends on how far it is padded",
        "the gradient of an example depends on the micro-batch that it is in",
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
        "these examples are computed for nothing, in every pass over the data",
        """
- if step % {n} == 0:
+ if step % {n} == 0 or step == len(loader):""",
    ),
    "partial_window_leaked": (
        "a window goes on in the next pass over the data",
        "a step mixes two passes; evaluating or saving between them misses the gradients not yet applied",
        """
- if step % {n} == 0:
+ if step % {n} == 0 or step == len(loader):""",
    ),
    "swamped_in_16_bits": (
        "gradients are summed in 16 bits, where small ones vanish beside large ones",
        "the more micro-batches, the larger the rounding error",
        """
+ gradacc_hf.accumulate_in_float32(model, optimizer)""",
    ),
    "logged_loss_inflated": (
        "the logged loss is inflated",
        "loss curves of runs with other accumulation steps cannot be compared",
        "divide the logged loss by {n}, or log the window's mean",
    ),
    "logged_loss_of_the_last_micro_batch": (
        "only the loss of the last micro-batch is logged",
        "it has {n} × the variance of the window's loss, of which it is a part",
        "sum the losses of a window, each × its share of the items, and log the sum",
    ),
    "learning_rate_unchanged": (
        "the learning rate is a default, and the window is large",
        "a larger batch takes fewer steps, and often allows a larger rate",
        "try {twice:g} and {four_times:g} beside it (gradacc lessons learning_rate)",
    ),
}
EXACT_TRAINER = """
- trainer = Trainer(model, args, …)
+ trainer = gradacc_hf.ExactTrainer(model, args, …)"""
ACCUMULATE = """
+ with accelerator.accumulate(model):  # around forward, backward, step and zero_grad
      accelerator.backward(loss)"""
FIXES: dict[str, dict[str, str]] = {  # by whose loop it is, if not the user's own
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
CONSEQUENCES: dict[str, set[str]] = {  # of a finding: other findings that it causes
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
