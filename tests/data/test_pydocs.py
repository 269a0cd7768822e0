"""The rules of the source `pydocs`, on a made-up installation and a little of the real one."""

import itertools
import sysconfig
from pathlib import Path

from hardy.data.pydocs import pydocs_source

TEXT = "def answer():\n    return 'a line of ordinary source'\n" * 8


def installation(write_files):
    stdlib = write_files(
        {
            "b.py": TEXT + "b",
            "a/c.py": TEXT + "c",
            "a/copy.py": TEXT + "b",
            "a/short.py": "pass",
            "a/long.py": "x" * 400_001,
            "a/table.py": "1234567890, " * 50,
            "a/latin.py": TEXT.encode() + b"\xff",
            "a/image.png": TEXT,
            "test/t.py": TEXT + "test",
            "a/__pycache__/p.py": TEXT + "cache",
            "site-packages/x.py": TEXT + "site",
        },
        folder="stdlib",
    )
    site = write_files(
        {
            "zebra/z.md": TEXT + "z",
            "alpha/x.rst": TEXT + "x",
            "torch/t.pyi": TEXT + "t",
            "torch/tests/no.py": TEXT + "no",
            "numpy/n.txt": TEXT + "n",
            "alpha-1.0.dist-info/METADATA.txt": TEXT + "meta",
            "loose.py": TEXT + "loose",
        },
        folder="site",
    )
    return {"stdlib": stdlib, "packages": [site, site / "missing"]}


def test_what_is_read_and_in_which_order(write_files):
    found = list(pydocs_source(**installation(write_files)).read())
    names = ["b.py", "a/c.py", "torch/t.pyi", "numpy/n.txt", "alpha/x.rst", "zebra/z.md"]
    assert [document.name for document in found] == [f"stdlib/{name}" for name in names[:2]] + names[2:]
    assert [document.text for document in found] == [TEXT + letter for letter in "bctnxz"]


def test_the_fingerprint_notices_a_new_file_and_another_size(write_files):
    folders = installation(write_files)
    first = pydocs_source(**folders).fingerprint()
    assert first == pydocs_source(**folders).fingerprint()
    (folders["stdlib"] / "b.py").write_text(TEXT + "longer")
    second = pydocs_source(**folders).fingerprint()
    (folders["stdlib"] / "new.py").write_text(TEXT + "new")
    assert len({first, second, pydocs_source(**folders).fingerprint()}) == 3


def test_this_machine_begins_with_its_standard_library():
    first = list(itertools.islice(pydocs_source().read(), 5))
    assert {document.name.partition("/")[0] for document in first} == {
        Path(sysconfig.get_paths()["stdlib"]).name
    }
    assert all(200 <= len(document.text.encode()) <= 400_000 for document in first)
