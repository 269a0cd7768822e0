"""The table of sources, limits, and packages that are not there."""

import sys
from types import SimpleNamespace

import pytest

from hardy.config import ConfigError, UserError
from hardy.data.config import DataConfig
from hardy.data.sources import documents, fingerprint, open_source


def texts(**settings):
    return [document.text for document in documents(DataConfig(**settings))]


@pytest.fixture
def fake_datasets(monkeypatch):
    """Stands in for the package `datasets`: records how it is called and yields two rows."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "broken":
            raise ValueError("BuilderConfig not found")
        return iter([{"text": "one", "n": 1}, {"text": "two", "n": 2}])

    def load_from_disk(path):
        calls.append(path)
        rows = [{"text": "saved"}]
        return {"train": rows} if path.endswith("dict") else rows

    module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(
        ConfigError, match="data.source=file:a.txt: there is no source 'file'; .*mean 'files'"
    ):
        open_source(DataConfig(source="file:a.txt"))


def test_pydocs_takes_no_argument():
    with pytest.raises(ConfigError, match="pydocs takes no argument; data.limit_mb sets its size"):
        open_source(DataConfig(source="pydocs:10"))


def test_pydocs_stops_at_the_limit_and_has_one_of_its_own():
    assert sum(len(text.encode()) for text in texts(limit_mb=0.3)) == 300_000
    assert open_source(DataConfig()).expected_bytes == 32_000_000


def test_files_of_all_kinds_in_order(write_files):
    folder = write_files(
        {"b.txt": "text", "a.jsonl": '{"body": "line 1"}\n{"body": "line 2"}', "c.odd": "odd"}
    )
    settings = {"source": f"files:{folder},{folder}/c.odd", "text_field": "body"}
    assert texts(**settings) == ["line 1", "line 2", "text", "odd"]
    assert texts(**settings, limit_mb=8e-6) == ["line 1", "li"]
    assert open_source(DataConfig(**settings)).expected_bytes == 44


def test_the_fingerprint_follows_files_limit_and_field(write_files):
    folder = write_files({"a.txt": "a", "b.txt": "b"})
    settings = {"source": f"files:{folder}"}
    variants = [{}, {"limit_mb": 1.0}, {"text_field": "body"}, {"source": f"files:{folder}/a.txt"}]
    found = [fingerprint(DataConfig(**settings | variant)) for variant in variants]
    assert len(set(found)) == len(variants) and found[0] == fingerprint(DataConfig(**settings))
    (folder / "b.txt").write_text("changed")
    assert fingerprint(DataConfig(**settings)) != found[0]


def test_a_file_that_vanishes_before_reading_is_said(write_files):
    folder = write_files({"a.txt": "a"})
    source = open_source(DataConfig(source=f"files:{folder}"))
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match="data.source: .*a.txt cannot be read: No such file"):
        list(source.read())


def test_synthetic_reads_through_the_table():
    assert [len(text) for text in texts(source="synthetic:constant,documents=3,mean=7")] == [7, 7, 7]


@pytest.mark.parametrize(
    ("source", "module", "said"),
    [
        (
            "hf:some/set",
            "datasets",
            r"data.source=hf:some/set needs the package datasets: pip install 'hardy\[hf\]'",
        ),
        ("files:{}", "pyarrow.parquet", r"needs the package pyarrow: pip install 'hardy\[parquet\]'"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_read(write_files, monkeypatch, source, module, said):
    folder = write_files({"a.parquet": "PAR1"})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=said):
        open_source(DataConfig(source=source.replace("{}", str(folder))))


def test_a_remote_set_is_streamed_with_its_subset_and_split(fake_datasets):
    assert texts(source="hf:owner/name@small:test") == ["one", "two"]
    assert texts(source="hf:owner/name", limit_mb=4e-6) == ["one", "t"]
    assert fake_datasets == [
        (("owner/name", "small"), {"split": "test", "streaming": True}),
        (("owner/name", None), {"split": "train", "streaming": True}),
    ]


def test_local_sets_are_opened_in_their_own_ways(fake_datasets, write_files):
    folder = write_files(
        {"dict/dataset_dict.json": "{}", "one/dataset_info.json": "", "one/state.json": "", "raw/a": ""}
    )
    assert texts(source=f"hf:{folder}/dict") == texts(source=f"hf:{folder}/one") == ["saved"]
    assert texts(source=f"hf:{folder}/raw") == ["one", "two"]
    assert fake_datasets[2] == ((f"{folder}/raw",), {"split": "train"})
    with pytest.raises(UserError, match="/one was saved without splits; leave out :test"):
        texts(source=f"hf:{folder}/one:test")
    before = fingerprint(DataConfig(source=f"hf:{folder}/raw"))
    (folder / "raw" / "a").write_text("more")
    assert fingerprint(DataConfig(source=f"hf:{folder}/raw")) != before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "hf:"}, "write hf:NAME_OR_PATH"),
        (
            {"source": "hf:broken"},
            "data.source=hf:broken cannot be read: ValueError: BuilderConfig not found; check",
        ),
        (
            {"source": "hf:a/b", "text_field": "body"},
            "hf:a/b, row 1 has no field 'body' .*its fields: text, n",
        ),
        (
            {"source": "hf:a/b", "text_field": "n"},
            "row 1: field 'n' .*holds int, not text; fields with text: text",
        ),
    ],
)
def test_what_is_wrong_with_a_set_is_said(fake_datasets, settings, said):
    with pytest.raises(UserError, match=said):
        texts(**settings)


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    settings = {"source": f"files:{tmp_path}"}
    assert texts(**settings) == ["one", "two"]
    with pytest.raises(UserError, match=r"a.parquet has no column 'body' \(data.text_field\); .*: text, n"):
        texts(**settings, text_field="body")
    with pytest.raises(UserError, match="a.parquet, row 1: field 'n' .*holds int, not text"):
        texts(**settings, text_field="n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="a.parquet is no readable Parquet file"):
        texts(**settings)
