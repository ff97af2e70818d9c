"""A team's cache over ssh and S3, with the real pipeline at tiny settings; and after kills."""

import re

import pytest

from bench import remotes, team_kills
from bench.project import batches_made, clear_log
from tests.dvc_project import dvc, make_project, ran, run

pytestmark = pytest.mark.slow

WITH_ITEMS = ("caption", "finetune", "generate", "audit", "classify")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose stages with items have run."""
    project = make_project(tmp_path_factory.mktemp("team") / "project", counted=True)
    dvc(project, "repro", *WITH_ITEMS)
    return project


def bob(folder, *arguments):
    return run(folder, "python", "-m", "bob", *arguments)


@pytest.mark.parametrize("kind", ["ssh", "s3"])
def test_a_clone_elsewhere_makes_nothing_of_what_was_pushed(project, tmp_path, kind):
    if kind == "ssh" and remotes.SSHD is None:
        pytest.skip("no sshd is installed (Debian: openssh-server)")
    with remotes.REMOTES[kind](tmp_path / "storage") as served:
        served.configure(project)
        run(project, "git", "add", "--all")
        run(project, "git", "commit", "--quiet", "--message", kind)
        pushed = re.search(r"storage: (\d+) items pushed", bob(project, "cache", "push"))
        clone = tmp_path / "elsewhere/clone"
        run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
        assert pushed and f"storage: {pushed[1]} items in 1 new shards" in bob(
            clone, "cache", "pull"
        )
        clear_log(clone)
        output = dvc(clone, "repro", *WITH_ITEMS)
    assert ran(output) >= set(WITH_ITEMS)
    assert not any(batches_made(clone, stage) for stage in WITH_ITEMS)
    assert "warning" not in output
    assert run(clone, "git", "diff", "dvc.lock") == ""  # the same bytes


@pytest.mark.timeout(1800)
def test_kills_at_random_moments_lose_nothing_and_leave_nothing_half(tmp_path):
    with remotes.folder(tmp_path / "storage") as served:
        done = list(team_kills.kills(tmp_path, served, count=5, seed=1))
    assert sum(kill.hit for kill in done) == 5
    assert [kill for kill in done if kill.faults] == []
