"""Run by test_distributed.py: each case on all processes, its findings from process 0 as one line of JSON.

torchrun --nproc_per_node 2 tests/helpers/distributed_worker.py ddp    (or fsdp2)
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.test_utils.scripts import test_sync
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
)
from datasets import Dataset
from preference_pairs import LOSSES, exactness, write_pairs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import BertConfig, BertModel, PrinterCallback, TrainingArguments

from gradacc_hf import (
    ExactTrainer,
    InputError,
    LoopError,
    WindowLoader,
    accumulate_in_float32,
    evaluate,
    fine_tune,
    remove_padding,
    router_loss_over_window,
)
from gradacc_hf.accumulation.batch_schedule import GrowingBatch
from gradacc_hf.accumulation.gradient_cache import COLUMNS, ContrastiveLoss, Embedder
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.accumulation.reference import (
    RecordGradients,
    norm,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.masked_head import at_labels, head_at_labels
from gradacc_hf.tasks.packing import pack
from gradacc_hf.training.autotune import Tuning, sizes_to_try
from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.training.distillation import Distillation
from gradacc_hf.training.loop import iter_windows, train
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.training.settings import LoraConfig
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(3).integers(3, 40, size=23).tolist()
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def accelerator_for(engine):
    if engine == "ddp":
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    prepare = accelerator.prepare

    def insist():  # on a CPU Accelerate ignores the plugin, and forgets what it was told while it prepares
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP

    def prepare_and_insist(*objects):
        prepared = prepare(*objects)
        insist()
        return prepared

    insist()
    accelerator.prepare = prepare_and_insist
    return accelerator


def gradients(
    engine,
    kind="token_classification",
    model_type="gpt2",
    size=10,
    empty=(),
    max_grad_norm=0.0,
    lengths=LENGTHS,
    lora=False,
    packed_and_lean=False,
    masked_only=False,
    streamed=False,
    router_loss=False,
    taught=False,
    **split,
):
    """One epoch of `train`: the worst error against the whole window at once, and what the processes saw."""
    accelerator = accelerator_for(engine)
    head, untouched = build_head(kind, model_type), build_head(kind, model_type)
    for model in (head.model, untouched.model) if lora else ():
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=4), {"classifier.weight", "classifier.bias"})
    for model in (head.model, untouched.model) if router_loss else ():
        model.router_aux_loss_coef = 0.5
        router_loss_over_window(model)
    collate, compute_loss, examples = head.collate, model_loss, head.examples(lengths)
    of_whole = model_loss
    if taught:
        make_lean(head.model, True)
        compute_loss, of_whole = (with_teacher(each.model) for each in (head, untouched))
    if packed_and_lean:
        make_lean(head.model, True)
        collate, split["pad_to"] = pack, "nothing"
    if masked_only:
        head_at_labels(head.model)
        compute_loss = loss_at_labels
    for i in empty:
        examples[i]["labels"] = [-100] * len(examples[i]["labels"])
    data = Dataset.from_list(examples).to_iterable_dataset(num_shards=3) if streamed else examples
    windows = WindowLoader(
        data, size, accelerator=accelerator, collate_fn=collate, num_items=head.num_items, **split
    )
    preflight_check(head.model, windows, compute_loss)
    recorder = RecordGradients(head.model)
    model, optimizer = accelerator.prepare(head.model, recorder)
    steps, indices = [], []

    class Watched:  # the same windows, with a note of what this process was given
        state_dict, noise = windows.state_dict, windows.noise
        record_gradient_norm = windows.record_gradient_norm

        def __iter__(self):
            for window in windows:
                steps.append(len(window))
                indices.append(window.indices.tolist())
                yield window

    if engine == "fsdp2":
        recorder = optimizer.optimizer
        recorder.model = accelerator.unwrap_model(model)
    settings = {"accelerator": accelerator, "max_grad_norm": max_grad_norm, "compute_loss": compute_loss}
    records = train(model, optimizer, Watched(), **settings)
    errors, loss_errors = [], []
    for record, window, gradient in zip(records, indices, recorder.gradients, strict=True):
        batch = untouched.collate([examples[i] for i in window])
        whole = whole_window_gradient(untouched.model, batch, of_whole)
        if max_grad_norm:
            norm = torch.stack([g.norm() for g in whole.values()]).norm()
            assert norm > max_grad_norm
            assert abs(record.grad_norm / float(norm) - 1) < 1e-5
            whole = {name: g * (max_grad_norm / (norm + 1e-6)) for name, g in whole.items()}
        errors.append(relative_error(gradient, whole))
        loss = of_whole(untouched.model(**batch), batch).detach()
        loss_errors.append(abs(record.loss / float(loss) - 1))
    return {
        "error": max(errors),
        "loss_error": max(loss_errors),
        "windows": len(errors),
        "steps": gather_object([steps]),
        "indices": indices,
        "same_windows": all(seen == indices for seen in gather_object([indices])),
        "looks_for_unused": accelerator.ddp_handler is not None,
    }


def with_teacher(student):
    """Attach a teacher with other weights to a causal language model, and return the loss."""
    teacher = build_head("causal_lm", "llama").model
    torch.manual_seed(5)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def items(logits, batch):
        return logits[:, :-1][batch["labels"][:, 1:] != -100], None

    distillation = Distillation(teacher, model_loss, items, temperature=2.0, weight=0.7)
    distillation.attach(student)
    return distillation


def noise(engine):
    """The gradient norm of each window's random part, beside that of these examples by themselves."""
    accelerator = accelerator_for(engine)
    head, untouched = (build_head("token_classification", "gpt2") for _ in range(2))
    examples = head.examples(LENGTHS)
    sizes = GrowingBatch(6, 24, patience=1)
    windows = WindowLoader(
        examples, sizes, accelerator=accelerator, collate_fn=head.collate, max_tokens=96, noise_every=1
    )
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    if engine == "fsdp2":
        optimizer.optimizer.model = accelerator.unwrap_model(model)
    smalls, saw = [], windows.record_gradient_norm
    windows.record_gradient_norm = lambda window, norm: (smalls.append(window.small), saw(window, norm))
    records = train(model, optimizer, windows, accelerator=accelerator)
    errors, losses = [], []
    for t, (small, gradient) in enumerate(zip(smalls, optimizer.optimizer.gradients, strict=True)):
        split = windows.split(0, t)
        batch = untouched.collate([examples[i] for i in split.indices])
        errors.append(relative_error(gradient, whole_window_gradient(untouched.model, batch)))
        if small is None:  # the last one, of too few examples for each process to have two micro-batches
            continue
        firsts = [process[0] for process in split.processes]
        parts = [np.concatenate(firsts)] if engine == "fsdp2" else firsts
        wholes = [
            whole_window_gradient(untouched.model, untouched.collate([examples[i] for i in part]))
            for part in parts
        ]
        expected = float(np.sqrt(np.mean([norm(whole) ** 2 for whole in wholes])))
        assert small.examples == len(parts[0])
        losses.append(abs(small.grad_norm / expected - 1))
    seen = gather_object([([r.noise_scale for r in records], sizes.sizes)])
    return {
        "error": max(errors),
        "loss_error": max(losses),
        "same_windows": all(each == seen[0] for each in seen),
        "windows": len(smalls),
        "measured": len(losses),
    }


