"""Which machines a driver uses, and which it leaves alone; Ray is played, so that it takes no time.

What a real Ray does, tests/test_cluster.py shows.
"""

import os
import pickle
import platform
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError, RuntimeEnvSetupError

from bob.cache import node
from bob.cache.executors import cluster
from bob.cache.executors.files import Source
from bob.cache.executors.worker import Greeting, Worker
from bob.cache.recipe import Maker
from bob.cache.work import Hardware, Work
from bob.errors import BobError

MAKER = Maker({}, {})
CPU, GPU = Hardware("cpu", False), Hardware("cuda", True, "H100", compiles=True)
NEVER = object()  # what a method does that does not return
ROUNDS = 200  # a driver that has waited so often for workers goes on for ever


class Machine:
    """A machine of the cluster, and what a worker on it does."""

    def __init__(self, name, slots=1, kind="CPU", has=CPU, **does):
        self.id, self.name = name.encode().hex().ljust(56, "0"), name
        self.slots, self.kind, self.has, self.does = slots, kind, has, does

    def answer(self, method, *args):
        """What the method of a worker returns here."""
        if method in self.does:
            return self.does[method](*args)
        if method == "where":
            return self.id, self.name
        if method == "greet":
            return Greeting(MAKER, self.has)
        if method == "look":
            return self.has
        _, (numbers,), _ = args
        return [str(number).encode() for number in numbers]


class Actor:
    """A worker, which begins on the first machine that has room for it."""

    def __init__(self):
        self.machine, self.is_dead = None, False

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *args: Call(self, method, args))


class Call:
    """What Ray's references are; a Maker, which has no hash, may be among the arguments."""

    def __init__(self, actor, method, args):
        self.actor, self.method, self.args = actor, method, args


class Ray:
    """As much of Ray as the driver asks for."""

    cloudpickle = cloudpickle

    def __init__(self, *machines):
        self.machines, self.actors, self.rounds = list(machines), [], 0

    def remote(self, **_):
        return lambda what: SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(
                remote=lambda *_: self._begin(what, scheduling_strategy)
            )
        )

    def _begin(self, what, strategy):
        if what is Source:
            return None  # there are no files
        actor = Actor()
        if what is Worker:
            self.actors.append(actor)
            return actor
        (actor.machine,) = (one for one in self.machines if one.id == strategy.node_id)
        return Call(actor, "look", ())

    def _place(self):
        alive = [actor for actor in self.actors if not actor.is_dead]
        for actor in alive:
            for machine in self.machines:
                if actor.machine:
                    break
                if sum(other.machine is machine for other in alive) < machine.slots:
                    actor.machine = machine

    def wait(self, calls, *, num_returns, timeout):
        self.rounds += 1
        assert self.rounds < ROUNDS, "workers are hired for ever"
        self._place()
        ready = [
            call
            for call in calls
            if call.actor.machine and call.actor.machine.does.get(call.method) is not NEVER
        ]
        return ready, [call for call in calls if call not in ready]

    def get(self, call):
        return call.actor.machine.answer(call.method, *call.args)

    def kill(self, actor):
        actor.is_dead = True

    def nodes(self):
        return [
            {
                "NodeID": one.id,
                "NodeManagerHostname": one.name,
                "Alive": True,
                "Resources": {one.kind: one.slots},
            }
            for one in self.machines
        ]

    def cluster_resources(self):
        return {
            kind: sum(one.slots for one in self.machines if one.kind == kind)
            for kind in {one.kind for one in self.machines}
        }

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: Machine("here").id)


@pytest.fixture
def joined(monkeypatch):
    """Join a cluster of these machines."""

    def join(*machines):
        ray = Ray(*machines)
        monkeypatch.setattr(cluster, "ray", ray)
        monkeypatch.setattr(cluster, "_TICK", -1.0)  # it looks for machines in each round
        return ray, cluster.Cluster(is_own=False)

    return join


