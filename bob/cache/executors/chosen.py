"""The executor that the environment names.

Where an item is made decides nothing of it, so that is no parameter and in no recipe.
"""

import importlib
import os
from functools import cache

from bob.cache.executors.local import Local
from bob.cache.work import Executor
from bob.errors import BobError

EXECUTOR = "BOB_EXECUTOR"
"""Environment variable: `local` (the default), or `ray`, which starts a Ray over this machine."""
ADDRESS = "RAY_ADDRESS"
"""Environment variable, Ray's own: the cluster to join."""

LOCAL: Executor = Local()


@cache
def executor() -> Executor:
    """The executor of this process; raises BobError where the environment names none."""
    name = os.environ.get(EXECUTOR) or ("ray" if os.environ.get(ADDRESS) else "local")
    if name == "local":
        return LOCAL
    if name == "ray":
        # By its name: no stage depends on what decides none of its results.
        cluster: Executor = importlib.import_module("bob.cache.executors.cluster").open_cluster()
        return cluster
    raise BobError(f"{EXECUTOR} is {name!r}; it can be `local` or `ray`")
