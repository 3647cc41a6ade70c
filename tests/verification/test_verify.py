"""`verify` reports whether a loop is exact for the user's model and data, and the reason if it is not."""

import copy
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import default_collate

from gradacc_hf import WindowLoader, remove_padding
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.cli import main as cli
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.utils.paths import bundle_root
from gradacc_hf.verification.exactness import verify
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [5, 9, 30, 12, 7, 7, 21, 30, 14, 3]


def loader(head, lengths=LENGTHS, **arguments):
    examples = head.examples(lengths)
    if head.kind == "causal_lm":
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    arguments = {"collate_fn": head.collate, "num_items": head.num_items, "micro_batch_size": 4, **arguments}
    return WindowLoader(examples, len(examples), accelerator=Accelerator(cpu=True), **arguments)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("sequence_classification", "bert"), ("token_classification", "roberta"), ("causal_lm", "gpt2")],
)
def test_a_separable_head_is_exact(kind, model_type):
    head = build_head(kind, model_type)
    result = verify(head.model, loader(head))
    assert result.exact
    assert result.loop.norm_ratio == pytest.approx(1)
    assert result.loop.cosine == pytest.approx(1)
    assert result.reasons == ()
    assert result.verdict.startswith("Exact: 3 micro-batches give the gradient of the whole window, with a ")


def test_trainer_multiplies_by_the_accumulation_steps_where_it_does():
    head = build_head("sequence_classification", "bert")
    trainer = verify(head.model, loader(head, [12] * 12)).trainer
    assert trainer.norm_ratio == pytest.approx(3, rel=1e-4)
    assert trainer.cosine == pytest.approx(1)
    assert not trainer.exact


def test_a_loss_of_ones_own_is_given_to_trainer_too():
    head = build_head("sequence_classification", "bert")
    weight = torch.tensor([1.0, 5.0, 0.2])
    result = verify(
        head.model,
        loader(head, [12] * 12, num_items=lambda batch: float(weight[batch["labels"]].sum())),
        lambda outputs, batch: torch.nn.functional.cross_entropy(outputs.logits, batch["labels"], weight),
    )
    assert result.exact
    assert result.trainer.norm_ratio > 1.5


def test_padding_that_reaches_the_loss_is_named_and_its_cure_works():
    head = build_head("question_answering", "bert")
    result = verify(head.model, loader(head), trainer=False)
    (reason,) = result.reasons
    assert not result.exact
    assert reason.what.startswith("padding reaches the loss: an example of 3 tokens has the loss ")
    assert "pad_to='window'" in reason.cure
    assert verify(head.model, loader(head, pad_to="window"), trainer=False).exact


def test_padding_is_named_also_where_collate_fn_cannot_be_told_how_far():
    head = build_head("question_answering", "bert")
    windows = loader(head, collate_fn=lambda examples: head.collate(examples))
    (reason,) = verify(head.model, windows, trainer=False).reasons
    assert reason.what == "padding reaches the loss"


@pytest.mark.parametrize(
    ("kind", "counted", "cure"),
    [("causal_lm", "labels", "next_token"), ("token_classification", "next_token", "labels")],
)
def test_the_items_that_would_make_it_exact_are_found(kind, counted, cure):
    head = build_head(kind, "gpt2")
    (reason,) = verify(head.model, loader(head, num_items=counted), trainer=False).reasons
    assert reason.what == "the loss is a mean over different items from the counted ones"
    assert reason.cure == f"num_items='{cure}' makes it exact"
    assert verify(head.model, loader(head, num_items=cure), trainer=False).exact


def test_a_mean_over_examples_of_means_over_tokens_is_found():
    head = build_head("token_classification", "bert")

    def loss(outputs, batch):
        losses = torch.nn.functional.cross_entropy(outputs.logits.mT, batch["labels"], reduction="none")
        kept = (batch["labels"] != -100).float()
        return ((losses * kept).sum(1) / kept.sum(1)).mean()

    (reason,) = verify(head.model, loader(head), loss, trainer=False).reasons
    assert reason.cure == "num_items=lambda batch: len(batch['labels']) makes it exact"


