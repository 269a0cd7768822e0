import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.config import ConfigError
from hardy.ops import philox

NAME = "layers.0.attn.q_proj.weight"
KEY = philox.key_for(0, NAME, purpose="hardy.proj.v1")
ALL = 0xFFFFFFFF


def plain_word(index, *, key, third, fourth=0):
    """Return the word of one flat index by Python integers, which never overflow."""
    c0, c1, c2, c3 = index // 4 & ALL, index // 4 >> 32, third, fourth
    k0, k1 = key & ALL, key >> 32
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & ALL,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & ALL,
        )
        k0, k1 = (k0 + 0x9E3779B9) & ALL, (k1 + 0xBB67AE85) & ALL
    return (c0, c1, c2, c3)[index % 4]


PUBLISHED = [
    ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ALL, ALL, ALL, ALL), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""(counter, key, words) of the generator's authors."""


@pytest.mark.parametrize(("counter", "key", "want"), PUBLISHED)
def test_published_vectors(counter, key, want):
    words = philox.philox(*(torch.tensor(word) for word in counter), key=key)
    assert " ".join(f"{word:08x}" for word in words.tolist()) == want
    signed = key - 2**64 if key >> 63 else key  # as an int64 tensor keeps it
    assert torch.equal(philox.philox(*(torch.tensor(word) for word in counter), key=signed), words)


def test_vectors_of_the_specification():
    assert (KEY & ALL, KEY >> 32) == (0x202F6924, 0x8D744EE0)
    words = philox.words(KEY, start=0, count=4, third=0)
    assert [f"{word:08x}" for word in words.tolist()] == ["103db372", "9c68cfd7", "c01b5480", "4d35397c"]
    epoch0 = [-1.800323974, -1.508014957, -0.241374750, 0.718324816]
    epoch0 += [-0.325353203, -0.393200133, 0.124405446, 0.445541697]
    epoch1 = [-1.796708061, 1.185046860, 0.666958144, -1.256078439]
    assert philox.normals(KEY, start=0, count=8, third=0).tolist() == pytest.approx(epoch0, abs=1e-6)
    assert philox.normals(KEY, start=0, count=4, third=1).tolist() == pytest.approx(epoch1, abs=1e-6)
    assert philox.signs(KEY, start=0, count=8, third=0).tolist() == [1, -1, -1, 1, -1, -1, -1, 1]


def test_moments_of_the_normals():
    x = philox.normals(KEY, start=0, count=1 << 20, third=0).double()
    variance = x.var(correction=0)
    assert x.mean().item() == pytest.approx(-4e-5, abs=1e-5)
    assert variance.item() == pytest.approx(0.9997, abs=1e-4)
    assert ((x - x.mean()) ** 4).mean().item() / variance.item() ** 2 == pytest.approx(2.992, abs=1e-3)
    assert x.abs().max() <= 5.77


@settings(max_examples=60)
@given(
    start=st.one_of(st.integers(0, 40), st.integers(2**34 - 20, 2**34 + 20), st.integers(2**58, 2**60)),
    count=st.integers(0, 13),
    third=st.integers(0, ALL),
    fourth=st.integers(0, ALL),
    key=st.integers(0, 2**64 - 1),
)
def test_any_range_is_python_integers_word_by_word(start, count, third, fourth, key):
    want = [plain_word(start + k, key=key, third=third, fourth=fourth) for k in range(count)]
    numbers = {"start": start, "count": count, "third": third, "fourth": fourth}
    assert philox.words(key, **numbers).tolist() == want
    assert philox.signs(key, **numbers).tolist() == [-1.0 if word >> 31 else 1.0 for word in want]


@pytest.mark.parametrize("draw", [philox.words, philox.normals, philox.signs])
def test_a_range_does_not_depend_on_where_it_begins_or_how_it_is_chunked(draw, monkeypatch):
    whole = draw(KEY, start=0, count=1000, third=3)
    for start in (1, 2, 3, 5, 402, 999):
        assert torch.equal(draw(KEY, start=start, count=1000 - start, third=3), whole[start:])
    monkeypatch.setattr(philox, "_CHUNK_COUNTERS", 7)
    assert torch.equal(draw(KEY, start=6, count=600, third=3), whole[6:606])
    assert draw(KEY, start=5, count=0, third=3).shape == (0,)


def test_box_muller_pairs_lie_in_one_counter():
    words = philox.words(KEY, start=0, count=400, third=0).view(-1, 2)
    uniform = (2 * (words >> 9) + 1).double() * 2**-24
    pairs = philox.normals(KEY, start=0, count=400, third=0).double().view(-1, 2)
    torch.testing.assert_close(pairs.square().sum(1), -2 * uniform[:, 0].log(), rtol=1e-5, atol=1e-6)
    turns = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * torch.pi) % 1
    assert ((turns - uniform[:, 1] + 0.5) % 1 - 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
def test_a_step_may_be_a_tensor_of_any_dtype(dtype):
    step = torch.tensor(70001, dtype=dtype)
    got = philox.words(KEY, start=9, count=50, third=step, fourth=step.long())
    assert torch.equal(got, philox.words(KEY, start=9, count=50, third=70001, fourth=70001))


@pytest.mark.parametrize("draw", [philox.words, philox.normals, philox.signs])
def test_nothing_is_read_on_the_host(draw):
    step = torch.empty((), device="meta")  # has no value: reading it raises
    assert draw(KEY, start=1, count=70_000, third=step, fourth=step, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("stride", "shape"), [(16, (6, 16)), (16, (6, 7)), (18, (6, 7)), (21, (9, 4)), (5, (1, 3))]
)
@pytest.mark.parametrize("start", [0, 2, 7])
def test_grid_words_are_the_words_of_its_elements(start, stride, shape):
    got = philox.grid_words(KEY, start=start, stride=stride, shape=shape, third=2, device=torch.device("cpu"))
    words = philox.words(KEY, start=0, count=300, third=2)
    rows, cols = shape
    assert got.shape == shape
    assert torch.equal(got, words[start + torch.arange(rows).unsqueeze(1) * stride + torch.arange(cols)])


def test_keys_differ_by_seed_name_and_purpose():
    keys = {
        philox.key_for(seed, name, purpose=purpose)
        for seed in (0, 1, 2**64 - 1)
        for name in (NAME, "layers.1.attn.q_proj.weight")
        for purpose in ("hardy.proj.v1", "hardy.sr.v1", "hardy.q8.v1")
    }
    assert len(keys) == 18


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ConfigError) as error:
        philox.key_for(seed, NAME, purpose="hardy.sr.v1")
    assert str(error.value) == (f"seed must be at least 0 and below 2**64, got {seed}; take it modulo 2**64")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("module.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module.a._fsdp_wrapped_module.b._checkpoint_wrapped_module.bias", "a.b.bias"),
        ("submodule.module_list.weight", "submodule.module_list.weight"),
        ("module", "module"),
        ("param.3", "param.3"),
    ],
)
def test_canonical_names(name, want):
    assert philox.canonical_name(name) == want
    assert philox.canonical_name(want) == want
