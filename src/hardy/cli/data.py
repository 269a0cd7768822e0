"""The verb `data inspect`: what a run would read, in numbers, as a histogram and by a few samples."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hardy.cli.environment import cache_dir
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.cli.settings import resolve, settings_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hardy.data.inspect import Sample, SplitSummary

BAR_WIDTH = 40


def add_data(parser: Parser) -> None:
    """Add the options of `hardy data`."""
    parser.add_argument(
        "action", choices=["inspect"], help="inspect: prepare the data (cached) and describe it"
    )
    parser.add_argument("target", metavar="RECIPE|FILE.toml", nargs="?", default="tiny", help="default: tiny")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the lengths of documents")


def data_help() -> str:
    """Return the recipes."""
    return (
        settings_text(recipes_only=True) + "\n\nSettings such as --data.source files:'docs/*.md' may follow."
    )


def data_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy data inspect`."""
    config = resolve(arguments.target, arguments.settings).config.data
    from rich.console import Console

    from hardy.data.corpus import prepare
    from hardy.data.inspect import samples, summarise

    messages = Console(stderr=True)
    with messages.status("opening") as status:
        corpus = prepare(
            config,
            cache_dir=cache_dir(config.cache_dir, os.environ),
            on_progress=lambda stage, share: status.update(f"{stage} {share:.0%}"),
        )
    splits = {"train": summarise(corpus.train), "validation": summarise(corpus.validation)}
    shown = samples(corpus, num_samples=arguments.samples)
    png = _draw(splits["train"], arguments.png, title=config.source) if arguments.png else None
    if arguments.json:
        print_json(
            {
                "source": config.source,
                "tokenizer": config.tokenizer,
                "vocabulary": corpus.tokenizer.vocab_size,
                "unigram_entropy": corpus.unigram_entropy,
                "splits": {name: dataclasses.asdict(summary) for name, summary in splits.items()},
                "samples": [dataclasses.asdict(sample) for sample in shown],
                "png": png,
            }
        )
        return SUCCESS
    console = Console()
    console.print(f"{config.source}, tokenizer {config.tokenizer} ({corpus.tokenizer.vocab_size:,} tokens)")
    console.print(f"a model of token frequencies alone: {corpus.unigram_entropy:.3f} nats per token")
    console.print(split_table(splits))
    _print_histogram(console, splits["train"])
    _print_samples(console, shown)
    if png:
        console.print(f"drawn: {png}", markup=False)
    return SUCCESS


def split_table(splits: "dict[str, SplitSummary]") -> "Table":
    """Return the numbers of each split side by side."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    rows = {
        "documents": [f"{split.num_documents:,}" for split in splits.values()],
        "bytes": [f"{split.num_bytes:,}" for split in splits.values()],
        "tokens": [f"{split.num_tokens:,}" for split in splits.values()],
        "bytes per token": [f"{split.bytes_per_token:.2f}" for split in splits.values()],
    }
    for field in ("least", "median", "mean", "most_of_90_percent", "most_of_99_percent", "most"):
        rows[f"tokens a document, {field.replace('_', ' ')}"] = [
            "none" if split.lengths is None else f"{getattr(split.lengths, field):,.0f}"
            for split in splits.values()
        ]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _draw(summary: "SplitSummary", path: Path, *, title: str) -> Path:
    from hardy.cli.plots import plot_lengths

    return plot_lengths(summary, path, title=title)


def _print_histogram(console: "Console", summary: "SplitSummary") -> None:
    """Print bars of the share of documents and tokens by document length."""
    histogram = summary.histogram
    if histogram is None:
        return
    console.print("documents by length (share of documents, share of tokens)")
    tallest = max(histogram.documents)
    for i, documents in enumerate(histogram.documents):
        bar = "█" * round(BAR_WIDTH * documents / tallest)
        left, right = histogram.edges[i], histogram.edges[i + 1] - 1
        shares = f"{documents / summary.num_documents:6.1%} {histogram.tokens[i] / summary.num_tokens:6.1%}"
        console.print(f"{left:>9,} to {right:<9,} {shares}  {bar}", highlight=False)


def _print_samples(console: "Console", shown: "list[Sample]") -> None:
    for sample in shown:
        console.rule(f"document {sample.document}, {sample.num_tokens:,} tokens")
        console.print(sample.text, markup=False, highlight=False)
