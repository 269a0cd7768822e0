"""Tokens per second of hardy's training loop against a plain PyTorch loop (and Hugging Face's Trainer).

    python benchmarks/bench_train.py --preset 1m 3m --rounds 9 --hf

Same shape, same tokens, same batch, same threads, in one process; rounds of the contenders are interleaved
and the ratio is the median of the rounds' ratios. hardy runs everything `hardy train` runs per step: reading
packs, document borders, chunked loss, agreement, clipping, metrics file. The plain loop (`plain.py`) does
less: rectangles without borders. The share outside forward, backward and optimizer is measured by timing
those three from outside.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from circumstances import circumstances
from plain import PlainLlama, plain_step

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.metrics import MetricsFile
from hardy.train.setup import assemble

RESULTS = Path(__file__).parent / "results"


def make_config(preset, *, steps, options):
    changes = {
        "model.name": preset,
        "data.source": "synthetic:lognormal,documents=4000,mean=1200",
        "data.pack_tokens": options.pack_tokens,
        "train.batch_packs": options.batch_packs,
        "train.steps": steps,
        "train.device": options.device,
        "train.evaluate_every_steps": 10**9,
        "checkpoint.every_steps": 10**9,
    }
    return from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))


class Hardy:
    """hardy's own loop, continued round after round."""

    name = "hardy"

    def __init__(self, config, corpus, folder):
        self.config = config
        self.hardware = choose_hardware(config.train.device, config.train.precision)
        self.assembly = assemble(config, Alone(), corpus=corpus, hardware=self.hardware)
        self.metrics = MetricsFile(folder / "metrics.jsonl", after_step=0)
        self.progress = Progress()
        self.parts_s = 0.0

    def run(self, steps):
        worker = self.assembly.worker
        goal = self.progress.step + steps

        def record(line):
            line["peak_memory_mb"] = self.hardware.peak_memory_mb()
            self.metrics.write(line)

        run_loop(
            worker,
            self.assembly.plan,
            self.progress,
            save=lambda progress: None,
            record=record,
            stop=lambda: self.progress.step + 1 >= goal,
        )

    @contextlib.contextmanager
    def parts_timed(self):
        """Add up the seconds in forward, backward and optimizer step, from outside."""
        worker, backward = self.assembly.worker, torch.Tensor.backward
        forward, step = worker.model.forward, worker.optimizer.step

        def timed(function):
            def call(*arguments, **named):
                started_s = time.perf_counter()
                result = function(*arguments, **named)
                self.parts_s += time.perf_counter() - started_s
                return result

            return call

        worker.model.forward, worker.optimizer.step = timed(forward), timed(step)
        torch.Tensor.backward = timed(backward)
        self.parts_s = 0.0
        try:
            yield
        finally:
            worker.model.forward, worker.optimizer.step = forward, step
            torch.Tensor.backward = backward


class Plain:
    """The textbook loop on the same packs, as rectangles."""

    name = "plain"

    def __init__(self, hardy):
        self.hardy, plan = hardy, hardy.assembly.plan
        self.batches, self.tokens = plan.batches, hardy.config.data.pack_tokens
        device = hardy.hardware.device
        self.model = PlainLlama(hardy.assembly.worker.model.shape, max_tokens=self.tokens).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.step = 0

    def run(self, steps):
        device = self.hardy.hardware.device
        for _ in range(steps):
            batches = self.batches.at(self.step, self.hardy.assembly.worker)
            tokens, labels = (
                torch.cat([getattr(b, name) for b in batches]).view(-1, self.tokens).to(device)
                for name in ("tokens_T", "labels_T")
            )
            with self.hardy.assembly.worker.autocast.context():
                plain_step(self.model, self.optimizer, tokens, labels)
            self.step += 1


class HuggingFace:
    """transformers' Trainer with its own Llama, on the same rectangles."""

    name = "hf_trainer"

    def __init__(self, hardy, folder):
        import transformers

        shape = hardy.assembly.worker.model.shape
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            tie_word_embeddings=shape.tied,
        )
        self.transformers, self.folder, self.hardy = transformers, folder, hardy
        self.model = transformers.LlamaForCausalLM(config)

    def run(self, steps):
        config, stream = self.hardy.config, self.hardy.assembly.plan.batches.stream
        rows = [stream.batch([i]).tokens_T for i in range(steps * config.train.batch_packs)]
        arguments = self.transformers.TrainingArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            per_device_train_batch_size=config.train.batch_packs,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=self.hardy.hardware.device.type == "cpu",
            optim="adamw_torch_fused",
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = self.transformers.Trainer(model=self.model, args=arguments, train_dataset=data)
        started_s = time.perf_counter()
        trainer.train()
        self.own_s = time.perf_counter() - started_s


def timed_s(contender, steps, *, cuda):
    if cuda:
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    contender.run(steps)
    if cuda:
        torch.cuda.synchronize()
    return getattr(contender, "own_s", None) or time.perf_counter() - started_s


def measure(preset, options):
    rounds, steps = options.rounds, options.steps
    config = make_config(preset, steps=10**6, options=options)
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(config.data, cache_dir=Path(folder) / "cache")
        hardy = Hardy(config, corpus, Path(folder))
        contenders = [hardy, Plain(hardy)] + ([HuggingFace(hardy, Path(folder))] if options.hf else [])
        cuda = hardy.hardware.device.type == "cuda"
        for contender in contenders:
            contender.run(3)
        seconds = {contender.name: [] for contender in contenders}
        for i in range(rounds):
            for contender in contenders if i % 2 == 0 else contenders[::-1]:
                seconds[contender.name].append(timed_s(contender, steps, cuda=cuda))
        overheads = []
        for _ in range(rounds if not cuda else 0):  # kernels run behind the host's back: no parts on CUDA
            with hardy.parts_timed():
                whole_s = timed_s(hardy, steps, cuda=cuda)
            overheads.append(1 - hardy.parts_s / whole_s)
        hardy.metrics.close()
    tokens = steps * config.train.batch_packs * config.data.pack_tokens
    result = {
        "preset": preset,
        "tokens_per_step": tokens // steps,
        "rounds": rounds,
        "steps_per_round": steps,
    }
    for name, values in seconds.items():
        result[f"{name}_tokens_per_s"] = round(tokens / statistics.median(values))
        if name != "hardy":
            ratios = [other / own for other, own in zip(values, seconds["hardy"], strict=True)]
            result[f"hardy_over_{name}"] = round(statistics.median(ratios), 3)
            result[f"hardy_over_{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    if overheads:
        result["share_outside_parts"] = round(statistics.median(overheads), 4)
    return result | {"device": hardy.hardware.name}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["1m", "3m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="steps in one round")
    parser.add_argument("--pack-tokens", type=int, default=256)
    parser.add_argument("--batch-packs", type=int, default=8)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--hf", action="store_true", help="also measure Hugging Face's Trainer")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/bench_train.jsonl")
    options = parser.parse_args()
    for preset in options.preset:
        result = measure(preset, options) | circumstances()
        print(json.dumps(result))
        if options.write:
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / "bench_train.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
