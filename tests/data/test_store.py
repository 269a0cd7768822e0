"""The store: written whole, checked when opened."""

import errno
import json
import logging

import numpy as np
import pytest

from hardy.config import UserError
from hardy.data import store as module
from hardy.data.store import DamagedStoreError, StoreWriter, TokenStore, written_whole


def test_documents_come_back_with_their_begin(make_store):
    store = make_store([3, 1, 4])
    assert [store.document(index).tolist() for index in range(3)] == [
        [999, 1, 2],
        [999],
        [999, 2001, 2002, 2003],
    ]
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (3, 8, 8)
    assert store.lengths.tolist() == [3, 1, 4] and store.bytes_per_token == 1.0
    assert isinstance(store.tokens, np.memmap)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    with StoreWriter(tmp_path / "s", vocab_size=vocab_size, begin_id=vocab_size - 1) as writer:
        writer.append([np.array([vocab_size - 2], dtype=np.uint32)], num_bytes=1)
    store = TokenStore(tmp_path / "s")
    assert store.tokens.dtype == dtype and store.tokens.tolist() == [vocab_size - 1, vocab_size - 2]


def test_several_appends_and_none(tmp_path):
    with StoreWriter(tmp_path / "two", vocab_size=300, begin_id=256) as writer:
        for text in (b"ab", b"c"):
            writer.append([np.frombuffer(text, dtype=np.uint8)], num_bytes=len(text))
        writer.append([], num_bytes=0)
    with StoreWriter(tmp_path / "none", vocab_size=300, begin_id=256):
        pass
    two, none = TokenStore(tmp_path / "two"), TokenStore(tmp_path / "none")
    assert two.tokens.tolist() == [256, 97, 98, 256, 99] and two.num_bytes == 3
    assert (none.num_documents, none.num_tokens, none.bytes_per_token) == (0, 0, 0.0)


def test_equal_contents_have_equal_checksums(make_store):
    first, same, other = make_store([3, 4]), make_store([3, 4], name="b"), make_store([4, 3], name="c")
    assert first.checksum == same.checksum != other.checksum


def flip_a_byte(folder):
    contents = bytearray((folder / "tokens.bin").read_bytes())
    contents[5] ^= 1
    (folder / "tokens.bin").write_bytes(contents)


def cut_off(folder):
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])


def change_meta(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "tokens.bin does not have the contents that were written"),
        (cut_off, "tokens.bin has 31 bytes instead of 32"),
        (lambda folder: (folder / "offsets.npy").unlink(), "cannot be read"),
        (
            lambda folder: (folder / "meta.json").unlink(),
            "meta.json cannot be read: No such file or directory$",
        ),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json cannot be read"),
        (change_meta(format=0), "meta.json is of another format"),
        (change_meta(files={}), "cannot be read: 'offsets.npy'"),
    ],
)
def test_damage_is_noticed(make_store, damage, said):
    folder = make_store([3, 1, 4]).folder
    damage(folder)
    with pytest.raises(DamagedStoreError, match=said):
        TokenStore(folder)


def test_huge_files_are_compared_only_when_asked(make_store, monkeypatch):
    folder = make_store([3, 1, 4]).folder
    flip_a_byte(folder)
    monkeypatch.setattr(module, "AUTO_CHECK_BYTES", 10)
    assert TokenStore(folder).num_tokens == TokenStore(folder, verify="sizes").num_tokens == 8
    with pytest.raises(DamagedStoreError, match="contents"):
        TokenStore(folder, verify="all")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "entry"
    with written_whole(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"
    with pytest.raises(KeyError), written_whole(tmp_path / "cache" / "other") as folder:
        (folder / "half").write_text("h")
        raise KeyError("stop")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["entry"]


def test_whoever_comes_second_discards_its_copy(tmp_path):
    target = tmp_path / "entry"
    with written_whole(target) as slow:
        (slow / "who").write_text("slow")
        with written_whole(target) as fast:
            (fast / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_full_disk_is_said_with_folder_needed_and_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2_500_000}))
    with pytest.raises(UserError) as refused, written_whole(tmp_path / "cache" / "entry") as folder:
        (folder / "tokens.bin").write_bytes(bytes(1_500_000))
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(refused.value) == (
        f"the disk of the cache folder {tmp_path / 'cache'} is full: preparing the corpus needs more than "
        "1.5 MB and 2.5 MB are free; make room, set data.cache_dir to another disk or lower data.limit_mb"
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="unplugged"), written_whole(tmp_path / "entry"):
        raise OSError(errno.EIO, "unplugged")


def test_a_cache_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache cannot be made: Not a directory; set data.cache_dir"):
        with written_whole(tmp_path / "file" / "cache" / "entry"):
            logging.error("never reached")
