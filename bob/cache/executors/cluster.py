"""The executor that makes items on the machines of a Ray cluster.

The driver, a stage, keeps index and objects; workers need neither DVC nor its cache. A worker is a
Ray actor with a GPU of its own (or a CPU, where the cluster has no GPU), which loads what it needs
once. A worker that fails, in whatever way, is given up with its process, and its batch goes to
another: no more is lost than the batches in flight.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bob.cache.executors.chosen import ADDRESS
from bob.cache.executors.files import Source
from bob.cache.executors.watch import Watch, reach
from bob.cache.executors.worker import Greeting, Refused, Worker
from bob.cache.recipe import Maker
from bob.cache.work import Hardware, Keep, Made, Work
from bob.errors import BobError, tell

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# What finds out the hardware is given no GPU and must see those that there are.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
    from ray.exceptions import ActorDiedError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode
except ModuleNotFoundError:
    raise BobError("Ray is not installed; pip install -c constraints.txt -e '.[ray]'") from None

ATTEMPTS = 4  # at a batch, each by another worker
FAILURES = 3  # in a row, after which a machine is left alone
SILENT = 5  # workers in a row that end without a word, after which no more are begun
SECONDS_TO_ANSWER = 120
SECONDS_TO_SAY = 20  # that there is no worker yet
_TICK = 1.0  # seconds between looks at what the cluster has
_STORE = 2**30  # bytes of shared memory: results on their way, of which there are few at a time
_HEAD, _RAYLET = "the head of the Ray cluster", "Ray's process of this machine"
_CARRIED = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "OMP_WAIT_POLICY")


@dataclass(eq=False)
class _Batch:
    numbers: list[int]
    failed_on: list[str] = field(default_factory=list)
    """The machines of the workers that have failed at it."""


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it: it says where it is, it greets, then it makes batches."""

    actor: Any
    doing: Any
    """What it is to return next; None if nothing."""
    node: str = ""
    """Ray's id of its machine, once it has said so."""
    name: str = ""
    """The machine's host name."""
    greeted: bool = False
    batch: _Batch | None = None
    began: float = 0.0
    parked: bool = False
    """Not used, and kept so that Ray puts no other in its place."""

    @property
    def idle(self) -> bool:
        return self.doing is None and not self.parked


def open_cluster() -> "Cluster":
    """Join the cluster that the environment names, or begin one of this machine.

    Raises BobError where that is not possible.
    """
    import bob

    # Whatever is asked of it, Ray prints the last lines of the log of a machine that was lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    address = os.environ.get(ADDRESS)
    options: dict[str, Any] = {"address": address}
    parts: dict[str, str] = {}
    if not address:
        options = {"address": "local", "include_dashboard": False, "object_store_memory": _STORE}
    elif address.startswith("ray://"):
        raise BobError(
            f"{ADDRESS} is {address}, and a stage must run on a machine of the cluster; `ray start "
            "--address HOST:PORT --num-cpus 0 --num-gpus 0` makes this one one that makes nothing, "
            f"then {ADDRESS}=auto"
        )
    elif address.rpartition(":")[2].isdigit():
        try:
            reach(address)
        except OSError as error:
            raise BobError(f"no Ray cluster at {address} ({error.strerror or error})") from None
        parts = {_HEAD: address}
    watch = Watch(parts)
    try:
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "py_modules": [str(Path(bob.__file__).parent)],
                "excludes": ["**/__pycache__"],
                "env_vars": {name: os.environ[name] for name in _CARRIED if name in os.environ},
            },
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        watch.failed()
        raise BobError(
            f"no Ray cluster at {address or 'this machine'} ({_line(error)}); `ray status` shows "
            "one that runs"
        ) from None
    head, raylet = _parts()
    watch.joined({_HEAD: head, _RAYLET: raylet}, lambda: _is_joined(head))
    return Cluster(is_own=not address)


def _parts() -> tuple[str, str]:
    """Where the cluster's head and Ray's process of this machine listen."""
    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return context.gcs_address, f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"


def _is_joined(head: str) -> bool:
    """Whether this process is one of the cluster with that head; asks nobody."""
    return ray.is_initialized() and bool(ray.get_runtime_context().gcs_address == head)