def stream(engine):
    """Two epochs of a stream, stopped and resumed in the middle: windows, evaluation, and refusals."""
    accelerator = accelerator_for(engine)
    head = build_head("sequence_classification", "gpt2")
    examples, flat = head.examples(LENGTHS), itertools.chain.from_iterable

    class Unlike:
        """With an example of other length, or more of them, in each process."""

        def __init__(self, lengths):
            self.lengths = lengths

        def __iter__(self):
            yield from head.examples(self.lengths)

    def loader(data, **more):
        more = {"accelerator": accelerator, "collate_fn": head.collate, "max_tokens": 64, **more}
        return WindowLoader(data, 4, buffer_size=9, **more)

    def source():
        return Dataset.from_list(examples).to_iterable_dataset(num_shards=2).map(lambda example: example)

    model = accelerator.prepare(head.model)
    validation, windows = loader(source(), shuffle=False), loader(source())
    found = [evaluate(model, validation, accelerator=accelerator) for _ in range(2)]
    here, states = [], []
    for window in itertools.chain(windows, windows):
        own = flat(micro_batch.indices.tolist() for micro_batch in window.micro_batches)
        here.append((window.indices.tolist(), list(own)))
        states.append(json.loads(json.dumps(windows.state_dict())))
    resumed = loader(source(), seed=5)
    resumed.load_state_dict(states[7])
    rest, refused = [window.indices.tolist() for window in resumed], []
    process = accelerator.process_index
    for lengths in ([*LENGTHS[:15], 40 + process, *LENGTHS[16:]], LENGTHS[:15] + 4 * process * [9]):
        try:
            list(loader(Unlike(lengths), shuffle=False))
        except ValueError as error:
            refused.append(str(error))
    everywhere = gather_object([here])
    return {
        "indices": [indices for indices, _ in here],
        "same_windows": all([w for w, _ in there] == [w for w, _ in here] for there in everywhere),
        "over_processes": [
            sorted(flat(own for _, own in window)) for window in zip(*everywhere, strict=True)
        ],
        "rest": rest,
        "labels": [[int(label) for label in each.references] for each in found],
        "expected_labels": [example["labels"] for example in examples],
        "refused": gather_object([refused]),
    }


