"""Time of one optimizer step against torch's fused AdamW and against a copy of the bytes it must move.

    python benchmarks/bench_optim.py --shapes 4096x4096 --count 2 --rounds 9
    python benchmarks/bench_optim.py --device cuda --dtype bf16 --preset 1b

All contenders update parameters of the same shapes with the same gradients in one process; rounds are
interleaved and a ratio is the median of the rounds' ratios. The limit of a contender is the time of copying
as many bytes as its formula moves (or, for APOLLO, of the projection's matrix product, where that takes
longer), measured in the same rounds. Bytes per element and temporaries are counted from the operations
(`accounting.py`).

On CUDA a step is timed on the device while the host is ahead of it, as it is in training, where a backward
pass is under way when the optimizer is called: matrix products are enqueued first, then an event, the step,
an event. What the host takes to enqueue a step, and the ratio of steps that begin on an idle device, stand
beside.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from accounting import Accounting
from circumstances import circumstances

from hardy.model.presets import PRESETS
from hardy.optim.optimizers import APOLLO, SMMF, AdaptiveAdamW, APOLLOMini

RESULTS = Path(__file__).parent / "results"


def shapes_of(options):
    """Return the shapes of the matrices to update."""
    if options.preset is None:
        return [tuple(map(int, text.split("x"))) for text in options.shapes] * options.count
    shape = PRESETS[options.preset]
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    layer = [(heads, hidden), (kv, hidden), (kv, hidden), (hidden, heads)]
    return (layer + [(inner, hidden), (inner, hidden), (hidden, inner)]) * shape.num_layers


class Contender:
    """One optimizer over its own copies of the parameters; gradients are shared by all."""

    def __init__(self, name, make, grads, bytes_moved, rank=None):
        self.name, self.bytes_moved, self.rank = name, bytes_moved, rank
        self.params = [torch.nn.Parameter(torch.randn_like(g) * 0.02) for g in grads]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimizer = make([(f"layer{i}.weight", p) for i, p in enumerate(self.params)])

    def run(self):
        self.optimizer.step()


def contenders(grads, names, rank):
    """Return the optimizers by name, with the bytes that one step has to move."""
    numel = sum(g.numel() for g in grads)
    w = g = grads[0].element_size()
    shorter = sum(g.numel() / min(g.shape) for g in grads) * rank
    table = {
        "torch fused AdamW": (
            lambda p: torch.optim.AdamW([x for _, x in p], lr=1e-4, fused=True),
            (2 * w + g + 4 * w) * numel,
        ),
        "AdaptiveAdamW": (lambda p: AdaptiveAdamW(p, lr=1e-4), (2 * w + g + 16) * numel),
        "SMMF": (lambda p: SMMF(p, lr=1e-4), (2 * w + g + 0.25) * numel),
        "APOLLO-Mini": (lambda p: APOLLOMini(p, lr=1e-4), (2 * w + 2 * g) * numel),
        f"APOLLO r={rank}": (
            lambda p: APOLLO(p, lr=1e-4, rank=rank),
            (2 * w + 2 * g) * numel + 24 * shorter,
        ),
    }
    return [
        Contender(name, make, grads, bytes_moved, rank if "r=" in name else None)
        for name, (make, bytes_moved) in table.items()
        if not names or any(word in name for word in names)
    ]


def timed_s(run, device):
    """Return seconds of one call that begins on an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


class Ahead:
    """Times calls on a device that is still busy when they are enqueued.

    CUDA takes about a thousand launches ahead; what enqueues more waits, and its time is partly the host's.
    """

    def __init__(self, products=12):
        self.square = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.square)
        self.products = products

    def timed_s(self, run):
        """Return (seconds on the device, seconds of the host) of one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(self.products):
            torch.mm(self.square, self.square, out=self.out)
        begin.record()
        started_s = time.perf_counter()
        run()
        host_s = time.perf_counter() - started_s
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, host_s


class Copy:
    """Copy of a block of memory: the speed that no update can exceed."""

    name = "copy"

    def __init__(self, device, megabytes=256):
        self.source = torch.ones(megabytes * 2**18, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes_moved = 2 * self.source.nbytes

    def run(self):
        self.target.copy_(self.source)


class Product:
    """The matrix products of APOLLO's projections alone."""

    name = "product"

    def __init__(self, grads, rank):
        self.pairs = []
        for grad in grads:
            tall = grad if grad.shape[0] >= grad.shape[1] else grad.T
            basis = torch.randn(tall.shape[1], rank, dtype=grad.dtype, device=grad.device)
            self.pairs.append(
                (tall, basis, torch.empty(tall.shape[0], rank, dtype=grad.dtype, device=grad.device))
            )

    def run(self):
        for tall, basis, out in self.pairs:
            torch.mm(tall, basis, out=out)


