"""Preparing a corpus: split, cache, repair, figures."""

import logging
import math
import threading

import numpy as np
import pytest

from hardy.config import ConfigError, UserError
from hardy.data import corpus as module
from hardy.data.bpe import train_bpe
from hardy.data.config import DataConfig
from hardy.data.corpus import held_out, open_corpus, prepare
from hardy.data.store import DamagedStoreError


def stored_texts(corpus, store):
    return [corpus.tokenizer.decode(store.document(index)) for index in range(store.num_documents)]


@pytest.fixture
def folder(write_files):
    return write_files({f"{index:02}.txt": f"text number {index}, " * (index + 1) for index in range(40)})


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_is_on_one_side_and_comes_back(make_corpus, folder, tokenizer):
    corpus = make_corpus(source=f"files:{folder}", tokenizer=tokenizer, validation_fraction=0.2)
    train, validation = (stored_texts(corpus, store) for store in (corpus.train, corpus.validation))
    written = [path.read_text() for path in sorted(folder.iterdir())]
    assert sorted(train + validation) == sorted(written) and not set(train) & set(validation)
    assert train == [text for text in written if text in train]
    assert 2 <= len(validation) <= 16
    assert (corpus.num_documents, corpus.num_bytes) == (40, sum(map(len, written)))
    assert corpus.train.num_bytes + corpus.validation.num_bytes == corpus.num_bytes
    stored = corpus.train.num_tokens + corpus.validation.num_tokens
    assert corpus.bytes_per_token == corpus.num_bytes / stored
    if tokenizer == "bytes":
        assert stored == corpus.num_bytes + 40
    else:
        assert corpus.tokenizer.vocab_size == 300 and corpus.bytes_per_token > 1.5


def test_the_second_time_it_comes_from_the_cache(make_corpus, folder, monkeypatch):
    stages = []
    settings = {"source": f"files:{folder}", "tokenizer": "bpe:300"}
    first = make_corpus(**settings, on_progress=lambda stage, share: stages.append((stage, share)))
    assert list(dict(stages)) == ["reading", "training the tokenizer", "tokenising"]
    assert [share for stage, share in stages if stage == "tokenising"][-1] == 1.0
    assert all(0 <= share <= 1 for _, share in stages)

    def refuse(*args, **kwargs):
        raise AssertionError("the corpus is in the cache already")

    monkeypatch.setattr(module, "_build", refuse)
    second = make_corpus(**settings)
    assert second.fingerprint == first.fingerprint and second.facts == first.facts
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(AssertionError, match="in the cache already"):
        make_corpus(**settings, validation_fraction=0.3)


def test_nothing_but_the_corpus_stays_in_the_cache(make_corpus, folder, tmp_path):
    make_corpus(source=f"files:{folder}")
    (entry,) = (tmp_path / "cache" / "corpora").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["facts.json", "tokenizer", "train", "validation"]