@pytest.mark.parametrize("takes_pad_to", [True, False])
def test_two_losses_with_items_of_their_own_are_named_and_padding_is_ruled_out(takes_pad_to, caplog):
    """As in BERT's pretraining: masked tokens, and sentence pairs."""
    head = build_head("masked_lm", "bert")
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(head.model.config)

    def collate(examples, pad_to=None):
        labels = torch.tensor([example["input_ids"][0] % 2 for example in examples])
        return {**head.collate(examples, pad_to), "next_sentence_label": labels}

    windows = loader(head, collate_fn=collate if takes_pad_to else lambda examples: collate(examples))
    (reason,) = verify(model, windows, trainer=False).reasons
    preflight_check(model, windows)
    assert reason.what == "the loss is a mean over different items from the counted ones"
    for text in (reason.cure, caplog.text):
        assert "num_items={'mlm': …, 'nsp': …}, and weigh({'mlm': …, 'nsp': …})" in text
        assert "padding" not in text
        assert "pad_to" not in text
    several = {"mlm": "labels", "nsp": lambda batch: len(batch["next_sentence_label"])}

    def losses(outputs, batch):
        cross_entropy = torch.nn.functional.cross_entropy
        return {
            "mlm": cross_entropy(outputs.prediction_logits.mT, batch["labels"]),
            "nsp": cross_entropy(outputs.seq_relationship_logits, batch["next_sentence_label"]),
        }

    assert verify(model, loader(head, collate_fn=collate, num_items=several), losses, trainer=False).exact


def test_a_sum_is_told_from_a_mean():
    head = build_head("sequence_classification", "bert")

    def loss(outputs, batch):
        return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="sum")

    (reason,) = verify(head.model, loader(head), loss, trainer=False).reasons
    assert reason.what == "the loss is a sum over the micro-batch, not a mean"


def test_in_batch_negatives_are_named():
    class Encoder(torch.nn.Linear):
        def forward(self, x):
            return SimpleNamespace(embeddings=super().forward(x))

    def loss(outputs, batch):
        similarities = outputs.embeddings @ batch["x"].T
        return torch.nn.functional.cross_entropy(similarities, torch.arange(len(similarities)))

    torch.manual_seed(0)
    windows = WindowLoader(
        [{"x": torch.randn(4)} for _ in range(8)],
        8,
        micro_batch_size=4,
        num_items=lambda batch: len(batch["x"]),
        accelerator=Accelerator(cpu=True),
    )
    (reason,) = verify(Encoder(4, 4), windows, loss, trainer=False).reasons
    assert "in-batch negatives" in reason.what
    assert "gradient cache" in reason.cure


def test_batch_norm_is_named_with_the_group_norm_that_fits():
    head = build_head("image_classification", "resnet")
    (reason,) = verify(head.model, loader(head, LENGTHS[:8]), trainer=False).reasons
    assert reason.what.startswith("16 BatchNorm modules (resnet.embedder.embedder.normalization, ")
    name = "resnet.embedder.embedder.normalization"
    module = head.model.get_submodule(name)
    assert f"torch.nn.GroupNorm(16, {module.num_features}) instead of {name}" in reason.cure


class Centred(torch.nn.Module):
    """Takes the mean of the micro-batch away while it trains, as losses and norms of one's own do."""

    def forward(self, hidden):
        return hidden - hidden.mean(0) if self.training else hidden


def test_a_module_that_mixes_examples_in_training_mode_only_is_named():
    head = build_head("sequence_classification", "bert")
    head.model.classifier = torch.nn.Sequential(Centred(), head.model.classifier)
    [reason] = verify(head.model, loader(head), trainer=False).reasons
    assert "with 1 Centred (classifier.0 …) in training mode" in reason.what
    head.model.classifier[0].train = lambda mode=True: head.model.classifier[0]
    head.model.classifier[0].training = False
    assert verify(head.model, loader(head), trainer=False).exact


