"""A key-value cache that is not copied with every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A ``DynamicLayer`` with room to grow: keys and values are views of larger tensors, which new tokens are written into.

    The original concatenates, so each token copies all that came before it: at 768 cached tokens that is half of a decoding
    step. Here they are copied when the room is full, and it then grows by half.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = [states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)]
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._rooms[0].shape[-2]:
            self._rooms = [_enlarged(room, begin, self._length + self._length // 2) for room in self._rooms]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, begin : self._length] = states
        return self._views()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rooms = [room[indices] for room in self._rooms]
        self._views()

    def _views(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[:, :, : self._length] for room in self._rooms)
        return self.keys, self.values


def _enlarged(room: Tensor, used: int, size: int) -> Tensor:
    larger = room.new_empty(*room.shape[:2], size, room.shape[3])
    larger[:, :, :used] = room[:, :, :used]
    return larger


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache for a model of that configuration; layers that keep no more than a window stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