def make(executor, batches=20):
    """Have a batch made of each number; the numbers that were made."""
    made = []
    work = Work(list, inputs=lambda numbers: (numbers,))
    numbers = ([number] for number in range(batches))
    executor.make(work, MAKER, numbers, batches, lambda lots: made.extend(lots))
    return sorted(number for one in made for number in one.numbers)


def fails(error):
    """A worker's method that ends with this error."""

    def fail(*_):
        raise error

    return fail


# --- workers that fail before they make anything -----------------------------------------------


def test_a_machine_whose_workers_die_while_they_greet_is_left_alone(joined, capsys):
    killed = ActorDiedError()  # as where there is too little memory to import torch
    _, executor = joined(Machine("poor", 2, greet=fails(killed)), Machine("rich"))
    assert make(executor) == list(range(20))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: poor is not used; 3 workers in a row have failed (ActorDied")


def test_a_cluster_whose_workers_die_while_they_greet_is_refused(joined):
    _, executor = joined(Machine("poor", 2, greet=fails(ActorDiedError())))
    with pytest.raises(BobError, match=r"can be used; poor: 3 workers in a row .*ActorDiedError"):
        make(executor)


def test_workers_that_end_without_a_word_are_not_begun_for_ever(joined):
    broken = RuntimeEnvSetupError("no space left")
    ray, executor = joined(Machine("full", 2, where=fails(broken)))
    with pytest.raises(BobError, match=r"no worker .* can begin \(RuntimeEnvSetupError: .* left\)"):
        make(executor)
    assert len(ray.actors) <= cluster.SILENT + 2


def test_of_a_worker_that_cannot_be_made_the_reason_is_told_and_not_the_traceback(joined):
    told = "Traceback (most recent call last):\n  File x, line 1, in y\nImportError: no module z\n"
    error = ActorDiedError(RayTaskError("ray::Worker.__init__()", told, ImportError()))
    _, executor = joined(Machine("bare", where=fails(error)))
    with pytest.raises(BobError, match=r"can begin \(ImportError: no module z\)$"):
        make(executor)


def test_workers_that_end_without_a_word_do_not_end_the_others(joined, capsys):
    broken = RuntimeEnvSetupError("no space left")
    full = Machine("full", 2, where=fails(broken))
    ray, executor = joined(full, Machine("good"))
    assert make(executor, 40) == list(range(40))
    assert len(ray.actors) <= 1 + 2 * (cluster.SILENT + 2)
    assert "no space left); no more are begun" in capsys.readouterr().err


def test_a_machine_that_joins_is_used_though_no_more_workers_were_begun(joined):
    ray, executor = joined(Machine("full", where=fails(RuntimeEnvSetupError())), Machine("good"))
    makers = []

    def log(*_):
        makers.append("good")
        if len(makers) == 20:
            ray.machines.insert(0, Machine("late", make=late))
        return [b"item"]

    def late(*_):
        makers.append("late")
        return [b"item"]

    ray.machines[1].does["make"] = log
    make(executor, 40)
    assert "late" in makers


def test_a_worker_is_replaced_though_others_have_ended_without_a_word(joined):
    ray, executor = joined(Machine("full", where=fails(RuntimeEnvSetupError())), Machine("good"))
    made = []

    def dies_once(pickled, inputs, files):
        made.extend(inputs)
        if len(made) == 20:
            raise ActorDiedError()
        return [b"item"]

    ray.machines[1].does["make"] = dies_once
    assert make(executor, 40) == list(range(40))


# --- machines of several kinds -----------------------------------------------------------------


def look():
    """What is not called: Ray is played."""
    raise AssertionError


def test_of_several_kinds_the_same_stands_for_all_whatever_their_order(joined):
    names = ["L4", "A10", "H200", "H100", "T4", "A100", "B200", "V100"]
    machines = [Machine(name, kind="GPU", has=replace(GPU, name=name)) for name in names]
    machines[3].has = replace(machines[3].has, compiles=False)
    for first in range(len(names)):
        _, executor = joined(*machines[first:], *machines[:first])
        assert executor.hardware(look) == Hardware("cuda", True, "A10", compiles=False)


@pytest.mark.parametrize("slow_first", [False, True])
@pytest.mark.parametrize(("kind", "used", "alone"), [("GPU", GPU, CPU), ("CPU", CPU, GPU)])
def test_a_machine_that_computes_on_another_device_is_left_alone(
    joined, capsys, slow_first, kind, used, alone
):
    machines = [Machine("same", kind=kind, has=used), Machine("other", 2, kind=kind, has=alone)]
    _, executor = joined(*machines[:: -1 if slow_first else 1])
    assert executor.hardware(look) == used
    machines[1].does["make"] = fails(AssertionError("it is used"))
    assert make(executor) == list(range(20))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: other is not used; it computes on {alone.device}, the others on {used.device}"
    )