def test_a_router_loss_is_named_and_its_cure_works():
    head = build_head("causal_lm", "mixtral")
    head.model.config.output_router_logits = True
    head.model.config.router_aux_loss_coef = head.model.router_aux_loss_coef = 0.5
    result = verify(head.model, loader(head), trainer=False)
    assert not result.exact
    assert result.reasons[0].what.startswith("the router loss of the mixture of experts")
    head.model.config.output_router_logits = False
    assert verify(head.model, loader(head), trainer=False).exact


def test_a_router_loss_too_small_to_be_seen_in_the_loss_is_named(capsys):
    head = build_head("causal_lm", "mixtral")
    head.model.config.output_router_logits = True  # its coefficient is 0.001
    result = verify(head.model, loader(head), trainer=False)
    assert 1e-5 < result.loop.error < 1e-3
    assert "router loss" in result.verdict


def test_masking_at_random_is_named():
    head = build_head("masked_lm", "bert")

    def collate(examples):
        batch = head.collate(examples)
        return {
            **batch,
            "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 4, batch["input_ids"]),
        }

    (reason,) = verify(head.model, loader(head, collate_fn=collate), trainer=False).reasons
    assert reason.what == "collate_fn returns a different input_ids for the same example each time"


def test_dropout_is_off_while_it_looks_and_on_again_after_that():
    head = build_head("sequence_classification", "bert")
    for module in head.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    assert verify(head.model, loader(head), trainer=False).exact
    probabilities = {m.p for m in head.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert probabilities == {0.3}


def test_everything_is_left_as_it_was_and_can_train():
    head = build_head("token_classification", "bert")
    head.model.eval()
    before = copy.deepcopy(head.model.state_dict())
    windows = loader(head)
    state, drawn = windows.state_dict(), torch.random.get_rng_state()
    verify(head.model, windows)
    assert windows.state_dict() == state
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not head.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in head.model.state_dict().items())
    assert all(parameter.grad is None for parameter in head.model.parameters())
    accelerator = windows.accelerator  # TrainingArguments has cleared its state in between
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                optimizer.step()
    assert window.loss > 0


def test_modules_that_stay_frozen_and_gradients_that_are_there_stay_so():
    head = build_head("sequence_classification", "bert")
    head.model.train()
    head.model.bert.encoder.eval()
    head.model.classifier.weight.grad = torch.ones_like(head.model.classifier.weight)
    verify(head.model, loader(head))
    assert head.model.training
    assert not head.model.bert.encoder.training
    assert head.model.classifier.weight.grad.eq(1).all()


def test_a_window_of_one_micro_batch_is_cut_finer_as_else_nothing_is_accumulated():
    head = build_head("causal_lm", "gpt2")
    result = verify(head.model, loader(head, num_items="labels", micro_batch_size=16), trainer=False)
    assert result.accumulation_steps == (4,)
    assert not result.exact


def test_items_are_told_from_padding_where_collate_fn_cannot_be_told_how_far():
    head = build_head("causal_lm", "gpt2")
    windows = loader(head, num_items="labels", collate_fn=lambda examples: head.collate(examples))
    (reason,) = verify(head.model, windows, trainer=False).reasons
    assert reason.cure == "num_items='next_token' makes it exact"


def test_items_are_told_where_windows_are_padded_alike():
    head = build_head("question_answering", "bert")
    windows = loader(head, pad_to="window", num_items=lambda batch: int(batch["attention_mask"].sum()))
    (reason,) = verify(head.model, windows, trainer=False).reasons
    assert reason.cure == "num_items='labels' makes it exact"


def test_a_batch_norm_that_is_frozen_is_not_to_blame():
    class Frozen(torch.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    class Regressor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), Frozen(8), torch.nn.Linear(8, 1))

        def forward(self, x, labels):
            outputs = self.layers(x)
            return SimpleNamespace(loss=torch.nn.functional.mse_loss(outputs, labels), logits=outputs)

    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(9)]
    windows = WindowLoader(rows, 9, micro_batch_size=4, accelerator=Accelerator(cpu=True))
    assert verify(Regressor(), windows, trainer=False).exact


