"""What the tests of the room data share: small corpora, prepared in a temporary cache."""

import pytest

from hardy.data.config import DataConfig
from hardy.data.corpus import prepare
from hardy.data.store import StoreWriter, TokenStore


@pytest.fixture
def write_files(tmp_path):
    """Write texts or bytes under a folder and return the folder."""

    def write(contents, *, folder="texts"):
        for name, content in contents.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / folder

    return write


@pytest.fixture
def make_corpus(tmp_path):
    """Prepare a corpus from settings of `DataConfig` in the test's own cache."""

    def make(**settings):
        on_progress = settings.pop("on_progress", None)
        return prepare(DataConfig(**settings), cache_dir=tmp_path / "cache", on_progress=on_progress)

    return make


@pytest.fixture
def make_store(tmp_path):
    """Write a store whose document i is [999, 1000*i + 1, 1000*i + 2, ...] with the given stored length."""
    import numpy as np

    def make(lengths, *, name="store", vocab_size=10**6):
        with StoreWriter(tmp_path / name, vocab_size=vocab_size, begin_id=999) as writer:
            documents = [1000 * index + np.arange(1, length) for index, length in enumerate(lengths)]
            writer.append(documents, num_bytes=sum(lengths))
        return TokenStore(tmp_path / name)

    return make
