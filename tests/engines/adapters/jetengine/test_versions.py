"""Which JetEngine is installed: found without importing it, with one error for all that is missing."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from jetengine_standin import FOLDER, OF_STANDIN, gpu_on_the_cpu

from sdar_lm_eval import EngineError, make_engine
from sdar_lm_eval.engines.adapters.jetengine import versions
from sdar_lm_eval.engines.adapters.jetengine.versions import DIALECTS, PINNED, find_jetengine

NEEDS = ("flash_attn", "flashinfer", "liger_kernel", "xxhash", "accelerate")


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder to install into; a GPU and all that JetEngine needs are there, JetEngine itself is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in OF_STANDIN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "jetengine").is_dir()])
    monkeypatch.syspath_prepend(str(FOLDER / "shared"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def package(site: Path, *files: str) -> None:
    for file in files:
        path = site / "jetengine" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise AssertionError('imported')\n")


def jetengine(site: Path, version: str = "0.2.0") -> None:
    package(site, "__init__.py", "engine/llm_engine.py")
    if version == "0.2.0":
        package(site, "engine/distributed_manager.py")


def metadata(site: Path, version: str, commit: str | None = None) -> None:
    folder = site / f"jetengine-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jetengine\nVersion: {version}\n")
    if commit:
        origin = {"url": "https://github.com/Labman42/JetEngine", "vcs_info": {"vcs": "git", "commit_id": commit}}
        (folder / "direct_url.json").write_text(json.dumps(origin))


def error() -> str:
    with pytest.raises(EngineError) as caught:
        find_jetengine()
    assert "\n" not in str(caught.value)
    return str(caught.value)


HOW = f'pip install --no-deps "jetengine @ git+https://github.com/Labman42/JetEngine@{PINNED}". Or use --model sdar'


def test_none(site):
    said = error()
    assert said.startswith("--model sdar-jetengine lacks JetEngine. Install with: pip install")
    assert HOW in said
    assert "MongoDB" not in said


def test_pypis_library_of_that_name(site):
    package(site, "__init__.py", "document.py")
    metadata(site, "0.1.3")
    said = error()
    assert "lacks JetEngine. The installed `jetengine` is PyPI's library for MongoDB: uninstall it. Install" in said
    assert HOW in said


def test_a_folder_of_that_name_is_not_that_library(site):
    """Such as a checkout, in the current folder."""
    (site / "jetengine" / "jetengine").mkdir(parents=True)
    said = error()
    assert "lacks JetEngine" in said
    assert "MongoDB" not in said


@pytest.mark.parametrize("version", DIALECTS)
def test_installed_by_pip(site, version, caplog):
    jetengine(site, version)
    metadata(site, version, DIALECTS[version].commit)
    with caplog.at_level(logging.WARNING):
        assert find_jetengine() == (DIALECTS[version], DIALECTS[version].commit)
    assert not caplog.text


def test_metadata_is_believed_before_files(site):
    jetengine(site, "0.2.0")
    metadata(site, "0.1.0")
    assert find_jetengine() == (DIALECTS["0.1.0"], None)


def test_another_commit_is_a_warning(site, caplog):
    jetengine(site)
    metadata(site, "0.2.0", "f" * 40)
    with caplog.at_level(logging.WARNING):
        assert find_jetengine() == (DIALECTS["0.2.0"], "f" * 40)
    assert f"JetEngine is at commit fffffff; this adapter was written for {PINNED[:7]}" in caplog.text


@pytest.mark.parametrize("version", ["0.3.0", "0.1.3", "0.2.0.dev1"])
def test_another_version(site, version):
    jetengine(site)
    metadata(site, version)
    said = error()
    assert f"JetEngine {version} is installed; known are 0.2.0 (commit 11563d1) and 0.1.0 (commit 0ddc55a). " in said
    assert HOW in said


@pytest.mark.parametrize("version", DIALECTS)
def test_a_checkout_on_the_path(site, version):
    other = next(known for known in DIALECTS if known != version)
    jetengine(site, other)  # its files do not matter
    (site / "pyproject.toml").write_text(f'[project]\nname = "jetengine"\nversion = "{version}"\nauthors = []\n')
    assert find_jetengine() == (DIALECTS[version], None)


def test_a_checkout_of_another_version(site):
    jetengine(site)
    (site / "pyproject.toml").write_text('[project]\nname = "jetengine"\nversion = "0.3.0"\n')
    assert "JetEngine 0.3.0 is installed" in error()


@pytest.mark.parametrize("version", DIALECTS)
@pytest.mark.parametrize("other_project", [True, False])
def test_files_that_nobody_says_the_version_of(site, version, other_project):
    jetengine(site, version)
    if other_project:
        (site / "pyproject.toml").write_text('[project]\nname = "mine"\nversion = "7.0"\n')
    assert find_jetengine() == (DIALECTS[version], None)


@pytest.mark.parametrize("version", DIALECTS)
@pytest.mark.parametrize("module", NEEDS)
def test_what_it_imports(site, version, module, monkeypatch):
    jetengine(site, version)
    found = versions.importlib.util.find_spec
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None if name == module else found(name))
    if version == "0.1.0" and module in ("flash_attn", "accelerate"):
        assert find_jetengine()[0].version == version
    else:
        assert f"--model sdar-jetengine lacks {DIALECTS[version].modules[module]}. Install with" in error()


def test_no_gpu(site, monkeypatch):
    jetengine(site)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--model sdar-jetengine lacks a CUDA GPU. " in error()


def test_all_that_is_missing_is_one_error(site, monkeypatch):
    package(site, "__init__.py")
    found = versions.importlib.util.find_spec
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda n: None if n in NEEDS[:2] else found(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "lacks JetEngine, flashinfer-python, flash-attn, a CUDA GPU. The installed `jetengine` is PyPI's" in error()


def test_a_jetengine_that_cannot_be_imported(site, demo, monkeypatch):
    jetengine(site)
    gpu_on_the_cpu(monkeypatch)
    with pytest.raises(EngineError, match=r"JetEngine cannot be imported: AssertionError: imported\. Install with"):
        make_engine("jetengine", demo)