class Line(torch.nn.Linear):
    def forward(self, x, labels):
        return SimpleNamespace(loss=torch.nn.functional.mse_loss(super().forward(x), labels))


def test_rounding_near_a_minimum_is_not_taken_for_an_error():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1) + torch.randn(64, 1)
    model = Line(8, 1)
    with torch.no_grad():  # where the gradient is 0
        ones = torch.cat([x, torch.ones(64, 1)], dim=1)
        solution = torch.linalg.lstsq(ones, y).solution
        model.weight.copy_(solution[:8].T)
        model.bias.copy_(solution[8])
        model.weight[0, 0] += 1e-3
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    windows = WindowLoader(rows, 64, micro_batch_size=7, accelerator=Accelerator(cpu=True))
    result = verify(model, windows, trainer=False)
    assert result.exact
    assert result.loop.way == "the loop, in float64"


def test_what_trainer_raises_is_not_the_verdict():
    rows = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(8)]
    windows = WindowLoader(rows, 8, micro_batch_size=3, accelerator=Accelerator(cpu=True))
    result = verify(Line(3, 1), windows)
    assert result.exact
    assert result.trainer is None
    assert "Error: " in result.trainer_failed


def test_a_gradient_that_is_not_finite_at_once_is_named():
    head = build_head("sequence_classification", "bert")
    result = verify(head.model, loader(head), lambda outputs, _: outputs.loss * float("nan"), trainer=False)
    assert not result.exact
    assert [reason.what for reason in result.reasons] == ["the gradient of the whole window is not finite"]


@pytest.mark.parametrize("num_windows", [0, 2])
def test_windows_that_are_not_there_are_refused(num_windows):
    head = build_head("sequence_classification", "bert")
    with pytest.raises(ValueError, match=f"num_windows: found {num_windows}; allowed: 1 to 1"):
        verify(head.model, loader(head), num_windows=num_windows)


def test_several_windows_are_compared_and_the_worst_is_told():
    head = build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(LENGTHS),
        4,
        micro_batch_size=3,
        collate_fn=head.collate,
        accelerator=Accelerator(cpu=True),
    )
    result = verify(head.model, windows, num_windows=3)
    assert (result.windows, result.examples, result.accumulation_steps) == (3, 10, (2, 2, 1))
    assert result.exact


def test_mixed_precision_is_refused():
    head = build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(LENGTHS),
        4,
        micro_batch_size=3,
        collate_fn=head.collate,
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
    )
    with pytest.raises(ValueError, match=r"compares in float32 on one process; found 1 processes, .* 'bf16'"):
        verify(head.model, windows)


TOO_LARGE = """
import resource, torch
from accelerate import Accelerator
from gradacc_hf import WindowLoader, remove_padding
from gradacc_hf.verification.tiny_models import build_head
from gradacc_hf.verification.exactness import verify
torch.set_num_threads(1)
head = build_head("token_classification", "bert")
accelerator = Accelerator(cpu=True)


def loader(examples):
    return WindowLoader(
        examples, len(examples), micro_batch_size=2, collate_fn=head.collate, accelerator=accelerator
    )


verify(head.model, loader(head.examples([200] * 2)), trainer=False)  # warm up
windows = loader(head.examples([200] * 128))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, used + 40 * 2**20))
result = verify(head.model, windows, trainer=False)
print(result.reference, result.exact, sep="|")
windows.count_items = lambda batch: batch["labels"].numel()
result = verify(head.model, windows, trainer=False)
print(result.reference, result.exact, sep="|")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
@pytest.mark.slow
def test_a_window_that_does_not_fit_is_taken_one_example_at_a_time_in_float64():
    done = subprocess.run([sys.executable, "-c", TOO_LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = "one example at a time, in float64, because a window does not fit in one batch"
    right, wrong_items = done.stdout.splitlines()
    assert right == f"{reference}|True"
    assert wrong_items == f"{reference}|False", "that reference trusts the items, so that they are tried"


def verify_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["gradacc", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code, *capsys.readouterr()


WRONG = """
import runpy
Base = runpy.run_path("{}")["TextClassification"]
class Wrong(Base):
    num_items = staticmethod(lambda batch: batch["input_ids"].numel() ** 2)
