"""Several losses, each a mean over items of its own: every split gives the gradient of the whole window."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from gradacc_hf import WindowLoader, evaluate, fine_tune, train, verify
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient

NUM_ITEMS = {"tokens": "labels", "pair": lambda batch: int((batch["pair"] != -100).sum())}


class TokensAndPair(torch.nn.Module):
    """Labels of tokens, and one label of the row, as in BERT's pretraining."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.tokens, self.pair = (torch.nn.Linear(*size) for size in ((4, 8), (8, 5), (8, 2)))

    def forward(self, x, labels, pair):
        hidden = torch.tanh(self.body(x))
        return {
            "tokens": cross_entropy(self.tokens(hidden).flatten(0, 1), labels.flatten()),
            "pair": cross_entropy(self.pair(hidden[:, 0]), pair),
        }


def losses(outputs, batch):
    return outputs


def windows(micro_batch_size, accelerator, num_items=NUM_ITEMS, paired=lambda i: i % 2):
    generator, examples = torch.Generator().manual_seed(1), []
    for i in range(21):
        labels = torch.randint(0, 5, (6,), generator=generator)
        labels[int(torch.randint(1, 6, (), generator=generator)) :] = -100
        pair = torch.tensor(paired(i))
        examples.append({"x": torch.randn(6, 4, generator=generator), "labels": labels, "pair": pair})
    return WindowLoader(
        examples, 9, accelerator=accelerator, micro_batch_size=micro_batch_size, num_items=num_items, seed=3
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("paired", [lambda i: i % 2, lambda i: i % 2 if i % 3 else -100])
def test_every_split_gives_the_gradient_and_the_loss_of_the_window(micro_batch_size, paired):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(TokensAndPair())
    optimizer = accelerator.prepare(RecordGradients(model))
    loader = windows(micro_batch_size, accelerator, paired=paired)
    records = train(model, optimizer, loader, accelerator=accelerator, compute_loss=losses)
    for record, found, window in zip(
        records, optimizer.optimizer.gradients, windows(9, accelerator, paired=paired), strict=True
    ):
        batch = loader.collated(window.indices).batch
        assert relative_error(found, whole_window_gradient(model, batch, losses)) < EXACT
        assert record.loss == pytest.approx(float(sum(model(**batch).values()).detach()), rel=1e-6)


def test_evaluation_verification_and_fine_tuning_take_several_losses(caplog):
    accelerator, model = Accelerator(cpu=True), TokensAndPair()
    loader = windows(2, accelerator)
    assert verify(model, loader, losses, trainer=False).exact
    everything = loader.collated(range(21)).batch
    expected = float(sum(model(**everything).values()).detach())
    found = evaluate(model, loader, accelerator=accelerator, compute_loss=losses, predict=None)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    fine_tune(model, optimizer, loader, accelerator=accelerator, compute_loss=losses)
    assert not torch.equal(before["pair.weight"], model.state_dict()["pair.weight"])
    assert caplog.text == ""


def test_one_count_for_the_sum_of_two_losses_is_noticed(caplog):
    accelerator, model = Accelerator(cpu=True), TokensAndPair()
    loader = windows(2, accelerator, num_items="labels")

    def total(outputs, batch):
        return outputs["tokens"] + outputs["pair"]

    assert not verify(model, loader, total, trainer=False).exact
    fine_tune(
        model, torch.optim.SGD(model.parameters(), 0.1), loader, accelerator=accelerator, compute_loss=total
    )
    assert "no split is exact" in caplog.text


def pair_alone(found):
    return found["pair"]


def without_tokens(found):
    return {"pair": found["pair"]}


TAKES_BOTH = r"; .* takes a mapping with the losses \['pair', 'tokens'\]"


@pytest.mark.parametrize(
    ("num_items", "given", "message"),
    [
        (NUM_ITEMS, pair_alone, "got one loss" + TAKES_BOTH),
        (NUM_ITEMS, without_tokens, r"got losses \['pair'\]" + TAKES_BOTH),
        ("labels", dict, r"got losses \['pair', 'tokens'\]; .* it takes one loss"),
    ],
)
def test_losses_that_do_not_match_the_counts_are_refused(num_items, given, message):
    accelerator, model = Accelerator(cpu=True), TokensAndPair()
    window = next(iter(windows(2, accelerator, num_items=num_items)))
    micro_batches = iter(window)
    batch = next(micro_batches)
    with pytest.raises(ValueError, match=message):
        window.weigh(given(model(**batch)))