class RandomRows:
    """Examples with a number that is drawn at each reading, by a generator of the data set or of numpy."""

    def __init__(self, examples, generator):
        self.examples, self.generator = examples, generator

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return {**self.examples[index], "drawn": self.generator.random()}

    def __iter__(self):
        return (self[index] for index in range(len(self)))


def other_data(engine):
    """What each process raises in the first window of unlike data of equal lengths; "" where it trains."""
    accelerator = accelerator_for(engine)
    process = accelerator.process_index
    head = build_head("sequence_classification", "gpt2")
    examples = head.examples([9] * 20)
    moved = [examples[i] for i in np.random.default_rng(process).permutation(20)]
    swapped = [*examples[:15], *(reversed(examples[15:17]) if process else examples[15:17]), *examples[17:]]
    changed = [*examples[:7], {**examples[7], "labels": 9 + process}, *examples[8:]]
    rounded = [{**example, "audio": np.ones(99) * (1 + 1e-7 * process)} for example in examples]
    own, shared = np.random.default_rng(process), np.random

    class Streamed:
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return iter(self.rows)

    cases = {
        "alike": (examples, {}),
        "rounded": (rounded, {}),
        "drawn by numpy": (RandomRows(examples, shared), {}),
        "drawn by the data set": (RandomRows(examples, own), {}),
        "stream alike": (Streamed(examples), {}),
        "stream drawn": (Streamed(RandomRows(examples, own)), {}),
        "stream drawn by numpy": (Streamed(RandomRows(examples, shared)), {}),
        "moved": (moved, {}),
        "moved, drawn by numpy": (RandomRows(moved, shared), {}),
        "stream moved, drawn by numpy": (Streamed(RandomRows(moved, shared)), {}),
        "moved, with a worker": (moved, {"num_workers": 1}),
        "swapped": (swapped, {}),
        "changed": (changed, {}),
        "stream moved": (Streamed(moved), {}),
        "stream changed": (Streamed(changed), {"buffer_size": 9}),
        "seed": (examples, {"seed": process}),
        "bound": (examples, {"max_tokens": 9 + 90 * process}),
    }
    found = {}
    for name, (data, settings) in cases.items():
        shared.seed(process)
        windows = WindowLoader(
            data, 8, accelerator=accelerator, collate_fn=head.collate, **{"max_tokens": 36, **settings}
        )
        windows_seen = 0
        for evaluates in (True, False) if name == "changed" else (False,):
            raised = ""
            try:
                for _ in windows.micro_batches() if evaluates else windows:
                    windows_seen += 1
            except ValueError as error:
                raised = str(error)
            key = f"{name}, evaluated" if evaluates else name
            found[key] = gather_object([(raised, windows_seen)])
    return {"raised": found}


def loss_at_labels(outputs, batch):
    labels = batch["labels"][batch["labels"] != -100]
    return torch.nn.functional.cross_entropy(at_labels(outputs.logits, batch["labels"]), labels)


def evaluation(engine):
    """Predictions come back once each, in order, and training goes on exactly after an evaluation."""
    accelerator = accelerator_for(engine)
    head = build_head("sequence_classification", "gpt2")
    examples = head.examples(LENGTHS)
    data = {"accelerator": accelerator, "collate_fn": head.collate, "max_tokens": 64}
    windows, validation = (
        WindowLoader(examples, 10, **data),
        WindowLoader(examples, 10, shuffle=False, **data),
    )
    seen = []

    def validate(model):
        found = evaluate(model, validation, accelerator=accelerator)
        seen.append([int(label) for label in found.references] == [example["labels"] for example in examples])
        return {"loss": found.loss}

    summary = fine_tune(
        head.model,
        torch.optim.AdamW(head.model.parameters(), lr=1e-3),
        windows,
        accelerator=accelerator,
        epochs=2,
        validate=validate,
        eval_every=1,
    )
    return {
        "each_once": seen,
        "loss": summary["eval"]["loss"],
        "windows": summary["windows"],
    }


