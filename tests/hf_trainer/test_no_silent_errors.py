"""ExactTrainer is exact, or warns in one line: losses that are easy to get wrong, each with many seeds.

Run all seeds with `pytest -m slow`. Then the table counts, by loss: exact, warned, wrong without a warning.
"""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, mse_loss
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from gradacc_hf import ExactTrainer

EXACT = 1e-5
WIDTH, CLASSES, LENGTH = 5, 4, 6


class Net(nn.Module):
    """Logits of rows, or of the positions of rows."""

    def __init__(self, outputs=CLASSES, zero_head=False):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, outputs)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.config = SimpleNamespace(semantic_loss_ignore_index=9, to_json_string=lambda: "{}")

    def forward(self, x, labels=None):
        return self.head(torch.tanh(self.body(x)))


def stack(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def rare(i):
    return int(i % 12 == 7)


def rows(label=lambda i: i % CLASSES, name="labels", dtype=torch.long, n=96):
    return [{"x": torch.randn(WIDTH), name: torch.tensor(label(i), dtype=dtype)} for i in range(n)]


def positions(n=64, ignored=-100, equal=0, classes=CLASSES):
    """Examples with labels by position. The first `equal` examples have no ignored label."""
    found = []
    for i in range(n):
        labels = torch.randint(0, classes, (LENGTH,))
        labels[LENGTH if i < equal else int(torch.randint(1, LENGTH, ())) :] = ignored
        found.append({"x": torch.randn(LENGTH, WIDTH), "labels": labels})
    return found


def by_position(logits, labels, **more):
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), **more)


def focal(logits, labels, alpha=None):
    each = cross_entropy(logits, labels, reduction="none")
    each = (1 - torch.exp(-each)) ** 2 * each
    return each.mean() if alpha is None else (alpha[labels] * each).sum() / alpha[labels].sum()


def mean_of_rows(logits, labels):
    each = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each.sum(1) / (labels != -100).sum(1)).mean()


def token_and_row(net, batch):
    logits = net(batch["x"])
    return by_position(logits, batch["labels"]) + cross_entropy(logits[:, 0], batch["row"])


def contrastive(net, batch):
    z = net(batch["x"])
    return cross_entropy(z @ z.flip(1).T, torch.arange(len(z)))


def weighted_examples(net, batch):
    each = cross_entropy(net(batch["x"]), batch["labels"], reduction="none")
    return (each * batch["weight"]).sum() / batch["weight"].sum()


def masked_positions(net, batch):
    each = cross_entropy(net(batch["x"]).transpose(1, 2), batch["labels"], reduction="none")
    return (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def preference(net, batch):
    chosen, rejected = net(batch["x"]).mean(1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def pairs(examples):
    return {"x": torch.cat([torch.stack([e[name] for e in examples]) for name in ("x", "rejected")])}


def of_unequal_lengths(n=64):
    lengths = torch.randint(3, 12, (n,)).tolist()
    return [{"x": torch.randn(k, WIDTH), "labels": torch.randint(0, CLASSES, (k,))} for k in lengths]


def padded(examples):
    values = {name: [example[name] for example in examples] for name in examples[0]}
    pad = torch.nn.utils.rnn.pad_sequence
    return {"x": pad(values["x"], True), "labels": pad(values["labels"], True, padding_value=-100)}


def one_tag_each_at_first():
    found = positions(equal=64)
    for i, example in enumerate(found):
        example["labels"] = torch.zeros(LENGTH, dtype=torch.long)
        example["labels"][torch.randperm(LENGTH)[: 1 if i < 32 else int(torch.randint(0, 4, ()))]] = 1
    return found


def in_training_mode(net, batch):
    weight = WEIGHTS if net.training else None
    return cross_entropy(net(batch["x"]), batch["labels"], weight=weight)


def objects(examples):
    return {"x": torch.stack([e["x"] for e in examples]), "labels": [e["labels"] for e in examples]}


def by_boxes(net, batch):
    each = cross_entropy(
        net(batch["x"]), torch.tensor([e["class"] for e in batch["labels"]]), reduction="none"
    )
    boxes = torch.tensor([float(e["boxes"]) for e in batch["labels"]])
    return (each * boxes).sum() / boxes.sum()


def targets_with_nan():
    nan = torch.arange(CLASSES) < 2
    labels = [torch.randn(CLASSES).masked_fill(nan & bool(rare(i)), torch.nan) for i in range(96)]
    return [{"x": torch.randn(WIDTH), "labels": each} for each in labels]


def without_nan(net, batch):
    here = ~torch.isnan(batch["labels"])
    return mse_loss(net(batch["x"])[here], batch["labels"][here])


WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 12.0])
RARE = torch.tensor([1.0, 12.0, 1.0, 1.0])
LATE = torch.tensor([1.0, 1.0, 1.0, 30.0])


