"""What a driver does when Ray itself is killed; bench/cluster_faults.py does it at random."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # a machine takes seconds to start

STORE = 100 * 2**20
DRIVER = """
import sys, time
from pathlib import Path
from bob.cache.executors import watch
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work
from bob.errors import BobError

watch.SECONDS_TO_ANSWER = 2

def make(numbers):
    time.sleep(0.2)
    return [str(number).encode() for number in numbers]

def files(numbers):
    Path("begun").touch()
    return {}

try:
    with ItemCache("test") as cache:
        wanted = Wanted([item_key(n=n) for n in range(400)], {"item": "test"}, Maker({}, {}))
        cache.take(wanted, Work(make, files=files), 1)
except BobError as error:
    sys.exit(f"bob: {error}")
"""


@pytest.fixture
def head(tmp_path):
    """The driver's machine, where the items are made as well."""
    resources = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    folder = {"BOB_NODE_FOLDER": str(tmp_path / "node")}
    cluster = Cluster(initialize_head=True, head_node_args=resources | {"env_vars": folder})
    yield cluster.head_node
    cluster.shutdown()


def process_of(head, kind):
    (process,) = head.all_processes[kind]
    return psutil.Process(process.process.pid)


@pytest.mark.parametrize(
    ("kind", "told"),
    [("gcs_server", "the head of the Ray cluster"), ("raylet", "Ray's process of this machine")],
)
def test_a_run_that_loses_ray_ends_with_one_line(head, repository, kind, told):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": head.gcs_address},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("begun").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    process_of(head, kind).kill()
    _, errors = driver.communicate(timeout=30)
    *warnings, last = errors.splitlines()
    assert driver.returncode == 1
    assert last.startswith(f"bob: {told}") and last.endswith("; what was made is kept")
    assert not any("Traceback" in line for line in warnings)
