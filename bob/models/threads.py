"""Work on images in threads, which decoding, resizing and hashing let run beside one another."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 32  # items that a thread may be ahead, where results are small


def in_threads(
    function: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD
) -> Generator[R, None, None]:
    """`function` of each item, in order, computed ahead in as many threads as torch has.

    `ahead` items a thread at most, so that memory does not grow where the results are taken slowly.
    What is raised is raised in its place.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
