"""Named random streams."""

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from hardy.rng import generator_for, numpy_generator_for, seed_for

purposes = st.lists(st.text() | st.integers(), max_size=3)


@given(st.integers(), purposes)
def test_a_seed_fits_where_torch_and_numpy_take_it(seed, purpose):
    assert 0 <= seed_for(seed, *purpose) < 2**63


@given(st.integers(), purposes, st.integers(), purposes)
def test_seeds_are_equal_only_for_equal_words(seed, purpose, other_seed, other_purpose):
    same = (seed, purpose) == (other_seed, other_purpose)
    assert (seed_for(seed, *purpose) == seed_for(other_seed, *other_purpose)) == same


def test_words_do_not_run_together_and_kinds_differ():
    seeds = [
        seed_for(0, "ab", "c"),
        seed_for(0, "a", "bc"),
        seed_for(0, "abc"),
        seed_for(0, 1),
        seed_for(0, "1"),
    ]
    assert len(set(seeds)) == len(seeds)


def test_a_seed_is_the_same_in_every_process_and_release():
    assert seed_for(0, "shuffle", 1) == 5559642042051214272
    code = "from hardy.rng import seed_for; print(seed_for(0, 'shuffle', 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == seed_for(0, "shuffle", 1)


def test_a_draw_depends_on_no_other_draw():
    first = torch.rand(3, generator=generator_for(7, "noise"))
    torch.rand(100)
    torch.rand(100, generator=generator_for(7, "other"))
    assert torch.equal(first, torch.rand(3, generator=generator_for(7, "noise")))
    assert not torch.equal(first, torch.rand(3, generator=generator_for(8, "noise")))


def test_the_generator_lives_on_the_cpu_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    assert generator_for(7, "noise").device.type == "cpu"
    assert torch.equal(before, torch.get_rng_state())


def test_numpy_streams_are_named_too():
    draws = [numpy_generator_for(7, word).integers(0, 2**60, 4).tolist() for word in ("a", "a", "b")]
    assert draws[0] == draws[1] != draws[2]


def test_naming_a_stream_imports_neither_torch_nor_numpy():
    code = "import sys, hardy.rng; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
