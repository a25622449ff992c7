import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from longtail_experts.tracking import identity
from longtail_experts.tracking.identity import DECIDES_FIGURES, PACKAGE


def test_all_that_computes_is_part_of_the_code_an_expert_is_known_by():
    computes = {
        path
        for room in ("data", "learning")
        for path in (PACKAGE / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {path.suffix for path in computes} == {".py", ".cpp", ".h"}
    assert computes <= {path for pattern in DECIDES_FIGURES for path in PACKAGE.glob(pattern)}


def test_all_commits_of_several_resumes_are_told():
    commits = f"{40 * 'b'}, {40 * 'c'}"
    assert identity.shortened("resumed.git.commit", commits) == f"{12 * 'b'}, {12 * 'c'}"
    assert identity.shortened("calibrated.code_sha256", 64 * "d") == 12 * "d"
    assert identity.shortened("processor", commits) == commits


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Iterator[Callable[..., str]]:
    """A repository that is not ours; calls git there."""
    if shutil.which("git") is None:
        pytest.skip("no git on PATH")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in (
        "GIT_AUTHOR_NAME",
        "GIT_COMMITTER_NAME",
        "GIT_AUTHOR_EMAIL",
        "GIT_COMMITTER_EMAIL",
    ):
        monkeypatch.setenv(name, "someone")
    (tmp_path / "identity.py").write_text("")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "nothing of ours")
    yield git
    identity.git_tags.cache_clear()


def test_the_commit_of_a_repository_that_merely_surrounds_the_source_is_not_its(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "identity.py"))
    git_tags = identity.git_tags.__wrapped__
    assert git_tags() == {}
    repository("add", "identity.py")
    repository("commit", "-q", "-m", "ours")
    expected = {"git.commit": repository("rev-parse", "HEAD"), "git.dirty": "false"}
    assert git_tags() == expected


def test_a_hooks_repository_is_not_that_of_the_source(repository, tmp_path, monkeypatch):
    before = identity.git_tags.__wrapped__()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert identity.git_tags.__wrapped__() == before


def test_a_commit_made_while_a_process_trains_is_not_that_of_its_later_experts(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "identity.py"))
    repository("add", "identity.py")
    repository("commit", "-q", "-m", "what was imported")
    identity.git_tags.cache_clear()
    begun = identity.git_tags()
    (tmp_path / "identity.py").write_text("changed = True")
    repository("commit", "-q", "-a", "-m", "later")
    assert identity.git_tags() == begun != identity.git_tags.__wrapped__()
