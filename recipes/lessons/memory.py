"""What does it save? Peak memory of 32 examples at once and accumulated: activations shrink, gradients stay.

Run it: gradacc lessons memory. The doctor finds: nothing.
"""

import torch
from accelerate import Accelerator
from torch.distributed._tools.mem_tracker import MemTracker  # not a public module

from gradacc_hf import WindowLoader

X = torch.randn(32, 64, 128)  # examples, positions, width
PARTS = ("parameters", "gradients", "activations", "optimizer", "temporary")  # at the peak, in MB


def new_model():
    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters())


def peak(tracker):
    """Return the memory at the peak. The tracker follows every tensor and needs no GPU."""
    sizes = next(iter(tracker.get_tracker_snapshot("peak").values()))
    mb = {str(kind).split(".")[-1]: size / 1e6 for kind, size in sizes.items()}
    other = sum(mb[kind] for kind in ("BUFFER", "TEMP", "OTH"))
    return dict(zip(PARTS, (mb["PARAM"], mb["GRAD"], mb["ACT"], mb["OPT"], other), strict=True))


def plain(size):
    """Take two steps on 32 examples in micro-batches of `size`. The second step has the optimizer's state."""
    model, optimizer = new_model()
    with (tracker := MemTracker()):
        tracker.track_external(model, optimizer)
        for _ in range(2):
            for x in X.split(size):
                tracker.reset_mod_stats()  # a second forward needs it
                (model(x).pow(2).mean() * size / 32).backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak(tracker)


def gradacc(size):
    model, optimizer = (accelerator := Accelerator(cpu=True)).prepare(*new_model())
    examples = [{"x": x, "labels": 0} for x in X] * 2
    with (tracker := MemTracker()):
        tracker.track_external(model, optimizer.optimizer)
        for window in WindowLoader(examples, 32, micro_batch_size=size, accelerator=accelerator):
            for batch in window:
                tracker.reset_mod_stats()
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(model(batch["x"]).pow(2).mean()))
                    optimizer.step()
                    optimizer.zero_grad()
    return peak(tracker)


def main():
    found = {f"{32 // size} × {size}": plain(size) for size in (32, 16, 8, 4)} | {
        "gradacc, 4 × 8": gradacc(8)
    }
    print("MB at the peak", *(f"{part:>11}" for part in PARTS), "      total")
    for name, parts in found.items():
        print(f"{name:<14}", *(f"{size:11.2f}" for size in parts.values()), f"{sum(parts.values()):11.2f}")
    print("Activations shrink. Gradients do not: when accumulating, all of them exist at the peak.")
    print("With a single batch, the peak comes before most gradients exist.")
    print("In gradacc: `max_tokens` limits a micro-batch, `effective_batch_size` a step.")
    return found


def draw(axes, found):
    for i, part in enumerate(PARTS):
        below = [sum(list(parts.values())[:i]) for parts in found.values()]
        axes.bar(list(found), [parts[part] for parts in found.values()], bottom=below, label=part)
    axes.set(title="Memory at the peak of a step on 32 examples", ylabel="MB")


if __name__ == "__main__":
    main()