"""
OFFLINE = bundle_root() / "configs/text_classification_offline.yaml"
SMALL = ("--config", OFFLINE, "--batch.effective", 8, "--data.max_length", 16, "--budget.micro_batch_size", 3)


def test_the_command_line_verifies_a_config(monkeypatch, capsys, tiny_bert):
    words = [*SMALL, "--model.name", tiny_bert, "--json", "--windows", 1]
    code, out, _ = verify_command(monkeypatch, capsys, *words)
    result = json.loads(out)
    assert code == 0
    assert result["exact"]
    assert result["loop"]["error"] < EXACT
    assert result["trainer"]["error"] > 1
    assert set(result["accumulation_steps"]) == {3}
    assert (result["windows"], result["windows_read"]) == (len(result["accumulation_steps"]), 8)


def test_the_command_line_exits_with_1_where_it_is_not_exact(monkeypatch, capsys, tmp_path, tiny_bert):
    (tmp_path / "wrong.py").write_text(WRONG.format(bundle_root() / "recipes/text_classification.py"))
    text = OFFLINE.read_text().replace("../recipes/text_classification.py", "wrong.py")
    (tmp_path / "wrong.yaml").write_text(text)
    wrong = ["--config", tmp_path / "wrong.yaml", *SMALL[2:], "--windows", 1, "--model.name", tiny_bert]
    code, out, _ = verify_command(monkeypatch, capsys, *wrong)
    assert code == 1
    assert "num_items='labels' makes it exact" in " ".join(out.split())
    assert "Not exact: 3 micro-batches" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gradacc verify needs --config FILE or --run RUN; for example: "),
        (["--all-heads", "--optim.lr", "1"], "unrecognized arguments: --optim.lr 1"),
        ([*SMALL, "--model.freeze", '["nothing"]'], "model.freeze: "),
        (
            ["--config", "no.yaml"],
            "--config: found 'no.yaml', which cannot be read (No such file or directory)",
        ),
        ([*SMALL, "--windows", "0"], "--windows: found 0; allowed: 1 to "),
        ([*SMALL, "--optim.learning", "1"], "unknown key --optim.learning: (optim has: "),
    ],
)
def test_a_wrong_argument_is_one_line(monkeypatch, capsys, arguments, message):
    code, out, err = verify_command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error: {message}")


def test_a_printed_verification_is_a_table_with_the_reason_and_the_verdict(capsys):
    head = build_head("question_answering", "bert")
    print(verify(head.model, loader(head)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1 window", "10 examples, split into 3 micro-batches"]
    assert lines[2] == "reference gradient: the whole window in one batch, in float32"
    rows = [line.split() for line in lines if line.endswith((" exact", "cosine"))]
    assert [row[0] for row in rows] == ["gradient", "the", "ExactTrainer", "Trainer"]
    assert all(row[-2:] == ["not", "exact"] for row in rows[1:])
    text = " ".join(lines)
    assert "why: padding reaches the loss" in text
    assert "what to do: mask padded positions in the loss, or pad each window to one length" in text
    assert "Not exact: 3 micro-batches give a gradient with a relative error of" in text
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text


class ClassWeights(torch.nn.Module):
    """A classifier whose loss weighs labels: it is no mean over examples."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, x, labels):
        weight = torch.tensor([1.0, 9.0, 1.0])
        logits = self.layer(x).flatten(0, -2)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten(), weight)}