def sizes(engine):
    """Sizes of micro-batches are tried by all processes alike, however long a window takes each of them."""
    accelerator = accelerator_for(engine)
    head = build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(LENGTHS * 8), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=160
    )
    optimizer = torch.optim.SGD(head.model.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(head.model, optimizer)
    tuning = Tuning(windows, sizes_to_try(windows))
    for record in iter_windows(model, optimizer, windows, accelerator=accelerator, epochs=2):
        if tuning.said is None:
            tuning.record(record.seconds * (1 + accelerator.process_index))
    found = [*(trial.max_tokens for trial in tuning.trials), windows.bound.max_tokens, tuning.said]
    return {"same": all(others == found for others in gather_object([found])), "said": tuning.said}


def out_of_memory(engine):
    """The last process has no memory for more than 40 tokens at once, beside a run that has."""
    accelerator, found = accelerator_for(engine), {}
    for short in (False, True):
        head = build_head("sequence_classification", "bert")
        windows = WindowLoader(
            head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=160
        )
        here = short and accelerator.is_last_process

        def refuse(module, inputs, named, here=here):
            if here and named["input_ids"].numel() > 40 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")

        head.model.register_forward_pre_hook(refuse, with_kwargs=True)
        recorder = RecordGradients(head.model)
        model, optimizer = accelerator.prepare(head.model, recorder)
        records = train(model, optimizer, windows, accelerator=accelerator)
        examples = sum(record.examples for record in records)
        found[short] = recorder.gradients, [record.loss for record in records], examples, windows.replays
    undisturbed, replayed = found[False], found[True]
    pairs = list(zip(replayed[0], undisturbed[0], strict=True))
    return {
        "gradient_error": max(relative_error(*pair) for pair in pairs),
        "losses": [undisturbed[1], replayed[1]],
        "examples": replayed[2],
        "replays": gather_object([replayed[3]]),
    }


def collectives(engine):
    """How often gradients, and what else, cross processes in a window of one and of many micro-batches."""
    found = {}
    for size in (1, 10):
        accelerator = accelerator_for(engine)
        head = build_head("sequence_classification", "bert")
        windows = WindowLoader(
            head.examples(LENGTHS),
            10,
            accelerator=accelerator,
            collate_fn=head.collate,
            micro_batch_size=size,
        )
        model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
        counts, buckets = [], set()

        def count(state, bucket, counts=counts, buckets=buckets):
            counts[-1]["gradient buckets"] += 1
            buckets.add(bucket.index())
            return allreduce_hook(None, bucket)

        def counted(function, name, counts=counts):
            def call(*arguments, **named):
                counts[-1][name] = counts[-1].get(name, 0) + 1
                return function(*arguments, **named)

            return call

        if accelerator.num_processes > 1:
            model.register_comm_hook(None, count)
        names = (
            "all_gather",
            "all_gather_into_tensor",
            "all_reduce",
            "broadcast",
            "barrier",
            "gather_object",
        )
        before = {name: getattr(torch.distributed, name) for name in names}
        for name, function in before.items():
            setattr(torch.distributed, name, counted(function, name))
        counts.append({"gradient buckets": 0})
        steps = []
        for record in iter_windows(model, optimizer, windows, accelerator=accelerator, epochs=2):
            counts.append({"gradient buckets": 0})
            steps.append(record.accumulation_steps)
        for name, function in before.items():
            setattr(torch.distributed, name, function)
        found[f"of {size}"] = {"counts": counts[:-1], "steps": steps, "buckets": len(buckets)}
    return found


def sharded_gradients(engine):
    """The numbers that gradients take on a process between a window's micro-batches, of all there are."""
    held = {}
    for whole in (False, True):
        accelerator = accelerator_for(engine)
        head = build_head("sequence_classification", "gpt2")
        total = sum(parameter.numel() for parameter in head.model.parameters())
        windows = WindowLoader(
            head.examples(LENGTHS),
            10,
            accelerator=accelerator,
            collate_fn=head.collate,
            micro_batch_size=2,
            whole_gradients=whole,
        )
        model, _ = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
        window = next(iter(windows))
        shares = []
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                shares.append(sum(gradient.to_local().numel() for gradient in gradients) / total)
        held["whole" if whole else "shards"] = shares
    return held


def goes_on(engine):
    """A run in the folder RUN goes on there, and its last process is told to stop in window STOP.

    From window SHORT on, that process has no memory for more than 40 tokens at once.
    """
    folder, stop = Path(os.environ["RUN"]), int(os.environ["STOP"])
    short, max_tokens = int(os.environ.get("SHORT", 99)), int(os.environ.get("MAX_TOKENS", 64))
    accelerator = accelerator_for(engine)
    head = build_head("sequence_classification", "gpt2")
    windows = WindowLoader(
        head.examples(LENGTHS), 4, accelerator=accelerator, collate_fn=head.collate, max_tokens=max_tokens
    )

    def compute_loss(outputs, batch):
        window = windows.epoch * 6 + windows.window
        if window == stop and accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        if window >= short and accelerator.is_last_process and batch["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model_loss(outputs, batch)

    optimizer = torch.optim.AdamW(head.model.parameters(), lr=1e-3)
    checkpoints = Checkpoints(every=1, resume_from=newest_checkpoint(folder, accelerator))
    settings = {"epochs": 2, "compute_loss": compute_loss, "output_dir": folder, "checkpoints": checkpoints}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    summary = fine_tune(
        head.model, optimizer, windows, accelerator=accelerator, scheduler=scheduler, **settings
    )
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {
        "stopped_after": summary["stopped_after"],
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "examples": sum(row["examples"] for row in rows),
    }


def masked_at_random(engine):
    """A collate function that masks anew each time may leave an example without items: no NaN, no hang."""
    accelerator = accelerator_for(engine)
    head = build_head("masked_lm", "bert")

    def collate(examples):
        batch = head.collate(examples)
        hidden = torch.rand(batch["input_ids"].shape) < 0.15
        return batch | {"labels": torch.where(hidden, batch["input_ids"], -100)}

    windows = WindowLoader(
        head.examples(LENGTHS), 3, accelerator=accelerator, collate_fn=collate, micro_batch_size=1
    )
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    losses = [record.loss for record in train(model, optimizer, windows, accelerator=accelerator)]
    return {"finite": all(np.isfinite(losses)), "windows": len(losses)}


def calls_left_out(engine):
    """The error of each process for loops that leave a call out, on all processes or on the last one."""
    accelerator, head = accelerator_for(engine), build_head("sequence_classification", "bert")
    weights, last = head.model.parameters(), accelerator.num_processes - 1
    windows = WindowLoader(
        head.examples(LENGTHS[:12]), 12, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2
    )
    model, prepared = accelerator.prepare(head.model, torch.optim.SGD(weights, lr=0.0))

    def error(optimizer=prepared, accumulates=True, weighs=True):
        try:
            for window in windows:
                for batch in window:
                    with accelerator.accumulate(model) if accumulates else contextlib.nullcontext():
                        loss = model(**batch).loss
                        accelerator.backward(window.weigh(loss) if weighs else loss)
                        optimizer.step()
                        optimizer.zero_grad()
        except LoopError as found:
            return gather_object([str(found)])
        return gather_object([""])

    return {
        "none": error(),
        "accumulate": error(accumulates=False),
        "weigh": error(weighs=False),
        "weigh_on_the_last": error(weighs=accelerator.process_index != last),
        "prepare": error(optimizer=torch.optim.SGD(head.model.parameters(), lr=0.0)),
    }


def bf16_weights(engine):
    """Bf16 weights train on one process; on several, the line that they are refused with."""
    accelerator, model = accelerator_for(engine), torch.nn.Linear(2, 1).bfloat16()
    refused = ""
    try:
        accumulate_in_float32(model, torch.optim.SGD(model.parameters()))
    except InputError as error:
        refused = str(error)
    return {"refused": refused, "processes": accelerator.num_processes}


def beside_test_sync(engine):
    """Accelerate's own suite of `accumulate()`, between passes of ours; and what it asks, of our windows."""
    in_sync = synchronised(accelerator_for(engine))
    accelerator = Accelerator(cpu=True)
    processes = accelerator.num_processes
    if processes == 1:
        test_sync.test_dataloader_break()
        test_sync.test_noop_sync(accelerator)
    else:
        test_sync.test_distributed_sync(accelerator)
        test_sync.test_distributed_sync_multiple_fwd(accelerator)
        for settings in itertools.product(
            [True, False] if 16 % processes == 0 else [False], *2 * [[True, False]]
        ):
            test_sync.test_gradient_accumulation(*settings)
            test_sync.test_gradient_accumulation_with_opt_and_scheduler(*settings)
    test_sync.test_gradient_accumulation_with_opt_and_scheduler()
    after = gradients(engine, max_tokens=64)
    return {**after, "in_sync": in_sync, "in_sync_after": synchronised(accelerator_for(engine))}


def synchronised(accelerator):
    """Of each window: are the gradients of all processes the same after each of its micro-batches?"""
    head = build_head("token_classification", "gpt2")
    data = {"accelerator": accelerator, "collate_fn": head.collate, "micro_batch_size": 2}
    windows, found = WindowLoader(head.examples(LENGTHS[:18]), 18, **data), []
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
                found.append(norm.item())
                optimizer.step()
                optimizer.zero_grad()
    return [len(set(norms)) == 1 for norms in zip(*gather_object([found]), strict=True)]


def of_trainer(**more):
    """Arguments of a Trainer: windows of two micro-batches of two examples, in the order of the data."""
    return TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        **more,
    )


def exact_trainer(engine, kind, model_type, average=True, router_loss=False):
    """Two windows of ExactTrainer: errors against each whole window, or the mean of the processes' parts."""
    head, untouched = build_head(kind, model_type), build_head(kind, model_type)
    for model in (head.model, untouched.model) if router_loss else ():
        model.router_aux_loss_coef = 0.5
        router_loss_over_window(model)
    examples = head.examples([*LENGTHS, 9])
    more = {"max_grad_norm": 0, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    arguments = of_trainer(max_steps=2, average_tokens_across_devices=average, **more)
    recorder, data = RecordGradients(head.model), {"train_dataset": examples, "eval_dataset": examples[:1]}
    trainer = ExactTrainer(head.model, arguments, head.collate, optimizers=(recorder, None), **data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    processes, windows = trainer.accelerator.num_processes, []
    for start in (0, 4 * processes):
        window = examples[start : start + 4 * processes]
        if not average:  # a process's micro-batches: every P-th pair
            pairs = [window[i : i + 2] for i in range(0, len(window), 2)]
            parts = [pairs[process::processes] for process in range(processes)]
            windows.append([[example for pair in part for example in pair] for part in parts])
        else:
            windows.append([window])
    errors, losses = [], [row["loss"] for row in trainer.state.log_history if "loss" in row]
    evaluated = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    untouched.model.eval()  # where the router loss is left out
    loss_errors = [abs(evaluated / float(untouched.model(**untouched.collate(examples[:1])).loss) - 1)]
    untouched.model.train()
    for parts, gradient, loss in zip(windows, recorder.gradients, losses, strict=True):
        wholes = [whole_window_gradient(untouched.model, untouched.collate(part)) for part in parts]
        mean = {name: sum(whole[name] for whole in wholes) / len(wholes) for name in wholes[0]}
        errors.append(relative_error(gradient, mean))
        expected = np.mean([float(untouched.model(**untouched.collate(part)).loss) for part in parts])
        loss_errors.append(abs(loss / expected - 1))
    return {"error": max(errors), "loss_error": max(loss_errors), "same_windows": True}


def exact_trainer_late_label(engine):
    """The lines of ExactTrainer if a heavier label comes in the third window, in one process alone."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    weight, lines = torch.tensor([1.0, 1.0, 30.0]), []
    late = 2 * 2 * processes * 2 + 2 * processes - 1  # the last process's first micro-batch of the window
    torch.manual_seed(0)
    labels = [2 if i == late else i % 2 for i in range(16 * processes)]
    examples = [{"x": torch.randn(4), "labels": torch.tensor(label)} for label in labels]

    class Weighted(ExactTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"], weight)

    arguments = of_trainer(max_steps=4)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logging.getLogger("gradacc_hf").addHandler(handler)
    trainer = Weighted(torch.nn.Linear(4, 3), arguments, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logging.getLogger("gradacc_hf").removeHandler(handler)
    return {"lines": lines, "trained": trainer.state.global_step}


class TwoTasks(torch.nn.Module):
    """Two heads, each with labels of its own: most examples have one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = (torch.nn.Linear(*size) for size in ((4, 8), (8, 3), (8, 2)))

    def forward(self, x, a, b):
        hidden = torch.tanh(self.body(x))
        cross_entropy = torch.nn.functional.cross_entropy
        return {"a": cross_entropy(self.a(hidden), a), "b": cross_entropy(self.b(hidden), b)}


def several_losses(engine):
    """Windows of two losses, where many micro-batches have items of one: the worst error of a gradient."""

    def losses(outputs, batch):
        return outputs

    accelerator, generator = accelerator_for(engine), torch.Generator().manual_seed(0)
    examples = [
        {
            "x": torch.randn(4, generator=generator),
            "a": torch.tensor(i % 3 if i % 4 == 0 else -100),
            "b": torch.tensor(i % 2 if i % 4 else -100),
        }
        for i in range(30)
    ]
    num_items = {name: partial(count_of, name) for name in "ab"}
    data = {"accelerator": accelerator, "micro_batch_size": 2, "num_items": num_items}
    windows, model, untouched = WindowLoader(examples, 15, **data), TwoTasks(), TwoTasks()
    preflight_check(model, windows, losses)
    model, optimizer = accelerator.prepare(model, RecordGradients(model))
    records = train(model, optimizer, windows, accelerator=accelerator, compute_loss=losses)
    errors, loss_errors = [], []
    plan = WindowLoader(examples, 15, **data)
    for record, gradient in zip(records, optimizer.optimizer.gradients, strict=True):
        batch = plan.collated(plan.plan.indices(0, record.window - 1)).batch
        errors.append(relative_error(gradient, whole_window_gradient(untouched, batch, losses)))
        loss_errors.append(abs(record.loss / float(sum(untouched(**batch).values())) - 1))
    return {"error": max(errors), "loss_error": max(loss_errors), "same_windows": True}


def mixture(engine, lean=False, **split):
    """Windows of two sources with weights: the worst error against one example after the other."""
    accelerator, (head, untouched) = accelerator_for(engine), [build_head("causal_lm", "llama") for _ in "ab"]
    examples, weights = head.examples(LENGTHS), np.arange(len(LENGTHS)) % 4 / 2
    sources = ["chats"] * 15 + ["alpaca"] * (len(LENGTHS) - 15)
    if lean:
        make_lean(head.model, True)
        remove_padding(head.model, head.collate(examples[:4]))
        split["padding_free"] = True
    windows = WindowLoader(
        examples,
        7,
        accelerator=accelerator,
        collate_fn=head.collate,
        num_items=head.num_items,
        weights=weights,
        sources=sources,
        shares={"chats": 2, "alpaca": 1},
        **split,
    )
    preflight_check(head.model, windows)
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    records = train(model, optimizer, windows, accelerator=accelerator)
    indices = [windows.plan.indices(0, record.window - 1).tolist() for record in records]
    errors, loss_errors = [], []
    for record, window, gradient in zip(records, indices, optimizer.optimizer.gradients, strict=True):
        untouched.model.zero_grad()
        parts = {"chats": [0.0, 0.0], "alpaca": [0.0, 0.0]}
        for index in window:
            batch = untouched.collate([examples[index]])
            items = windows.count_items(batch) * weights[index]
            parts[sources[index]][0] += untouched.model(**batch).loss * items
            parts[sources[index]][1] += items
        losses, items = zip(*parts.values(), strict=True)
        whole = sum(losses) / sum(items)
        whole.backward()
        errors.append(relative_error(gradient, read_gradient(untouched.model)))
        pairs = [(record.loss, whole)]
        pairs += [(record.source_losses[name], loss / items) for name, (loss, items) in parts.items()]
        loss_errors += [abs(found / float(exact.detach()) - 1) for found, exact in pairs]
    return {
        "error": max(errors),
        "loss_error": max(loss_errors),
        "indices": indices,
        "same_windows": all(seen == indices for seen in gather_object([indices])),
    }


def count_of(name, batch):
    return int((batch[name] != -100).sum())


def contrastive(engine, size=22, **split):
    """Windows of pairs: the worst error against all pairs of a window at once."""
    accelerator, loss = accelerator_for(engine), ContrastiveLoss(0.1)
    lengths = np.random.default_rng(0).integers(3, 30, size=(22, 3))
    draw = np.random.default_rng(1)
    pairs = [
        {c: draw.integers(1, 100, size=n).tolist() for c, n in zip(COLUMNS, row, strict=True)}
        for row in lengths
    ]
    for to, of in ((5, 0), (21, 0), (13, 1)):  # equal texts are not negatives
        pairs[to]["positive"] = pairs[of]["positive"]
    pairs[2]["anchor"] = pairs[20]["anchor"]
    lengths = np.array([[len(pair[column]) for column in COLUMNS] for pair in pairs])

    def embedder():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        return Embedder(BertModel(BertConfig(vocab_size=100, initializer_range=0.3, **NO_DROPOUT, **sizes)))

    def collate(examples):
        batch = {}
        for column in COLUMNS:
            rows = [torch.tensor(example[column]) for example in examples]
            batch[f"{column}_input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            batch[f"{column}_attention_mask"] = (batch[f"{column}_input_ids"] > 0).long()
        return batch

    windows = WindowLoader(
        pairs,
        size,
        accelerator=accelerator,
        collate_fn=collate,
        num_items=lambda batch: len(batch["anchor_input_ids"]),
        lengths=lengths,
        **split,
    )
    trained, untouched = embedder(), embedder()
    preflight_check(trained, windows, loss)
    model, optimizer = accelerator.prepare(trained, RecordGradients(trained))
    recorder = optimizer.optimizer
    recorder.model = accelerator.unwrap_model(model)
    records = train(model, optimizer, windows, accelerator=accelerator, compute_loss=loss)
    errors, loss_errors, steps = [], [], []
    for t, (record, gradient) in enumerate(zip(records, recorder.gradients, strict=True)):
        batch = collate([pairs[i] for i in windows.plan.indices(0, t)])
        errors.append(relative_error(gradient, whole_window_gradient(untouched, batch, loss)))
        whole = loss(untouched(**batch), batch).item()
        loss_errors.append(abs(record.loss - whole) / max(whole, 1e-3))  # that of a single pair may be 0
        steps.append([len(process) for process in windows.split(0, t).processes])
    return {"error": max(errors), "loss_error": max(loss_errors), "same_windows": True, "planned": steps}


def preference(engine):
    """Windows of every loss of preferences: the worst error against each window at once."""
    with tempfile.TemporaryDirectory() as folder:
        # `save_pretrained` writes in the main process only.
        is_first = accelerator_for(engine).is_main_process
        [settings] = broadcast_object_list([write_pairs(folder) if is_first else None])
        found = {}
        for name, flags in LOSSES.items():
            accelerator = accelerator_for(engine)
            found[name], _, _ = exactness([*settings, *flags], accelerator, max_tokens=300)
        accelerator.wait_for_everyone()  # before the folder is removed
    return {
        "error": max(one["error"] for one in found.values()),
        "loss_error": max(one["loss_error"] for one in found.values()),
        "same_windows": True,
        "by_loss": found,
    }


CASES = {
    "unequal": lambda engine: gradients(engine, max_tokens=64),
    "next_token": lambda engine: gradients(engine, "causal_lm", "gpt2", max_tokens=64),
    "one_by_one": lambda engine: gradients(engine, micro_batch_size=1, size=7),
    "fewer_examples_than_processes": lambda engine: gradients(
        engine, size=1, max_tokens=64, lengths=LENGTHS[:5]
    ),
    "no_items_here_and_there": lambda engine: gradients(
        engine, size=5, micro_batch_size=1, empty=(*range(5), 6, 7, 8, 9, 12, 20), shuffle=False
    ),
    "clipped": lambda engine: gradients(engine, max_tokens=64, max_grad_norm=0.01),
    "unused_parameters": lambda engine: gradients(
        engine, model_type="fnet", max_tokens=64, lengths=[12] * 23
    ),
    "lora": lambda engine: gradients(engine, model_type="bert", max_tokens=64, lora=True),
    "packed_and_lean": lambda engine: gradients(
        engine, "causal_lm", "llama", max_tokens=64, packed_and_lean=True
    ),
    "masked_lm_at_labels": lambda engine: gradients(
        engine, "masked_lm", "bert", max_tokens=64, masked_only=True
    ),
    "workers": lambda engine: gradients(engine, max_tokens=64, num_workers=1),
    "streamed": lambda engine: gradients(engine, max_tokens=64, streamed=True, buffer_size=8),
    "noise": noise,
    "stream": stream,
    "other_data": other_data,
    "several_losses": several_losses,
    "mixture": lambda engine: mixture(engine, max_tokens=90),
    "mixture_lean_without_padding": lambda engine: mixture(engine, lean=True, max_tokens=90),
    "contrastive": lambda engine: contrastive(engine, max_tokens=160),
    "contrastive_fewer_pairs_than_processes": lambda engine: contrastive(engine, size=2, max_tokens=160),
    "router_loss": lambda engine: gradients(engine, "causal_lm", "mixtral", router_loss=True, max_tokens=64),
    "preference": preference,
    "taught": lambda engine: gradients(engine, "causal_lm", "llama", taught=True, max_tokens=64),
    "masked_at_random": masked_at_random,
    "out_of_memory": out_of_memory,
    "calls_left_out": calls_left_out,
    "bf16_weights": bf16_weights,
    "evaluation": evaluation,
    "sizes": sizes,
    "goes_on": goes_on,
    "collectives": collectives,
    "sharded_gradients": sharded_gradients,
    "beside_test_sync": beside_test_sync,
    # last, as TrainingArguments makes an Accelerate state of its own
    "exact_trainer_means": lambda engine: exact_trainer(engine, "token_classification", "bert"),
    "exact_trainer_sums": lambda engine: exact_trainer(engine, "causal_lm", "gpt2"),
    "exact_trainer_router_loss": lambda engine: exact_trainer(
        engine, "causal_lm", "mixtral", router_loss=True
    ),
    "exact_trainer_each_its_own": lambda engine: exact_trainer(engine, "causal_lm", "gpt2", average=False),
    "exact_trainer_late_label": exact_trainer_late_label,
}


def serve():
    """Return the command line of each launch in a fork of this process, which has imported all modules.

    A launch is a line of the input, in JSON: environment variables, the file for the output, and the command
    line. This process prints the exit code of the fork.
    """
    for line in sys.stdin:
        variables, output, words = json.loads(line)
        if fork := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
            continue
        os.environ.update(variables)
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        return words
    sys.exit()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    engine, *chosen = serve() if sys.argv[1:] == ["serve"] else sys.argv[1:]
    for name in chosen or [name for name in CASES if name not in ("goes_on", "sharded_gradients")]:
        found = CASES[name](engine)
        if Accelerator(cpu=True).is_main_process:
            print(json.dumps({"case": name, **found}), flush=True)
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
