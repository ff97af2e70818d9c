"""The executor that makes everything in this process."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from bob.cache.recipe import Maker
from bob.cache.work import Hardware, Keep, Made, Work


class Local:
    """Makes batch after batch; one is encoded and kept in threads while the next is made."""

    def make(
        self, work: Work, maker: Maker, batches: Iterable[list[int]], most: int, keep: Keep
    ) -> None:
        """See `Executor.make`."""
        kept: Future[None] | None = None
        with ThreadPoolExecutor() as encoders, ThreadPoolExecutor(1) as keeper:
            for numbers in batches:
                began = time.monotonic()
                items = work.make(*work.inputs(numbers))
                encoded = [encoders.submit(work.encode, item) for item in items]
                if kept:  # before the next, so that no more than two are in memory
                    kept.result()
                seconds = time.monotonic() - began
                kept = keeper.submit(_keep, keep, numbers, encoded, seconds)
            if kept:
                kept.result()

    def hardware(self, look: Callable[[], Hardware]) -> Hardware:
        """See `Executor.hardware`."""
        return look()

    def workers(self) -> int:
        """See `Executor.workers`."""
        return 1

    def close(self) -> None:
        """Nothing to let go of."""


def _keep(keep: Keep, numbers: list[int], encoded: list[Future[bytes]], seconds: float) -> None:
    keep([Made(numbers, [future.result() for future in encoded], seconds)])
