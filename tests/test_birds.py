"""Real photos, brought in as a user does; skipped where the photos are not at hand.

They are of Caltech-UCSD Birds and not ours to redistribute. BOB_BIRDS names the folder that holds
task/train and task/test.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.dvc_project import dvc, make_project, run

BIRDS = Path(os.environ.get("BOB_BIRDS", ROOT.parent / "shared" / "data" / "birds")) / "task"
SPECIES = ("Anna_Hummingbird", "Ruby_throated_Hummingbird", "Rufous_Hummingbird")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIRDS.is_dir(), reason=f"no bird photos at {BIRDS} (set BOB_BIRDS)"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    for part, count in (("train", 6), ("test", 4)):
        for species in SPECIES:
            target = folder / "data/birds" / part / species
            target.mkdir(parents=True)
            for photo in sorted((BIRDS / part / species).iterdir())[:count]:
                shutil.copyfile(photo, target / photo.name)
    (folder / "data/birds/dataset.yaml").write_text("descriptor: bird\n")
    backbone = "models/efficientnet-lite0"
    subprocess.run(
        [sys.executable, str(ROOT / "bench/imagenet_backbone.py"), backbone],
        cwd=folder,
        check=True,
    )
    dvc(folder, "add", "data/birds", backbone)
    run(folder, "git", "add", "data", "models")
    run(folder, "git", "commit", "--quiet", "--message", "birds and an ImageNet backbone")
    return folder


def test_the_pipeline_runs_on_photos_with_an_imagenet_backbone(project):
    settings = {
        "data.name": "birds",
        "classify.backbone": "models/efficientnet-lite0",
        "audit.feature_model": "models/efficientnet-lite0",
        "classify.epochs": 6,
    }
    overrides = [word for key, value in settings.items() for word in ("-S", f"{key}={value}")]
    dvc(project, "exp", "run", *overrides)
    accuracy = json.loads((project / "metrics/accuracy.json").read_text())
    onnx = json.loads((project / "metrics/onnx.json").read_text())
    assert accuracy["real_only"]["top1"] > 100 / len(SPECIES), "better than chance"
    assert onnx["top1"] == pytest.approx(onnx["torch_top1"])
    sheet = Image.open(project / "results/audit/contact_sheets/01.png")
    assert sheet.width > 500

    told = predicted(project)
    with (project / "results/evaluate/predictions/real_and_synthetic.csv").open() as file:
        measured = {(row["image"], row["seed"]): row["predicted"] for row in csv.DictReader(file)}
    assert told == {image: name for (image, seed), name in measured.items() if seed == "0"}
    top1 = accuracy["real_and_synthetic"]["top1"]
    assert f"on {top1:.1f} % (" in (project / "results/export/README.md").read_text()


def predicted(project):
    """The class that the exported script names for each test photo."""
    command = (sys.executable, "results/export/predict.py", "--format", "csv", "--top", "1")
    rows = csv.DictReader(io.StringIO(run(project, *command, "results/split/test")))
    return {row["photo"]: row["class"] for row in rows}
