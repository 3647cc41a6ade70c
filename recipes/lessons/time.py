"""Is it faster? Sixty-four examples at once, in smaller and smaller micro-batches, and split by length.

Run it: gradacc lessons time. The doctor finds: nothing.
"""

from statistics import median
from time import perf_counter

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

from gradacc_hf import WindowLoader

torch.manual_seed(0)
LENGTHS = {"alike": [32] * 64, "unequal": torch.randn(64).exp().mul(16).clamp(2, 160).long().tolist()}
MODEL = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.0)  # at lr 0, all ways have the same weights


def collate(examples):
    padding = torch.arange(max(map(len, examples))) >= torch.tensor([[len(example)] for example in examples])
    return {"src": pad_sequence(examples, batch_first=True), "src_key_padding_mask": padding}


def count_tokens(batch):
    return int((~batch["src_key_padding_mask"]).sum())


def mean_loss(batch):  # over the tokens that are not padding
    return (MODEL(**batch) * batch["src"])[~batch["src_key_padding_mask"]].mean()


def plain(examples, size):
    """Run forward and backward in plain PyTorch, in micro-batches of `size`; yield their padded tokens."""
    for batch in (collate(examples[i : i + size]) for i in range(0, 64, size)):
        (mean_loss(batch) * count_tokens(batch) / sum(map(len, examples))).backward()
        yield batch["src"].shape[:2].numel()


def gradacc(examples, accelerator):  # sorted by length, split at the least predicted cost
    settings = {"max_tokens": 1024, "lengths": len, "num_items": count_tokens, "collate_fn": collate}
    for window in WindowLoader(examples, 64, accelerator=accelerator, **settings):
        for batch in window:
            with accelerator.accumulate(MODEL):
                accelerator.backward(window.weigh(mean_loss(batch)))
                yield batch["src"].shape[:2].numel()


def main():
    found, accelerator = {}, Accelerator(cpu=True)
    ways = {"1 × 64": (plain, 64), "4 × 16": (plain, 16), "16 × 4": (plain, 4), "64 × 1": (plain, 1)}
    for kind, lengths in LENGTHS.items():
        examples = [torch.randn(length, 64) for length in lengths]
        seconds, gradients, tokens = {way: [] for way in (*ways, "gradacc")}, {}, {}
        for _ in range(9):  # interleaved, as the load of the machine changes
            for name, (way, setting) in (ways | {"gradacc": (gradacc, accelerator)}).items():
                MODEL.zero_grad()
                start = perf_counter()
                tokens[name] = sum(way(examples, setting))
                OPTIMIZER.step()
                seconds[name].append(perf_counter() - start)
                gradients[name] = MODEL.linear1.weight.grad.clone()
        truth = gradients["1 × 64"]
        for name in seconds:
            ratio = median(seconds[name]) / median(seconds["1 × 64"])
            error = (torch.dist(gradients[name], truth) / truth.norm()).item()
            found[name, kind] = {"ratio": ratio, "tokens": tokens[name], "error": error}
            print(
                f"{kind:>7} {name:>6}: {tokens[name]:5} padded tokens, time × {ratio:.2f}, error {error:.0e}"
            )
    print("In gradacc: `WindowLoader` sorts a window by length and splits it at the least predicted cost.")
    return found


def draw(axes, found):
    axes.barh([", ".join(name) for name in found], [way["ratio"] for way in found.values()])
    axes.invert_yaxis()
    axes.set(title="Time of a window / time of 64 examples at once", xlabel="ratio of medians")


if __name__ == "__main__":
    main()
