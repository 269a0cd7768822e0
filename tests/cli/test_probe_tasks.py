"""Texts with labels: a user's file and the built-in questions."""

import json

import pytest

from hardy.cli.probe_tasks import MODULES, Examples, built_in, read_labels
from hardy.config import UserError
from hardy.data.documents import Document


def test_a_file_of_lines_is_read(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n\n{"text": "é", "label": 3, "more": 1}\n', encoding="utf-8")
    found = read_labels(path)
    assert (found.texts, found.labels) == (["a", "é"], ["x", "3"])
    assert len(set(found.groups)) == 2


def test_groups_are_read_and_equal_texts_are_one_where_there_is_none(tmp_path):
    path = tmp_path / "labels.jsonl"
    lines = [("a", "me"), ("b", "me"), ("c", 7), ("d", "7"), ("me", None), ("e", None), ("e", None)]
    path.write_text(
        "".join(
            json.dumps({"text": text, "label": "x"} | ({} if group is None else {"group": group})) + "\n"
            for text, group in lines
        )
    )
    first = {group: place for place, group in reversed(list(enumerate(read_labels(path).groups)))}
    assert [first[group] for group in read_labels(path).groups] == [0, 0, 2, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "labels.jsonl:2 is no JSON"),
        ('{"text": "a"}', 'labels.jsonl:2 has no "label"'),
        ("[1]", 'labels.jsonl:2 has no "text"'),
        ('{"text": "", "label": 1}', 'labels.jsonl:2: "text" must be text that is not empty'),
        ('{"text": 1, "label": 1}', 'labels.jsonl:2: "text" must be text'),
        ('{"text": "a", "label": ""}', 'labels.jsonl:2: "label" must be text or a whole number'),
        ('{"text": "a", "label": 0.5}', 'labels.jsonl:2: "label" must be text or a whole number, got 0.5'),
        (
            '{"text": "a", "label": 1, "group": null}',
            'labels.jsonl:2: "group" must be text or a whole number, got None',
        ),
        (
            '{"text": "a", "label": 1, "group": ""}',
            "labels.jsonl:2: \"group\" must be text or a whole number, got ''",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, text):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "x"}) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read_labels(path)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([], "FILE has 0 classes (no text at all); a probe needs at least two"),
        (["a", "a"], "FILE has 1 classes (a)"),
    ],
)
def test_too_little_to_learn_from_is_refused(labels, text):
    with pytest.raises(UserError) as error:
        Examples(texts=labels, labels=labels, groups=labels).check(where="FILE")
    assert str(error.value).startswith(text)


SOURCE = '''
def documented(a, b):
    """Return {0}, which is said at some length so that this counts as a docstring of its own, with
    a second line that brings it over the least number of characters a text must have."""
    total = 0
    for value in (a, b, {0}):
        total += value * value + 17 * (value - 3)
        if total > 1_000_000:
            raise ValueError("too large to go on with, which nobody wants to see")
    return total
'''


def test_docstrings_are_told_from_code():
    documents = [Document(f"python/{n}.py", SOURCE.replace("{0}", str(n))) for n in range(12)]
    documents.append(Document("python/broken.py", "def (:"))
    found = built_in("docstring", num_examples=10, seed=0, documents=documents)
    assert sorted(set(found.labels)) == ["code", "docstring"]
    assert len(found.texts) == len(set(found.texts)) == 10
    for text, label in zip(found.texts, found.labels, strict=True):
        assert ("second line" in text) == (label == "docstring") != ("total = 0" in text)
    sources = {document.name: document.text.replace(" ", "") for document in documents}
    for text, file in zip(found.texts, found.groups, strict=True):
        assert text.splitlines()[0].replace(" ", "") in sources[file] or f"(a, b, {file[7:-3]})" in text, (
            "the group is the file"
        )


def test_pieces_are_labelled_with_their_package():
    body = "".join(f"value_{n} = {n} * {n}\n" for n in range(200))
    names = [f"python3/{module}/x.py" for module in MODULES[:3]] + ["python3/json.py", "python3/tkinter/x.py"]
    documents = [Document(name, f"# {name}\n" + body) for name in names]
    found = built_in("module", num_examples=12, seed=0, documents=documents)
    assert set(found.labels) == set(MODULES[:3])
    assert all(found.labels.count(module) <= 4 for module in MODULES[:3])
    assert all(len(text) == 400 for text in found.texts)
    assert set(found.groups) == set(names[:3])


def test_a_class_is_drawn_from_two_files_where_it_has_them():
    def document(name, count):
        return Document(name, "".join(f"{name}_{n} = {n}\n" for n in range(count)))

    documents = [document("python3/json/a.py", 2000), document("python3/json/b.py", 25)]
    documents += [document("python3/email/a.py", 2000)]
    for seed in range(5):
        found = built_in("module", num_examples=4, seed=seed, documents=documents)
        assert found.labels == ["email"] * 2 + ["json"] * 2
        assert sorted(found.groups) == ["python3/email/a.py"] * 2 + ["python3/json/a.py", "python3/json/b.py"]


def test_the_draw_depends_on_the_seed_alone():
    documents = [Document(f"python/{n}.py", SOURCE.replace("{0}", str(n))) for n in range(30)]
    draws = [built_in("docstring", num_examples=8, seed=seed, documents=documents) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.slow
def test_this_machines_python_has_enough_of_every_package():
    found = built_in("module", num_examples=1000, seed=0)
    assert len(set(found.labels)) >= 12
    assert len(found.texts) > 600
