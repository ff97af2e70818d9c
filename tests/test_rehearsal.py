"""The whole pipeline on the classes of the full-size models, a few weights each."""

import pytest

from bench import rehearsal

pytestmark = pytest.mark.slow


def test_all_stages_run_on_the_hubs_classes_and_no_library_says_a_word(tmp_path):
    project = rehearsal.build(tmp_path, rehearsal.SIZES["small"])
    repro = rehearsal.measured(project, "-m", "dvc", "repro", "evaluate")
    assert rehearsal.not_ours(repro.errors) == []
    assert "finetune: LoRA of rank 2 trained" in repro.output
    # The rest one by one, as the bench does.
    figures = [rehearsal.rehearse(project, stage) for stage in ("export", "card")]
    assert [one.said for one in figures] == [[], []]
    assert (project / "results/export/README.md").is_file()
    assert figures[0].planned_disk > 0
    assert len(rehearsal.table(figures)) == 3


def test_a_plan_that_does_not_know_a_stages_memory_is_told():
    known = rehearsal.Figures("finetune", 1.0, 1500, 1000, 800, 0, 0, [])
    unknown = rehearsal.Figures("generate", 1.0, 1500, 1000, 700, 0, 0, [])
    elsewhere = rehearsal.Figures("audit", 1.0, 1500, 1000, 0, 0, 0, [])
    (line,) = rehearsal.missed([known, unknown, elsewhere])
    assert line.startswith("generate")
