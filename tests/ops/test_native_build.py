"""Compiling and loading: the cache and what makes it stale, compilers that fail, processes at once."""

import contextlib
import logging
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hardy.ops import native_build
from hardy.ops.native_build import BuildError, load_library

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native_build.COMPILERS)), reason="needs a C++ compiler"
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    return path


@pytest.fixture
def compiler(tmp_path):
    """Return a function that writes a command which acts on its arguments as a shell script says."""

    def write(script, name="c++-of-the-test"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return write


@pytest.fixture
def counted(compiler, tmp_path):
    """A real compiler that notes each compilation, and a function that says how many there were."""
    real = next(filter(None, map(shutil.which, native_build.COMPILERS)))
    notes = tmp_path / "notes"
    command = compiler(f'[ "$1" = --version ] || echo x >> "{notes}"\nexec "{real}" "$@"')
    return command, lambda: len(notes.read_text().splitlines()) if notes.exists() else 0


def left_over(cache):
    return sorted(path.name for path in (cache / "native").iterdir())


def test_a_library_is_compiled_once_and_then_found(source, counted, tmp_path):
    command, compilations = counted
    for _ in range(2):
        loaded = load_library([source], cache_dir=tmp_path / "cache", compilers=[command])
        assert loaded.answer() == 42
    assert compilations() == 1
    (name,) = left_over(tmp_path / "cache")  # no temporary folder stays
    assert name.startswith("hardy-") and name.endswith(".so")


def test_sources_headers_flags_compiler_and_processor_make_it_another_library(
    source, counted, compiler, tmp_path, monkeypatch
):
    command, _ = counted
    header = tmp_path / "other.hpp"
    header.write_text("// first\n")

    def load(**changed):
        settings = {"cache_dir": tmp_path / "cache", "compilers": [command], **changed}
        assert load_library([source, header], **settings).answer() in (42, 43)
        return len(left_over(tmp_path / "cache"))

    assert load() == 1
    assert load(machine_flags=[["-O1"]]) == 2
    header.write_text("// second\n")
    assert load() == 3
    source.write_text(source.read_text().replace("42", "43"))
    assert load() == 4
    newer = compiler(f'[ "$1" = --version ] && echo 99.0 && exit\nexec "{command}" "$@"', name="newer")
    assert load(compilers=[newer]) == 5
    monkeypatch.setattr(native_build, "_processor", lambda: "another processor")
    assert load() == 6


def test_flags_that_the_compiler_does_not_know_are_left_out(source, counted, tmp_path):
    command, compilations = counted
    flags = (("-march=no-such-processor",), ("-mcpu=neither",), ())
    loaded = load_library([source], cache_dir=tmp_path, compilers=[command], machine_flags=flags)
    assert loaded.answer() == 42
    assert compilations() == 3


def test_the_first_compiler_that_exists_is_used(source, counted, tmp_path):
    command, compilations = counted
    load_library([source], cache_dir=tmp_path, compilers=["no-such-compiler", command])
    assert compilations() == 1


def test_without_a_compiler_the_error_says_what_to_install(source, tmp_path):
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler was found \(nothing or none\); install one, such as"
    ):
        load_library([source], cache_dir=tmp_path, compilers=["nothing", "none"])


def test_a_refusal_names_the_source_and_the_compilers_message(source, tmp_path):
    source.write_text("int answer( { return cheese; }\n")
    with pytest.raises(BuildError, match=r"could not compile answer\.cpp: .*error"):
        load_library([source], cache_dir=tmp_path)
    assert left_over(tmp_path) == []


def test_a_broken_compiler_leaves_no_half_written_library(source, compiler, tmp_path):
    broken = compiler(
        '[ "$1" = --version ] && echo 1 && exit\n'
        'for last; do :; done\nprintf half > "$last"\necho "internal error: out of cheese" >&2\nexit 1'
    )
    with pytest.raises(BuildError, match="internal error: out of cheese"):
        load_library([source], cache_dir=tmp_path / "cache", compilers=[broken])
    assert left_over(tmp_path / "cache") == []