class Kept(Net):
    """A net that makes a tensor in its first forward and keeps it."""

    def forward(self, x, labels=None):
        if not hasattr(self, "ones"):
            self.ones = torch.ones(16)
        return self.head(self.ones * torch.tanh(self.body(x)))


class Random(Net):
    """A net that draws random numbers in training mode."""

    def forward(self, x, labels=None):
        noise = 1e-7 * torch.randn(len(x), CLASSES) if self.training else 0
        return super().forward(x) + noise


class Clipped(Net):
    """A net whose gradients are clipped in every backward pass."""

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


class Rdrop(Net):
    """A net with dropout, and a loss that is no mean over the rows: the penalty is a sum."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(1e-6)

    def forward(self, x, labels=None):
        return self.dropout(super().forward(x))


def penalty_of_two_passes(net, batch):
    first, second = net(batch["x"]), net(batch["x"])
    return cross_entropy(first, batch["labels"]) + (first + second).square().mean(1).sum()


def plain(loss, **more):
    return lambda net, batch: loss(net(batch["x"]), batch["labels"], **more)


def case(data, loss, *, net=Net, collate=stack, **arguments):
    return SimpleNamespace(data=data, loss=loss, net=net, collate=collate, arguments=arguments)


CASES = {
    "cross entropy": case(rows, plain(cross_entropy)),
    "class weights": case(rows, plain(cross_entropy, weight=WEIGHTS)),
    "class weights, rare label": case(lambda: rows(rare), plain(cross_entropy, weight=RARE)),
    "class weights, label that comes late": case(
        lambda: rows(lambda i: 3 if i == 60 else i % 3), plain(cross_entropy, weight=LATE)
    ),
    "class weights, one example at a time": case(
        lambda: rows(rare), plain(cross_entropy, weight=RARE), per_device_train_batch_size=1
    ),
    "class weights, head of zeros": case(
        rows, plain(cross_entropy, weight=WEIGHTS), net=lambda: Net(zero_head=True)
    ),
    "cross entropy, head of zeros": case(rows, plain(cross_entropy), net=lambda: Net(zero_head=True)),
    "cross entropy, labels in order": case(lambda: rows(lambda i: i // 32), plain(cross_entropy)),
    "class weights, labels in order": case(
        lambda: rows(lambda i: i // 32), plain(cross_entropy, weight=WEIGHTS)
    ),
    "focal loss": case(rows, plain(focal)),
    "focal loss with class weights": case(lambda: rows(rare), plain(focal, alpha=RARE)),
    "labels under another name": case(
        lambda: rows(name="target"), lambda net, batch: cross_entropy(net(batch["x"]), batch["target"])
    ),
    "ignored labels under another name": case(
        lambda: rows(lambda i: -100 if i % 3 else i % CLASSES, name="target"),
        lambda net, batch: cross_entropy(net(batch["x"]), batch["target"]),
        label_names=["target"],
    ),
    "class weights under another name": case(
        lambda: rows(name="target"),
        lambda net, batch: cross_entropy(net(batch["x"]), batch["target"], weight=WEIGHTS),
        label_names=["target"],
    ),
    "labels by position": case(positions, plain(by_position)),
    "labels by position, the first of equal count": case(lambda: positions(equal=16), plain(by_position)),
    "ignored label 255": case(lambda: positions(ignored=255, equal=16), plain(by_position, ignore_index=255)),
    "ignored label of the config": case(
        lambda: positions(ignored=9, equal=16), plain(by_position, ignore_index=9)
    ),
    "ignored label that nothing names": case(
        lambda: positions(ignored=77, equal=16), plain(by_position, ignore_index=77)
    ),
    "class weights by position": case(
        positions, plain(by_position, weight=WEIGHTS), per_device_train_batch_size=1
    ),
    "mean of rows": case(lambda: positions(equal=16), plain(mean_of_rows)),
    "two losses with different items": case(
        lambda: [{**e, "row": torch.tensor(i % CLASSES)} for i, e in enumerate(positions())], token_and_row
    ),
    "weighted examples": case(lambda: [{**e, "weight": torch.rand(())} for e in rows()], weighted_examples),
    "weighted examples, the first alike": case(
        lambda: [
            {**e, "weight": torch.tensor(5.0 if i > 40 and i % 9 == 0 else 1.0)} for i, e in enumerate(rows())
        ],
        weighted_examples,
    ),
    "mask of positions, the first full": case(
        lambda: [
            {**e, "loss_mask": (torch.arange(LENGTH) < (LENGTH if i < 32 else 1 + i % LENGTH)).float()}
            for i, e in enumerate(positions(ignored=0))
        ],
        masked_positions,
        train_sampling_strategy="sequential",
    ),
    "contrastive": case(rows, contrastive),
    "preference": case(
        lambda: [{"x": torch.randn(WIDTH), "rejected": torch.randn(WIDTH)} for _ in range(96)],
        preference,
        collate=pairs,
    ),
    "sum": case(rows, plain(cross_entropy, reduction="sum")),
    "regression": case(
        lambda: rows(lambda i: i / 50, dtype=torch.float32),
        lambda net, batch: mse_loss(net(batch["x"])[:, 0], batch["labels"]),
    ),
    "several labels per example": case(
        lambda: [{"x": e["x"], "labels": (torch.rand(CLASSES) < 0.3).float()} for e in rows()],
        plain(binary_cross_entropy_with_logits, pos_weight=WEIGHTS),
    ),
    "ignored rows, sum divided by all rows": case(
        lambda: rows(lambda i: -100 if torch.rand(()) < 0.2 else i % CLASSES),
        lambda net, batch: cross_entropy(net(batch["x"]), batch["labels"], reduction="sum") / len(batch["x"]),
    ),
    "unequal lengths, one at a time": case(
        of_unequal_lengths, plain(by_position), collate=padded, per_device_train_batch_size=1
    ),
    "unequal lengths, one at a time, mean of rows": case(
        of_unequal_lengths, plain(mean_of_rows), collate=padded, per_device_train_batch_size=1
    ),
    "unequal lengths, one at a time, class weights": case(
        of_unequal_lengths,
        plain(by_position, weight=WEIGHTS),
        collate=padded,
        per_device_train_batch_size=1,
    ),
    "class weights by position, one tag each at first": case(
        one_tag_each_at_first,
        plain(by_position, weight=WEIGHTS),
        train_sampling_strategy="sequential",
    ),
    "class weights in training mode": case(rows, in_training_mode),
    "small contrastive part": case(
        rows, lambda net, batch: plain(cross_entropy)(net, batch) + 1e-4 * contrastive(net, batch)
    ),
    "root of the mean square of large targets": case(
        lambda: rows(lambda i: 1000 + (i % 7) / 3, dtype=torch.float32),
        lambda net, batch: mse_loss(net(batch["x"])[:, 0], batch["labels"]).sqrt(),
    ),
    "boxes of an image, rarely many": case(
        lambda: [
            {"x": torch.randn(WIDTH), "labels": {"boxes": 3 if i % 12 == 7 else 1, "class": i % CLASSES}}
            for i in range(96)
        ],
        by_boxes,
        collate=objects,
    ),
    "targets that are rarely NaN": case(targets_with_nan, without_nan),
    "tensor that the first forward keeps": case(rows, plain(cross_entropy), net=Kept),
    "class weights in training mode, with random numbers": case(rows, in_training_mode, net=Random),
    "gradients clipped by hooks": case(rows, plain(cross_entropy), net=Clipped),
    "two passes with dropout": case(rows, penalty_of_two_passes, net=Rdrop),
    "many classes": case(lambda: rows(lambda i: i % 80), plain(cross_entropy), net=lambda: Net(outputs=80)),
    "small number added to the divisor": case(
        positions,
        lambda net, batch: (
            by_position(net(batch["x"]), batch["labels"], reduction="sum")
            / ((batch["labels"] != -100).sum() + 1e-7)
        ),
    ),
}
"""Losses by name."""
MAY_WARN = {
    *(name for name in CASES if "class weights" in name),
    "ignored label that nothing names",
    "two losses with different items",
    "weighted examples",
    "weighted examples, the first alike",
    "mask of positions, the first full",
    "contrastive",
    "sum",
    "small contrastive part",
    "root of the mean square of large targets",
    "boxes of an image, rarely many",
    "targets that are rarely NaN",
    "gradients clipped by hooks",
    "two passes with dropout",
}
"""Losses that ExactTrainer need not get right without `num_items=`. It must warn."""


class Recorder(TrainerCallback):
    """Stores the gradient of each window."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def run(name, seed, folder):
    """Train, and return the largest relative error of a window's gradient, and the warnings."""
    chosen = CASES[name]
    torch.manual_seed(seed)
    net, data, seen, recorder = chosen.net(), chosen.data(), [], Recorder()

    def collate(examples):
        seen.append(examples)
        return chosen.collate(examples)

    class Custom(ExactTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return chosen.loss(model, inputs)

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 0.05}
    settings |= {"max_grad_norm": 0, "num_train_epochs": 1, "report_to": "none", "save_strategy": "no"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "seed": seed, "remove_unused_columns": False}
    settings |= {"optim": "sgd", "lr_scheduler_type": "constant", "dataloader_pin_memory": False}
    if "in order" in name:
        settings["train_sampling_strategy"] = "sequential"
    arguments = TrainingArguments(str(folder), **{**settings, **chosen.arguments})
    trainer = Custom(net, arguments, collate, train_dataset=data, callbacks=[recorder])
    trainer.remove_callback(PrinterCallback)
    truths = []

    def before_step(*_):
        steps = arguments.gradient_accumulation_steps
        window = [e for batch in seen[len(truths) * steps : (len(truths) + 1) * steps] for e in batch]
        loss = chosen.loss(net, chosen.collate(window))
        truths.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(before_step)
    with warnings_of() as warned:
        trainer.train()
    errors = [
        float((found - truth).norm() / truth.norm())
        for found, truth in zip(recorder.gradients, truths, strict=True)
    ]
    return max(errors), warned


