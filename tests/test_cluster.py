"""The executor on a Ray cluster: workers, machines and drivers that fail, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from bob.cache.executors import chosen
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Hardware, Work
from bob.errors import BobError
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # a machine takes seconds to start

STORE = 100 * 2**20

# A worker does not have the tests, as it has not what a user's script defines.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Machines:
    """A cluster whose driver's machine makes nothing; each has a folder of its own."""

    def __init__(self, folder):
        self._folder, self._number = folder, 0
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
            },
        )
        self.address = self._cluster.address

    def add(self, folder=None, **resources):
        self._number += 1
        return self._cluster.add_node(
            object_store_memory=STORE,
            env_vars={"BOB_NODE_FOLDER": str(folder or self._folder / str(self._number))},
            **resources or {"num_cpus": 1},
        )

    def remove(self, one):
        self._cluster.remove_node(one, allow_graceful=False)

    def end(self):
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two machines that last for all tests."""
    machines = Machines(tmp_path_factory.mktemp("machines"))
    machines.add()
    machines.add()
    yield machines
    machines.end()


@pytest.fixture
def joined(machines, repository, monkeypatch):
    """This process is a driver of the cluster, in an empty repository."""
    monkeypatch.setenv(chosen.ADDRESS, machines.address)
    chosen.executor.cache_clear()
    yield machines
    ray.shutdown()
    chosen.executor.cache_clear()


def wanted(count, libraries=None):
    recipes = [item_key(number=number) for number in range(count)]
    return Wanted(recipes, {"item": "test"}, Maker({}, libraries or {}))


def take(count, make, size=4, **more):
    """The items' bytes, and who made them: items end with it."""
    with ItemCache("test") as cache:
        rows = cache.take(wanted(count, **more), Work(make), size)
        items = [cache.read(row.oid).decode().split() for row in rows]
    assert [item[0] for item in items] == [str(number) for number in range(count)]
    return Counter(item[1] for item in items)


def made(numbers, seconds=0.05):
    time.sleep(seconds)
    return [f"{number} {os.getpid()}".encode() for number in numbers]


def once(mark):
    """Whether this is the first call for a file, whoever calls."""
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_a_local_run_does_not_import_ray():
    code = "import sys; from bob.cache.items import ItemCache; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_worker_makes_a_share_and_nothing_is_made_twice(joined, tmp_path):
    ready = tmp_path / "ready"
    ready.mkdir()

    def make(numbers):
        # On a busy machine one worker starts long after the other.
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < 2:
            time.sleep(0.05)
        return made(numbers)

    makers = take(40, make)
    assert len(makers) == 2 and str(os.getpid()) not in makers
    assert min(makers.values()) >= 8
    assert take(44, made).keys() - makers.keys() != makers.keys()  # four items are new
    assert take(44, None) is not None


def test_an_error_of_ours_is_the_same_line_with_the_machines_name(joined):
    def make(numbers):
        raise BobError("models/x cannot be loaded; fetch another")

    with pytest.raises(BobError, match=r"^models/x cannot be loaded; fetch another \(on .+\)$"):
        take(4, make)


def test_a_worker_that_is_killed_costs_its_batch_alone(joined, tmp_path):
    mark, log = str(tmp_path / "killed"), tmp_path / "log"

    def make(numbers):
        with log.open("a") as file:
            file.write(f"{len(numbers)}\n")
        if 20 in numbers and once(mark):
            os.kill(os.getpid(), signal.SIGKILL)
        return made(numbers)

    take(40, make)
    assert sum(map(int, log.read_text().split())) == 44


def test_what_fails_whoever_makes_it_is_said_in_one_line(joined):
    def make(numbers):
        raise RuntimeError("CUDA error:\nan illegal access")

    with pytest.raises(BobError, match="RuntimeError: CUDA error: an illegal access") as caught:
        take(4, make)
    assert "\n" not in str(caught.value)


def test_what_is_done_is_kept_when_another_batch_fails_for_good(joined):
    def make(numbers):
        if 4 in numbers:
            time.sleep(2)
            raise BobError("no")
        return made(numbers)

    with pytest.raises(BobError, match="no"):
        take(20, make)
    with ItemCache("test") as cache:
        assert len(cache.present(wanted(20))) == 16


def test_other_libraries_are_refused_in_one_line(joined):
    with pytest.raises(BobError, match=r"differs from here: torch 2\.\S+ -> 0\.1$"):
        take(4, made, libraries={"torch": "0.1"})


def test_a_machine_whose_folder_is_of_no_use_is_left_alone(joined, tmp_path, capsys):
    (tmp_path / "file").touch()
    added = joined.add(folder=tmp_path / "file")
    makers = take(60, lambda numbers: made(numbers, 0.2))
    joined.remove(added)
    assert len(makers) == 2
    assert "is not used; NotADirectoryError" in capsys.readouterr().err


