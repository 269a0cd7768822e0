"""Settings of the data pipeline. Free of torch."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hardy.config import Config, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What the model reads."""

    section: ClassVar[str] = "data"
    source: str = "pydocs"
    """pydocs (Python sources and docs installed on this machine), files:GLOB[,GLOB...],
    hf:NAME_OR_PATH[:SPLIT], or synthetic:DISTRIBUTION[,key=value...]."""
    tokenizer: str = "bytes"
    """bytes, bpe:SIZE (trained on the corpus, cached), or the path of a tokenizer.json or its folder."""
    text_field: str = "text"
    """Field of a JSON line or Parquet row that holds the document."""
    pack_tokens: PositiveInt = 256
    """Token budget of one pack; documents are laid end to end and cut at its border."""
    document_tokens: PositiveInt | None = None
    """Longest piece of a document that attends as one; none means `pack_tokens`."""
    validation_fraction: Annotated[float, Range(least=0, most=0.5)] = 0.02
    """Share of documents held out, chosen by a hash of their text."""
    limit_mb: PositiveFloat | None = None
    """Stop reading the source after this many megabytes (10**6 bytes) of text."""
    cache_dir: str | None = None
    """Where tokenised shards live; none means the user's cache folder."""