class Cluster:
    """The workers of this process; `is_own`: the cluster is this machine, for this process."""

    def __init__(self, *, is_own: bool) -> None:
        self._is_own = is_own
        self._hardware: Hardware | None = None
        self._look: Callable[[], Hardware] | None = None
        self._hands: list[_Hand] = []
        self._source: Any = None
        self._failures: Counter[str] = Counter()  # by machine, since its last success
        self._reasons: dict[str, str] = {}  # by machine that is left alone
        # Workers in a row that have ended before they said where they are, and why the last one.
        self._silent, self._silence = 0, ""
        self._waits_since = time.monotonic()  # 0: no longer, or it was said
        self._slots, self._looked = ("CPU", 0), 0.0

    # --- what there is -------------------------------------------------------------------------

    def slots(self) -> tuple[str, int]:
        """`GPU` or `CPU`, and how many of them the cluster has: as many workers can there be.

        No more than _TICK old: the question goes to the cluster's head.
        """
        if time.monotonic() > self._looked + _TICK:
            resources = ray.cluster_resources()
            kind = "GPU" if resources.get("GPU") else "CPU"
            slots = kind, int(resources.get(kind, 0))
            if slots != self._slots:
                self._silent = 0  # a machine has come, where workers may do better
            self._slots, self._looked = slots, time.monotonic()
        return self._slots

    def workers(self) -> int:
        """See `Executor.workers`."""
        return self.slots()[1]

    def hardware(self, look: Callable[[], Hardware]) -> Hardware:
        """See `Executor.hardware`.

        All that are used compute on the same device: the GPU where the cluster has GPUs and else
        the CPU, the other one only where no machine has that. A machine with another is left alone,
        and so is one that does not answer, as long as one does. Of several names the first in the
        alphabet stands for all.
        """
        if self._hardware:
            return self._hardware
        self._look = look
        if self._is_own:
            self._hardware = look()
            return self._hardware
        kind, _ = self.slots()
        remote: Any = ray.remote(num_cpus=0, num_gpus=0)(look)
        nodes = {
            node["NodeID"]: node["NodeManagerHostname"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(kind)
        }
        if not nodes:
            raise BobError("the Ray cluster has neither GPUs nor CPUs to make items with")
        looking = {
            node: remote.options(scheduling_strategy=OnNode(node, soft=False)).remote()
            for node in nodes
        }
        found, silent = _answers(looking)
        if not found:
            reason = next(iter(silent.values()))
            raise BobError(f"the Ray cluster does not answer ({reason})")
        self._hardware = _of_all(found.values(), "cuda" if kind == "GPU" else "cpu")
        for node, reason in silent.items():
            self._leave_alone(node, nodes[node], f"it does not say what it has ({reason})")
        for node, there in found.items():
            if other := _other_kind(self._hardware, there):
                self._leave_alone(node, nodes[node], other)
        return self._hardware

    # --- making --------------------------------------------------------------------------------

    def make(
        self, work: Work, maker: Maker, batches: Iterable[list[int]], most: int, keep: Keep
    ) -> None:
        """See `Executor.make`."""
        pickled = ray.cloudpickle.dumps((work.make, work.encode))
        todo = _Batches(batches)
        self._silent = 0  # what was broken may be mended
        with _Keeper(keep) as keeper:
            while todo.left or any(hand.batch for hand in self._hands):
                self._hire(most)
                usable = {hand.node for hand in self._hands if hand.greeted and not hand.parked}
                for hand in [hand for hand in self._hands if hand.idle]:
                    if batch := todo.next(hand.node, usable):
                        files = work.files(batch.numbers)
                        hand.batch, hand.began = batch, time.monotonic()
                        hand.doing = hand.actor.make.remote(
                            pickled, work.inputs(batch.numbers), files
                        )
                keeper.flush()
                self._await(maker, todo, keeper.done)
        # The rest would take the place of others' workers.
        self._dismiss(lambda hand: not (hand.greeted or hand.parked))

    def _hire(self, most: int) -> None:
        """Ask for as many workers as are of use; Ray begins each as soon as there is room."""
        kind, slots = self.slots()
        useful = sum(not hand.parked for hand in self._hands)
        wanted = min(slots - len(self._hands), most - useful)
        for _ in range(wanted if self._silent < SILENT else 0):
            if self._source is None:
                here = OnNode(ray.get_runtime_context().get_node_id(), soft=False)
                # It keeps nothing, so that a new process is as good as the one that was killed.
                again = {"max_restarts": -1, "max_task_retries": -1}
                source: Any = ray.remote(num_cpus=0, max_concurrency=8, **again)(Source)
                self._source = source.options(scheduling_strategy=here).remote(str(Path.cwd()))
            needs = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
            worker: Any = ray.remote(max_restarts=0, **needs)(Worker)
            actor = worker.options(scheduling_strategy="SPREAD").remote(
                str(Path.cwd()), self._source, _threads(kind)
            )
            self._hands.append(_Hand(actor, actor.where.remote()))
        if not self._hands and self._silent >= SILENT:
            raise BobError(f"no worker of the Ray cluster can begin ({self._silence})")
        if not self._hands:
            raise BobError("the Ray cluster has neither GPUs nor CPUs to make items with")
        if all(hand.parked for hand in self._hands):
            reason = next(iter(self._reasons.values()))
            raise BobError(f"no machine of the Ray cluster can be used; {reason}")

    def _await(self, maker: Maker, todo: "_Batches", done: list[Made]) -> None:
        """Wait for workers; batches go to `done`, or back to be made again."""
        pending = {hand.doing: hand for hand in self._hands if hand.doing is not None}
        ready = _ready(list(pending))
        if (
            not ready
            and self._waits_since
            and time.monotonic() > self._waits_since + SECONDS_TO_SAY
        ):
            self._waits_since = 0.0
            tqdm.write("waiting for a worker of the Ray cluster", file=sys.stderr)
        for hand in [pending[one] for one in ready]:
            try:
                result = ray.get(hand.doing)
            except RayError as error:
                self._lost(hand, error, todo)
                continue
            except OSError as error:  # no worker's: that would be a RayError as well
                raise _without_ray(error) from None
            hand.doing = None
            if not hand.node:
                self._begun(hand, result, maker)
            elif hand.batch is None:
                self._greeted(hand, result, maker)
            elif isinstance(result, Refused):
                raise BobError(f"{result.message} (on {hand.name})")
            else:
                self._failures[hand.node] = 0
                done.append(Made(hand.batch.numbers, result, time.monotonic() - hand.began))
                hand.batch = None

    def _begun(self, hand: _Hand, where: tuple[str, str], maker: Maker) -> None:
        hand.node, hand.name = where
        self._waits_since, self._silent = 0.0, 0
        hand.parked = hand.node in self._reasons
        if not hand.parked:
            look = self._look and ray.cloudpickle.dumps(self._look)
            hand.doing = hand.actor.greet.remote(maker, look)

    def _greeted(self, hand: _Hand, greeting: Greeting, maker: Maker) -> None:
        hand.greeted = True
        here, there = self._hardware, greeting.hardware
        if greeting.error:
            self._leave_alone(hand.node, hand.name, greeting.error)
        elif changes := greeting.maker.changes(maker):
            reason = f"it differs from here: {', '.join(changes)}"
            self._leave_alone(hand.node, hand.name, reason)
        elif here and there and (other := _other_kind(here, there)):
            self._leave_alone(hand.node, hand.name, other)

    def _lost(self, hand: _Hand, error: Exception, todo: "_Batches") -> None:
        """Give a worker up with its process, whose state nobody knows."""
        self._hands.remove(hand)
        ray.kill(hand.actor)
        reason = _reason(error)
        if hand.batch and todo.failed(hand.batch, hand.node) == ATTEMPTS:
            raise BobError(
                f"{ATTEMPTS} workers have failed at the same batch, the last on {hand.name} "
                f"({reason})"
            )
        if not hand.node:
            self._silent, self._silence = self._silent + 1, reason
            if self._silent == SILENT and self._hands:
                tell(
                    f"warning: {SILENT} workers in a row have ended before they could say where "
                    f"they are ({reason}); no more are begun"
                )
        else:
            self._silent = 0  # its place may be had by a worker that does better than those
            self._failures[hand.node] += 1
            if self._failures[hand.node] == FAILURES:
                reason = f"{FAILURES} workers in a row have failed ({reason})"
                self._leave_alone(hand.node, hand.name, reason)

    def _leave_alone(self, node: str, name: str, reason: str) -> None:
        if node not in self._reasons:
            tell(f"warning: {name} is not used; {reason}")
        self._reasons[node] = f"{name}: {reason}"
        for hand in self._hands:
            hand.parked |= hand.node == node and hand.batch is None

    def _dismiss(self, whom: Callable[[_Hand], bool]) -> None:
        for hand in self._hands:
            if whom(hand):
                ray.kill(hand.actor)
        self._hands = [hand for hand in self._hands if not whom(hand)]

    def close(self) -> None:
        """See `Executor.close`."""
        self._dismiss(lambda hand: True)
        if self._source is not None:
            ray.kill(self._source)
            self._source = None


class _Batches:
    """The batches that are to be made, for the first time or again."""

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self._fresh, self._again = iter(batches), list[_Batch]()
        self._first = next(self._fresh, None)

    @property
    def left(self) -> bool:
        """Whether there is one that nobody makes."""
        return bool(self._again or self._first)

    def next(self, node: str, usable: Set[str]) -> _Batch | None:
        """What a worker on `node` is to make: first what others have failed at.

        But not where workers on the same machine have, while one on another of the `usable` could.
        """
        for batch in self._again:
            if node not in batch.failed_on or usable <= set(batch.failed_on):
                self._again.remove(batch)
                return batch
        if self._first is None:
            return None
        batch, self._first = _Batch(self._first), next(self._fresh, None)
        return batch

    def failed(self, batch: _Batch, node: str) -> int:
        """Have a batch made again, at which a worker on `node` has failed; how many have by now."""
        batch.failed_on.append(node)
        self._again.append(batch)
        return len(batch.failed_on)


class _Keeper:
    """Keeps what is `done` in a thread, all that came meanwhile at once; for a `with` block."""

    def __init__(self, keep: Keep) -> None:
        self.done: list[Made] = []
        self._keep, self._thread = keep, ThreadPoolExecutor(1)
        self._keeping: Future[None] | None = None

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._thread.shutdown()
        if self._keeping:
            self._keeping.result()

    def flush(self) -> None:
        """Keep what is done, after what was done before: no more than two lots are in memory."""
        if self.done:
            if self._keeping:
                self._keeping.result()
            self._keeping, self.done = self._thread.submit(self._keep, self.done), []


def _answers(looking: Mapping[str, Any]) -> tuple[dict[str, Hardware], dict[str, str]]:
    """What machines have, by their ids, and why others do not say so."""
    ready, _ = ray.wait(list(looking.values()), num_returns=len(looking), timeout=SECONDS_TO_ANSWER)
    found, silent = dict[str, Hardware](), dict[str, str]()
    for node, answer in looking.items():
        if answer not in ready:
            silent[node] = f"no answer in {SECONDS_TO_ANSWER} s"
            continue
        try:
            found[node] = ray.get(answer)
        except RayError as error:
            silent[node] = _reason(error)
    return found, silent


def _of_all(found: Collection[Hardware], device: str) -> Hardware:
    """What is true of all machines that compute on `device`, or on the other where none does."""
    used = [one for one in found if one.device == device] or found
    one = min(used, key=lambda one: one.name)
    bf16 = one.bf16 if all(other.bf16 == one.bf16 for other in used) else None
    return replace(one, bf16=bf16, compiles=all(other.compiles for other in used))


def _other_kind(all_have: Hardware, there: Hardware) -> str:
    """Why a machine would make other items than those that are used; empty where it would not."""
    if there.device != all_have.device:
        return f"it computes on {there.device}, the others on {all_have.device}"
    if all_have.bf16 not in (None, there.bf16):
        return "there, precision: auto is another than on the others"
    return ""


def _ready(pending: list[Any]) -> list[Any]:
    """What has come of these, once there is something, but after _TICK at the latest."""
    try:
        ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
        return ray.wait(pending, num_returns=len(pending), timeout=0)[0] if ready else []
    except OSError as error:
        raise _without_ray(error) from None


def _without_ray(error: OSError) -> BobError:
    return BobError(f"{_RAYLET} does not answer ({_line(error)}); what was made is kept")


def _threads(kind: str) -> int:
    """How many threads a worker computes with: a GPU's share of its machine's CPUs, or one."""
    if kind == "CPU":
        return 1
    shares = [
        node["Resources"].get("CPU", 0) // node["Resources"]["GPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    ]
    return max(1, int(min(shares, default=1)))


def _reason(error: Exception) -> str:
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        # It is told with the traceback, whose last line says what was raised.
        return _line(str(error).strip().rpartition("\n")[2])
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {_line(cause)}"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