def rare_labels(labels, size=8, **settings):
    torch.manual_seed(0)
    examples = [{"x": torch.randn(5), "labels": torch.tensor(label)} for label in labels]
    settings = {"accelerator": Accelerator(cpu=True), "micro_batch_size": 2, "shuffle": False, **settings}
    return WindowLoader(examples, size, **settings)


def test_windows_with_different_labels_are_chosen():
    windows = rare_labels([0] * 16 + [0, 0, 0, 1, 0, 0, 2, 0] + [0] * 16)
    result = verify(ClassWeights(), windows, trainer=False)
    assert (result.windows, result.windows_read, result.exact) == (1, 5, False)
    assert "1 of the next 5 windows" in str(result)


def test_few_windows_are_in_memory_at_once():
    alive, most = weakref.WeakSet(), [0]

    def collate(examples):
        batch = {name: torch.stack([example[name] for example in examples]) for name in ("x", "labels")}
        alive.add(batch["x"])
        most[0] = max(most[0], len(alive))
        return batch

    windows = rare_labels([0] * 62 + [1, 2], collate_fn=collate)
    result = verify(ClassWeights(), windows, num_windows=8, trainer=False)
    assert (result.windows, result.accumulation_steps) == (8, (4,) * 8)
    assert most[0] <= 16  # of the worst window, this one and the next; all windows have 32


@pytest.mark.parametrize(
    "keep",
    [
        lambda rows: rows[:3],
        lambda rows: rows[: max(1, len(rows) // 2 * 2)],
        lambda rows: list({int(row["labels"]): row for row in rows}.values()),
    ],
    ids=["most", "even", "different labels"],
)
def test_a_collate_function_that_drops_examples_is_named(keep):
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    windows = rare_labels(labels, micro_batch_size=3, collate_fn=lambda rows: default_collate(keep(rows)))

    class Classifier(ClassWeights):
        def forward(self, x, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.layer(x), labels)}

    result = verify(Classifier(), windows, trainer=False)
    assert "it drops examples or labels" in result.verdict
    assert verify(Classifier(), rare_labels(labels, micro_batch_size=3), trainer=False).exact


def test_more_windows_are_chosen_until_all_labels_were_compared():
    windows = rare_labels([0, 2] * 8 + [0] * 7 + [1])
    result = verify(ClassWeights(), windows, trainer=False)
    assert (result.windows, result.windows_read, result.exact) == (2, 3, False)


def test_windows_with_other_shares_of_a_label_are_chosen():
    tags = [[1, 0, 0, 0]] * 16 + [[1, 1, 0, 0], [0, 0, 0, 0]] * 4
    examples = [{"x": torch.randn(4, 5), "labels": torch.tensor(each)} for each in tags]
    settings = {"accelerator": Accelerator(cpu=True), "micro_batch_size": 3, "shuffle": False}
    windows = WindowLoader(examples, 8, lengths=[4] * 24, **settings)
    assert not verify(ClassWeights(), windows, trainer=False).exact


def test_one_label_cannot_show_whether_labels_count_alike():
    result = verify(ClassWeights(), rare_labels([1] * 24), trainer=False)
    assert result.exact
    assert "Cannot tell: all labels of the first 3 windows are 1" in result.verdict


def test_gradients_of_0_show_nothing():
    head = build_head("sequence_classification", "bert")
    result = verify(head.model, loader(head), lambda outputs, batch: outputs.loss * 0, trainer=False)
    assert not result.exact
    assert result.verdict == "Cannot tell: the gradient of each compared window is 0."


def test_a_model_without_padding_is_compared_with_the_padded_model():
    head = build_head("sequence_classification", "bert")
    windows = loader(head, padding_free=True)
    remove_padding(head.model, windows.sample()[1].batch)
    shapes = set()
    head.model.bert.encoder.layer[0].attention.register_forward_hook(
        lambda module, inputs, outputs: shapes.add(len(outputs[0]))
    )
    assert verify(head.model, windows, trainer=False).exact
    assert shapes == {1, len(LENGTHS)}, "the accumulated micro-batches are packed, the whole window is not"
