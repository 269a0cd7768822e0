"""The verbs `doctor` and `version`."""

import json
from importlib import metadata

import torch

from hardy.cli import doctor
from hardy.cli.doctor import examine
from hardy.cli.main import main


def found(cache):
    return {finding.name: finding for finding in examine(cache)}


def test_this_machine_is_well_enough_to_run_these_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HARDY_CACHE", str(tmp_path / "cache"))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("ready to train\n") and torch.__version__ in text


def test_json_has_every_finding(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HARDY_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in report["findings"]]
    assert report["ok"] is True
    assert {"python", "torch", "gloo", "attention", "cores", "memory", "cache", "extra hf"} <= set(names)
    assert len(names) == len(set(names))


def test_a_package_that_is_needed_and_missing_breaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HARDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "no_such_package"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken   no_such_package" in text and "not installed  -> pip install no_such_package" in text
    assert text.endswith("not ready: mend what is broken above\n")


def test_an_extra_that_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"hf": ("numpy", "no_such_package"), "track": ("numpy",)})
    findings = found(tmp_path)
    assert findings["extra hf"].state == "missing"
    assert findings["extra hf"].value == f"numpy {metadata.version('numpy')}; without no_such_package"
    assert findings["extra hf"].advice == "pip install 'hardy[hf]'"
    assert (findings["extra track"].state, findings["extra track"].advice) == ("ok", "")


def test_a_cache_that_cannot_be_written_breaks(tmp_path):
    (tmp_path / "file").touch()
    finding = found(tmp_path / "file" / "cache")["cache"]
    assert finding.state == "broken" and "HARDY_CACHE" in finding.advice


def test_an_old_torch_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert found(tmp_path)["torch"].state == "broken"


def test_a_look_that_fails_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_attention", lambda: (_ for _ in ()).throw(RuntimeError("no kernel")))
    finding = found(tmp_path)["attention"]
    assert (finding.state, finding.value) == ("broken", "RuntimeError: no kernel")


def test_every_optional_package_belongs_to_an_extra_of_the_distribution():
    extras = metadata.metadata("hardy").get_all("Provides-Extra")
    assert set(doctor.EXTRAS) <= set(extras or [])


def test_the_version_is_that_of_the_distribution(capsys):
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hardy"] == metadata.version("hardy")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(
        f"hardy {metadata.version('hardy')} (torch {metadata.version('torch')}"
    )