def test_equal_texts_have_equal_fingerprints_wherever_they_are(make_corpus, folder, write_files):
    copy = write_files({path.name: path.read_bytes() for path in folder.iterdir()}, folder="copy")
    first, same = (make_corpus(source=f"files:{path}") for path in (folder, copy))
    other_tokenizer = make_corpus(source=f"files:{folder}", tokenizer="bpe:280")
    other_split = make_corpus(source=f"files:{folder}", validation_fraction=0.4)
    (copy / "00.txt").write_text("changed")
    changed = make_corpus(source=f"files:{copy}")
    assert first.fingerprint == same.fingerprint
    prints = {each.fingerprint for each in (first, other_tokenizer, other_split, changed)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "name", ["train/tokens.bin", "validation/meta.json", "facts.json", "tokenizer/tokenizer.json"]
)
def test_a_damaged_cache_is_made_again_with_a_warning(make_corpus, folder, tmp_path, caplog, name):
    first = make_corpus(source=f"files:{folder}")
    (entry,) = (tmp_path / "cache" / "corpora").iterdir()
    (entry / name).write_bytes(b"")
    if name == "tokenizer/tokenizer.json":
        (entry / "tokenizer" / "tokenizer_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        second = make_corpus(source=f"files:{folder}")
    assert "the cached corpus is damaged and is prepared again" in caplog.text
    assert second.fingerprint == first.fingerprint
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [entry.name]


def test_another_tokenizer_beside_the_tokens_is_damage(make_corpus, folder, tmp_path):
    make_corpus(source=f"files:{folder}", tokenizer="bpe:280")
    (entry,) = (tmp_path / "cache" / "corpora").iterdir()
    train_bpe(iter(["quite another text " * 9]), vocab_size=280).save(entry / "tokenizer")
    with pytest.raises(DamagedStoreError, match="tokenizer is not the tokenizer that made the tokens"):
        open_corpus(entry)


def test_several_may_prepare_the_same_corpus_at_once(folder, tmp_path):
    config = DataConfig(source=f"files:{folder}")
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(prepare(config, cache_dir=tmp_path / "cache").fingerprint)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


def test_a_failed_preparation_leaves_nothing(make_corpus, write_files, tmp_path):
    folder = write_files({"a.txt": "fine", "b.txt": b"\xff"})
    with pytest.raises(UserError, match="b.txt is not UTF-8"):
        make_corpus(source=f"files:{folder}")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_of_one_document_the_tail_is_held_out(make_corpus, write_files):
    folder = write_files({"one.txt": "0123456789" * 10})
    corpus = make_corpus(source=f"files:{folder}", validation_fraction=0.25)
    assert stored_texts(corpus, corpus.train) == [("0123456789" * 10)[:75]]
    assert stored_texts(corpus, corpus.validation) == [("0123456789" * 10)[75:]]
    assert corpus.num_documents == 1


def test_nothing_is_held_out_when_the_fraction_is_zero(make_corpus, folder):
    corpus = make_corpus(source=f"files:{folder}", validation_fraction=0.0)
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (40, 0)
    assert corpus.unigram_entropy == pytest.approx(corpus.facts.train_entropy, rel=0.05)


def test_the_split_follows_the_hashes():
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    chosen = held_out(hashes, fraction=0.1)
    assert abs(chosen.mean() - 0.1) < 0.01 and hashes[chosen].max() < hashes[~chosen].min()
    assert (held_out(hashes[:5000], fraction=0.1) == chosen[:5000]).all()


@pytest.mark.parametrize(("hashes", "wanted"), [([9, 3], [False, True]), ([2**63, 2**63 + 1], [True, False])])
def test_of_two_documents_each_side_has_one(hashes, wanted):
    for fraction in (1e-9, 0.5):
        found = held_out(np.array(hashes, dtype=np.uint64), fraction=fraction)
        assert found.sum() == 1
    assert held_out(np.array(hashes, dtype=np.uint64), fraction=1e-12).tolist() == wanted


def test_the_entropies_are_those_of_the_targets(make_corpus, write_files):
    folder = write_files({"a.txt": "aaab", "b.txt": "ab"})
    corpus = make_corpus(source=f"files:{folder}")
    by_text = dict(zip(stored_texts(corpus, corpus.validation), [corpus.validation], strict=True))
    train = "ab" if "aaab" in by_text else "aaab"
    targets = [*train, "end"]
    shares = [targets.count(kind) / len(targets) for kind in ("a", "b", "end")]
    assert corpus.facts.train_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    (held,) = by_text
    paid = [-math.log((targets.count(kind) + 1) / (len(targets) + 257)) for kind in [*held, "end"]]
    assert corpus.unigram_entropy == pytest.approx(sum(paid) / len(paid))


def test_a_tokenizer_from_a_folder(make_corpus, folder, tmp_path):
    trained = make_corpus(source=f"files:{folder}", tokenizer="bpe:290")
    trained.tokenizer.save(tmp_path / "tokenizer")
    again = make_corpus(source=f"files:{folder}", tokenizer=str(tmp_path / "tokenizer"))
    assert again.fingerprint == trained.fingerprint


def test_a_corpus_is_read_in_batches(make_corpus, folder, monkeypatch):
    whole = make_corpus(source=f"files:{folder}")
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    monkeypatch.setattr(module, "CACHE_FORMAT", "another")
    assert make_corpus(source=f"files:{folder}").fingerprint == whole.fingerprint


def test_an_empty_corpus_is_refused(make_corpus, write_files, tmp_path):
    folder = write_files({"a.txt": "", "b.jsonl": '{"text": ""}\n'})
    with pytest.raises(UserError, match="data.source=files:.* holds no text; the corpus would be empty"):
        make_corpus(source=f"files:{folder}")


def test_a_bad_tokenizer_is_refused_before_the_source_is_looked_at(make_corpus):
    with pytest.raises(ConfigError, match="no tokenizer 'byte'"):
        make_corpus(source="files:nowhere", tokenizer="byte")


def test_a_prepared_folder_opens_by_itself(make_corpus, folder, tmp_path):
    corpus = make_corpus(source=f"files:{folder}")
    (entry,) = (tmp_path / "cache" / "corpora").iterdir()
    assert open_corpus(entry, verify="all").fingerprint == corpus.fingerprint