def test_a_machine_whose_workers_are_killed_while_they_greet_is_left_alone(
    joined, tmp_path, capsys
):
    poor, deaths = str(tmp_path / "poor"), tmp_path / "deaths"
    deaths.mkdir()

    def look():
        if os.environ["BOB_NODE_FOLDER"] == poor and ray.get_runtime_context().get_actor_id():
            (deaths / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Hardware("cpu", False)

    def make(numbers):
        while len(list(deaths.iterdir())) < 3:
            time.sleep(0.05)
        return made(numbers, 0.2)

    added = joined.add(folder=poor)
    chosen.executor().hardware(look)
    makers = take(80, make)
    joined.remove(added)
    assert len(makers) == 2 and len(list(deaths.iterdir())) == 3
    assert "is not used; 3 workers in a row have failed (ActorDied" in capsys.readouterr().err


def test_nobody_to_make_anything_is_said(repository, monkeypatch, tmp_path):
    machines = Machines(tmp_path)
    monkeypatch.setenv(chosen.ADDRESS, machines.address)
    chosen.executor.cache_clear()
    try:
        with pytest.raises(BobError, match="neither GPUs nor CPUs"):
            take(4, made)
    finally:
        ray.shutdown()
        chosen.executor.cache_clear()
        machines.end()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RAY_ADDRESS", "localhost:1", "no Ray cluster at localhost:1"),
        ("RAY_ADDRESS", "ray://localhost:10001", "must run on a machine of the cluster"),
        ("BOB_EXECUTOR", "slurm", "it can be `local` or `ray`"),
    ],
)
def test_a_cluster_that_is_none(repository, monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    chosen.executor.cache_clear()
    with pytest.raises(BobError, match=told):
        take(4, made)
    chosen.executor.cache_clear()


# --- drivers -----------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from pathlib import Path
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, item_key
from bob.cache.wanted import Wanted
from bob.cache.work import Work

def make(numbers, log=sys.argv[1]):
    gpu, began = os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()
    time.sleep(0.2)
    with open(log, "a") as file:
        file.write(f"{gpu} {began} {time.time()} {os.environ['BOB_NODE_FOLDER']}\\n")
    return [str(number).encode() for number in numbers]

first, count = int(sys.argv[2]), int(sys.argv[3])
with ItemCache("test") as cache:
    wanted = Wanted([item_key(n=first + n) for n in range(count)], {"item": "test"}, Maker({}, {}))
    cache.take(wanted, Work(make), 4)
    print(cache.account)
"""


def drive(machines, log, first, count):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(log), str(first), str(count)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": machines.address},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(batches, log, driver):
    while not log.exists() or len(log.read_text().splitlines()) < batches:
        assert driver.poll() is None
        time.sleep(0.05)


def test_a_machine_that_is_lost_costs_its_batch_and_one_that_joins_helps(machines, repository):
    log = Path("log").absolute()
    lost = machines.add()
    driver = drive(machines, log, 1000, 400)
    wait_for(9, log, driver)
    machines.remove(lost)
    joined = machines.add()
    output, _ = driver.communicate()
    machines.remove(joined)
    assert output == "0 reused, 400 made\n"
    turns = [line.split() for line in log.open()]
    assert len({folder for *_, folder in turns}) == 4
    assert 100 <= len(turns) <= 101


def test_a_driver_that_is_killed_frees_the_cluster_and_the_next_goes_on(machines, repository):
    log = Path("log").absolute()
    driver = drive(machines, log, 0, 120)
    wait_for(6, log, driver)
    driver.kill()
    driver.wait()
    output, _ = drive(machines, log, 0, 120).communicate()
    reused, made = (int(word) for word in output.split() if word.isdigit())
    assert reused + made == 120 and reused >= 6 * 4 - 2 * 4  # those in flight, on two workers
    assert len(log.read_text().splitlines()) <= 30 + 2 + 2


def test_drivers_that_share_a_machine_never_share_a_gpu(repository, tmp_path):
    machines = Machines(tmp_path / "machines")
    machines.add(num_cpus=2, num_gpus=2)
    log = Path("log").absolute()
    drivers = [drive(machines, log, 1000 * number, 12) for number in range(4)]
    assert [driver.wait() for driver in drivers] == [0] * 4
    machines.end()
    turns = sorted(
        (gpu, float(began), float(ended)) for gpu, began, ended, _ in map(str.split, log.open())
    )
    assert {gpu for gpu, _, _ in turns} == {"0", "1"} and len(turns) == 12
    for (gpu, _, ended), (other, began, _) in pairwise(turns):
        assert gpu != other or ended <= began