class warnings_of:
    """Collect the warnings of gradacc in the block."""

    def __enter__(self):
        self.lines, self.handler = [], logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.lines.append(record.getMessage())
        logging.getLogger("gradacc_hf").addHandler(self.handler)
        return self.lines

    def __exit__(self, *_):
        logging.getLogger("gradacc_hf").removeHandler(self.handler)


def count(name, seeds, folder):
    """Count the seeds that are exact, warned of, and wrong without a warning; also warned of but exact."""
    counts = Counter()
    for seed in seeds:
        error, warned = run(name, seed, folder)
        counts["silent" if error > EXACT and not warned else "warned" if warned else "exact"] += 1
        counts["false alarm"] += bool(warned) and error <= EXACT
    return counts


@pytest.mark.parametrize("name", CASES)
def test_exact_or_warned(name, tmp_path):
    counts = count(name, range(1), tmp_path)
    assert counts["silent"] == 0
    assert name in MAY_WARN or counts["warned"] == 0


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("class weights", "to 'labels', 'next_token' or a function of the batch"),
        (
            "class weights under another name",
            "to a function of the batch, such as lambda batch: int((batch['target'] != -100).sum())",
        ),
    ],
)
def test_the_advice_names_labels_that_the_batch_has(name, advice, tmp_path):
    _, [line] = run(name, 0, tmp_path)
    assert line.endswith(
        f"If it is a mean over other items, such as with class weights, set num_items= {advice}"
    )


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("ignored labels under another name", 40),  # the first window has one label
        ("unequal lengths, one at a time, mean of rows", 90),  # label 2 is in all rows of the first sample
    ],
)
def test_a_deciding_sample_is_made_if_the_window_has_none(name, seed, tmp_path):
    error, warned = run(name, seed, tmp_path)
    assert error <= EXACT
    assert not warned


@pytest.mark.slow
def test_exact_or_warned_with_100_seeds(tmp_path):
    table = {name: count(name, range(100), tmp_path) for name in CASES}
    for name, counts in table.items():
        print(f"{name:50}", *(f"{counts[key]:4}" for key in ("exact", "warned", "silent", "false alarm")))
    assert sum(counts["silent"] for counts in table.values()) == 0
    assert sum(counts["warned"] for name, counts in table.items() if name not in MAY_WARN) == 0
