"""Tokenizers: they take text back and forth, and say what is missing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError, UserError
from hardy.data import tokenizer as module
from hardy.data.bpe import train_bpe
from hardy.data.tokenizer import BytesTokenizer, bpe_size, load_tokenizer, open_tokenizer

TEXTS = [
    "",
    "plain words, twice words\n",
    "Grüße — 你好 \U0001f600\r\n\ttab",
    "say <|document|> aloud",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(["words and more words, said twice\n" * 20]), vocab_size=300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return BytesTokenizer() if request.param == "bytes" else bpe


@pytest.fixture
def word_files(tmp_path):
    """Write a word-level tokenizer.json with the given vocabulary and files beside it; return the folder."""

    def write(vocab, **beside):
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}
        contents = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": model,
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
        for name, values in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(each) for each in ids] == TEXTS
    assert ids[0] == [] and max(map(max, ids[1:])) < tokenizer.vocab_size
    assert all(type(token) is int for token in ids[1])


def test_text_never_becomes_a_special_token(tokenizer):
    (ids,) = tokenizer.encode(["say <|document|> aloud"])
    assert tokenizer.begin_id not in ids and tokenizer.end_id not in ids


def test_special_tokens_are_left_out_of_decoded_text(tokenizer):
    (ids,) = tokenizer.encode(["words"])
    assert tokenizer.decode([tokenizer.begin_id, *ids, tokenizer.end_id]) == "words"


def test_arrays_equal_lists(tokenizer):
    arrays = tokenizer.encode_arrays(TEXTS)
    assert [array.tolist() for array in arrays] == tokenizer.encode(TEXTS)
    assert all(np.issubdtype(array.dtype, np.unsignedinteger) for array in arrays)


@settings(max_examples=50)
@given(text=st.text())
def test_bytes_take_any_text(text):
    assert BytesTokenizer().decode(BytesTokenizer().encode([text])[0]) == text


def test_broken_bytes_decode_to_the_replacement_character():
    assert BytesTokenizer().decode([104, 255, 105]) == "h\ufffdi"


def test_what_is_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert type(loaded) is type(tokenizer)
    for name in ("vocab_size", "begin_id", "end_id", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_other_tools_read_the_bytes_tokenizer_as_it_is(tmp_path):
    BytesTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    general = load_tokenizer(tmp_path)
    assert type(general) is not BytesTokenizer
    assert (general.vocab_size, general.begin_id, general.end_id) == (257, 256, 256)
    assert general.encode(TEXTS) == BytesTokenizer().encode(TEXTS)
    assert [general.decode(ids) for ids in general.encode(TEXTS)] == TEXTS


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "words — twice"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode([text])[0]
    assert theirs.decode(tokenizer.encode([text])[0]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.begin_id, tokenizer.end_id)


def test_a_long_text_in_parts_gives_the_same_tokens(bpe, monkeypatch):
    text = "words said\n\n  twice\nmore, and more\n" * 40 + "\n\n words"
    (whole,) = bpe.encode([text])
    monkeypatch.setattr(module, "LONG_TEXT_CHARACTERS", 50)
    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 120)
    assert len(module._parts(text)) > 20 and "".join(module._parts(text)) == text
    assert bpe.encode([text, "", text]) == [whole, [], whole]


@pytest.mark.parametrize(
    ("beside", "wanted"),
    [
        ({"tokenizer_config": {"bos_token": "b", "eos_token": "e"}}, (1, 2)),
        ({"tokenizer_config": {"bos_token": None, "eos_token": {"content": "e"}}}, (4, 2)),
        ({"special_tokens_map": {"bos_token": {"content": "b"}, "eos_token": "b"}}, (1, 1)),
        ({"config": {"bos_token_id": 0, "eos_token_id": [2, 3]}}, (0, 2)),
        ({}, (4, 4)),
    ],
)
def test_begin_and_end_are_found_beside_the_file(word_files, beside, wanted):
    folder = word_files({"?": 0, "b": 1, "e": 2, "x": 3, "<|endoftext|>": 4}, **beside)
    for path in (folder, folder / "tokenizer.json"):
        found = open_tokenizer(str(path))
        assert (found.begin_id, found.end_id) == wanted
        assert found.encode(["x e y"]) == [[3, 2, 0]]


def test_one_of_both_serves_as_the_other(word_files):
    found = load_tokenizer(word_files({"?": 0, "</s>": 1}))
    assert (found.begin_id, found.end_id) == (1, 1)


def test_the_vocabulary_may_have_holes(word_files):
    assert load_tokenizer(word_files({"?": 0, "</s>": 9})).vocab_size == 10


def test_neither_begin_nor_end_is_refused(word_files):
    with pytest.raises(
        UserError, match=r"does not say which token begins or ends.*bos_token.*data\.tokenizer"
    ):
        load_tokenizer(word_files({"?": 0}))


def test_a_named_token_that_does_not_exist_is_refused(word_files):
    folder = word_files({"?": 0}, tokenizer_config={"bos_token": "<b>"})
    with pytest.raises(
        UserError, match="tokenizer_config.json names bos_token '<b>', which .* does not have"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json is no tokenizer.json that the package tokenizers can read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("other.json", "{}", "there is no tokenizer at .*tokenizer.json; a folder needs a tokenizer.json"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, said):
    if name == "tokenizer_config.json":
        BytesTokenizer().save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("byte", "no tokenizer 'byte'; did you mean 'bytes'.*or the path of a tokenizer.json"),
        ("bpe", "must be bpe:SIZE with SIZE at least 257, got 'bpe'"),
        ("bpe:many", "at least 257, got 'bpe:many'"),
        ("bpe:256", "at least 257, got 'bpe:256'"),
        ("no/such/folder", "no tokenizer 'no/such/folder'"),
    ],
)
def test_a_setting_that_names_no_tokenizer_is_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        bpe_size(setting)


def test_settings_that_name_one(tmp_path):
    assert (bpe_size("bpe:4096"), bpe_size("bytes"), bpe_size(str(tmp_path))) == (4096, None, None)