def test_a_machine_that_joins_with_another_device_is_left_alone(joined, capsys):
    ray, executor = joined(Machine("first", kind="GPU", has=GPU))
    assert executor.hardware(look) == GPU
    ray.machines.insert(0, Machine("late", kind="GPU", has=CPU))
    make(executor)
    assert "late is not used; it computes on cpu, the others on cuda" in capsys.readouterr().err


def test_a_cluster_whose_gpus_torch_does_not_see_computes_on_its_cpus(joined, capsys):
    _, executor = joined(*(Machine(name, kind="GPU") for name in "ab"))
    assert executor.hardware(look) == CPU
    assert capsys.readouterr().err == ""


def test_where_some_multiply_in_bf16_all_are_used_and_auto_is_for_the_user_to_set(joined, capsys):
    machines = (Machine("a", has=replace(CPU, bf16=True)), Machine("b", 2, has=CPU))
    _, executor = joined(*machines)
    assert executor.hardware(look).bf16 is None
    make(executor)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (fails(RayTaskError("look", "", RuntimeError("CUDA error"))), "RuntimeError: CUDA error"),
        (NEVER, "no answer in 120 s"),
    ],
)
def test_a_machine_that_does_not_say_what_it_has_is_left_alone(joined, capsys, does, reason):
    broken = Machine("broken", 2, look=does, make=fails(AssertionError("it is used")))
    _, executor = joined(broken, Machine("good"))
    assert executor.hardware(look) == CPU
    assert make(executor) == list(range(20))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: broken is not used; it does not say what it has ({reason})"
    _, executor = joined(broken)
    with pytest.raises(BobError) as error:
        executor.hardware(look)
    assert str(error.value) == f"the Ray cluster does not answer ({reason})"


# --- what a worker says ------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker, without Ray."""
    monkeypatch.setenv(node.FOLDER, str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return Worker(str(tmp_path), None, 1)


class Unpickled:
    """Raises where it is unpickled, as a function does whose module cannot be imported."""

    def __reduce__(self):
        return os.listdir, ("/nowhere",)


def test_folders_of_workers_that_are_gone_are_removed_and_those_of_other_machines_not(
    worker, monkeypatch
):
    gone = 2**31 - 1  # no process has so high a number
    workers = node.folder("workers")
    others = {f"gpu-a-{gone}", f"gpux-{gone}", "gpu-", "gpu-notes", f"gpu-{os.getppid()}"}
    for name in (*others, f"gpu-{gone}"):
        (workers / name).mkdir()
    monkeypatch.setattr(platform, "node", lambda: "gpu")
    assert worker.greet(MAKER, None).error == ""
    assert {one.name for one in workers.iterdir()} == others | {f"gpu-{os.getpid()}"}


def test_whatever_is_raised_while_a_worker_greets_is_its_reason(worker):
    look = cloudpickle.dumps(fails(RuntimeError("CUDA error:\nan illegal access")))
    assert worker.greet(MAKER, look).error == "RuntimeError: CUDA error: an illegal access"
    assert "FileNotFoundError" in worker.greet(MAKER, pickle.dumps(Unpickled())).error
    assert worker.greet(Maker({}, {"nothing": "1"}), None).error == "it has no nothing"
    here = Hardware("cpu", False)
    assert worker.greet(MAKER, cloudpickle.dumps(lambda: here)) == Greeting(MAKER, here)