def held_bytes(optimizer):
    """Return the bytes of all tensors in an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def ratio(seconds, name):
    """Return the median of the rounds' ratios to fused AdamW."""
    pairs = zip(seconds[name], seconds["torch fused AdamW"], strict=True)
    return round(statistics.median(mine / other for mine, other in pairs), 3)


def measure(options):
    """Return one result per contender."""
    device = options.device
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    grads = [torch.randn(shape, device=device).to(dtype) for shape in shapes_of(options)]
    numel = sum(g.numel() for g in grads)
    entries = contenders(grads, options.only, options.rank)
    yardsticks = [Copy(device), Product(grads, options.rank)]
    runners = entries + yardsticks
    for runner in runners:
        for _ in range(3):
            runner.run()
    alone, seconds, host = ({runner.name: [] for runner in runners} for _ in range(3))
    ahead = Ahead() if device == "cuda" else None
    for index in range(options.rounds):
        for runner in runners if index % 2 == 0 else runners[::-1]:
            alone[runner.name].append(min(timed_s(runner.run, device) for _ in range(options.repeats)))
            on_device, on_host = (alone[runner.name][-1], 0.0) if ahead is None else ahead.timed_s(runner.run)
            seconds[runner.name].append(on_device)
            host[runner.name].append(on_host)
    del ahead
    byte_s = [s / yardsticks[0].bytes_moved for s in seconds["copy"]]
    for entry in entries:
        with Accounting() as account:
            entry.run()
        own = seconds[entry.name]
        limits = copies = [entry.bytes_moved * s for s in byte_s]
        if entry.rank is not None:
            limits = [max(a, b) for a, b in zip(limits, seconds["product"], strict=True)]
        over_adamw = [a / b for a, b in zip(own, seconds["torch fused AdamW"], strict=True)]
        over_limit = [a / b for a, b in zip(own, limits, strict=True)]
        yield {
            "optimizer": entry.name,
            "elements": numel,
            "tensors": len(grads),
            "largest": "x".join(map(str, max((tuple(g.shape) for g in grads), key=lambda s: s[0] * s[1]))),
            "dtype": options.dtype,
            "device": device,
            "milliseconds": round(1000 * statistics.median(own), 3),
            "over_fused_adamw": round(statistics.median(over_adamw), 3),
            "over_fused_adamw_range": [round(min(over_adamw), 3), round(max(over_adamw), 3)],
            "over_fused_adamw_alone": ratio(alone, entry.name),
            "host_milliseconds": round(1000 * statistics.median(host[entry.name]), 3),
            "over_limit": round(statistics.median(over_limit), 3),
            "limit_bytes_per_element": round(entry.bytes_moved / numel, 2),
            "limit_is": "copy" if limits == copies else "product",
            # What a Triton kernel moves is not seen by torch's dispatcher.
            "counted_bytes_per_element": round(account.moved_bytes / numel, 2) if device == "cpu" else None,
            "temporary_megabytes": round(account.peak_bytes / 2**20, 2),
            "state_bytes_per_element": round(held_bytes(entry.optimizer) / numel, 4),
            "copy_gigabytes_per_s": round(1e-9 / statistics.median(byte_s), 2),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"])
    parser.add_argument("--count", type=int, default=2, help="tensors of each shape")
    parser.add_argument("--preset", choices=list(PRESETS), help="all matrices of a model instead")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest of so many counts as a round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--only", nargs="*", default=[], help="words in names of optimizers; AdamW is in")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/bench_optim.jsonl")
    options = parser.parse_args()
    if options.only:
        options.only.append("fused AdamW")
    for result in measure(options):
        result |= circumstances()
        print(json.dumps(result), flush=True)
        if options.write:
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / "bench_optim.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
