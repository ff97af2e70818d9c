"""The whole pipeline on the classes of the full-size models, a few weights each."""

import pytest

from bench import rehearsal

pytestmark = pytest.mark.slow


def test_every_stage_runs_on_the_hubs_classes_and_no_library_says_a_word(tmp_path):
    project = rehearsal.build(tmp_path, rehearsal.SIZES["small"])
    figures = [rehearsal.rehearse(project, stage) for stage in rehearsal.STAGES]
    assert {one.stage: one.said for one in figures if one.said} == {}
    assert (project / "results/export/classifier.onnx").is_file()
    planned = {one.stage for one in figures if one.planned_memory}
    assert planned > {"caption", "finetune", "generate", "classify"}
    assert "finetune" in rehearsal.table(figures)[4]


def test_a_plan_that_does_not_know_a_stages_memory_is_told():
    known = rehearsal.Figures("finetune", 1.0, 1000, 800, 0, 0, [])
    unknown = rehearsal.Figures("generate", 1.0, 1000, 700, 0, 0, [])
    elsewhere = rehearsal.Figures("audit", 1.0, 1000, 0, 0, 0, [])
    (line,) = rehearsal.missed([known, unknown, elsewhere])
    assert line.startswith("generate")
