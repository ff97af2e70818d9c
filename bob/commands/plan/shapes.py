"""What a call on a network costs, found without weights: on torch's meta device, shapes alone.

The networks are the real classes, so every product that the stage will make is in the count.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """What one call costs."""

    flops: int
    """Of products, convolutions and attention, as torch's flop counter has them: a multiplication
    and an addition are two."""
    peak: int
    """Bytes alive at once of what the call itself makes: activations and gradients, no weights."""


def measure(call: Callable[[], object]) -> Cost:
    """Run `call`, whose networks and inputs are on the meta device, and count.

    Attention counts as a GPU's fused kernels do it: its matrix of weights is never stored.
    """
    with (
        # Patched, because a mode of torch's is off in backward(), where checkpointed layers are
        # computed again.
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _flash_attention),
        FlopCounterMode(display=False) as counter,
        _Alive() as alive,
        _ValuesMeetShapes(),
    ):
        call()
    return Cost(counter.get_total_flops(), alive.peak)


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: object, **named: object
) -> torch.Tensor:
    """Attention by the fused kernel; on the meta device torch would take the unfused one.

    A mask decides which products are used, not which are made.
    """
    attended: torch.Tensor
    attended, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return attended


class _ValuesMeetShapes(TorchDispatchMode):
    """Lets networks mix tensors on the CPU, whose values they branch on, with those on meta.

    Token ids and grids of image patches are such values; what they come together with is a shape.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(META), (args, kwargs))
        return func(*args, **kwargs)


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)  # made outside, as weights are, or known already
        made = func(*args, **kwargs)
        for storage in _storages(made):
            self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return made

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage._cdata
        if address not in self._known:
            self._known.add(address)
            self._bytes += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.remove(address)
        self._bytes -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