def test_a_compiler_that_cannot_say_its_version_is_named(source, compiler, tmp_path):
    broken = compiler("echo no licence >&2; exit 3")
    with pytest.raises(BuildError, match="--version failed: no licence; repair or remove the compiler"):
        load_library([source], cache_dir=tmp_path, compilers=[broken])


def test_a_compiler_that_hangs_is_given_up(source, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "COMPILE_S", 0.2)
    slow = compiler('[ "$1" = --version ] && echo 1 && exit\nexec sleep 20')
    with pytest.raises(BuildError, match="could not be run: .*timed out.*repair or remove"):
        load_library([source], cache_dir=tmp_path, compilers=[slow])


def test_a_cached_file_that_is_no_library_is_replaced(source, tmp_path):
    cache = tmp_path / "cache"
    load_library([source], cache_dir=cache)
    (name,) = left_over(cache)
    (cache / "native" / name).unlink()
    (cache / "native" / name).write_bytes(b"no library")
    assert load_library([source], cache_dir=cache).answer() == 42
    assert load_library([source], cache_dir=cache).answer() == 42


def test_where_the_cache_cannot_be_written_the_library_serves_this_process(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", None):
        assert load_library([source], cache_dir=cache).answer() == 42


def test_a_missing_source_and_a_library_that_cannot_be_loaded_are_named(source, tmp_path, compiler):
    with pytest.raises(BuildError, match=r"missing\.hpp cannot be read \(.*\); install hardy again"):
        load_library([source, tmp_path / "missing.hpp"], cache_dir=tmp_path)
    rubbish = compiler('[ "$1" = --version ] && echo 1 && exit\nfor last; do :; done\necho rubbish > "$last"')
    with pytest.raises(BuildError, match="the compiled library cannot be loaded from"):
        load_library([source], cache_dir=tmp_path / "cache", compilers=[rubbish])


def test_two_processes_may_compile_at_once(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from hardy.ops.native_build import load_library\n"
        "sys.stdin.read(1)\n"
        "loaded = load_library([Path(sys.argv[1])], cache_dir=Path(sys.argv[2]))\n"
        "print(loaded.answer(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    with contextlib.ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(3)]
        for process in processes:  # all wait for this word, so that they begin together
            process.stdin.write("go")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert said == ["42 False\n"] * 3
    assert len(left_over(tmp_path / "cache")) == 1


@pytest.fixture
def fresh_library():
    """Forget the library before and after; other tests load it anew from the user's cache."""
    before = native_build._Settings.cache_dir
    native_build.loaded_library.cache_clear()
    yield
    native_build._Settings.cache_dir = before
    native_build.loaded_library.cache_clear()


def test_a_failure_is_a_warning_once_and_no_library(fresh_library, compiler, tmp_path, monkeypatch, caplog):
    broken = compiler('[ "$1" = --version ] && echo 1 && exit\necho "cc1plus: out of cheese" >&2; exit 1')
    monkeypatch.setattr(shutil, "which", lambda _: broken)
    native_build.use_cache_dir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hardy.ops.native_build"):
        assert [native_build.loaded_library() for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "work on the CPU is left to torch operations, which are slower" in record.getMessage()
    assert "could not compile native.cpp: cc1plus: out of cheese" in record.getMessage()
    assert not native_build.use_openmp_threads(wanted=True)


def test_the_cache_folder_can_be_chosen(fresh_library, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(native_build, "load_library", lambda sources, *, cache_dir: seen.append(cache_dir))
    native_build.loaded_library()
    native_build.use_cache_dir(tmp_path)
    native_build.loaded_library()
    assert seen == [Path("~/.cache/hardy").expanduser(), tmp_path]


def test_a_user_without_a_home_has_no_cache(fresh_library, monkeypatch):
    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    seen = []
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(native_build, "load_library", lambda sources, *, cache_dir: seen.append(cache_dir))
    native_build.loaded_library()
    assert seen == [None]


def test_all_included_files_are_part_of_the_key():
    included = {
        line.split('"')[1]
        for source in native_build.SOURCES
        for line in source.read_text().splitlines()
        if line.startswith('#include "')
    }
    assert included == {source.name for source in native_build.SOURCES[1:]}
