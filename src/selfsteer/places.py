"""Where each record of a journal lies, in a quarter of the memory that a dictionary takes.

Left out on purpose: removing one, and keys; a slot is the hash of a key.
"""

import numpy as np
from numpy.typing import NDArray

SLOT = 16
"""Bytes of a slot."""

_RECENT = 2**16


class Places:
    """Slots to places: sorted arrays, 24 bytes a record, and a dictionary of the recent ones, a sixteenth at most."""

    def __init__(self) -> None:
        self._slots: NDArray[np.bytes_] = np.empty(0, f"S{SLOT}")  # (records,) ascending
        self._places: NDArray[np.int64] = np.empty(0, np.int64)  # (records,)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._slots) + len(self._recent)

    def __contains__(self, slot: bytes) -> bool:
        return self.find(slot) is not None

    def __getitem__(self, slot: bytes) -> int:
        place = self.find(slot)
        if place is None:
            raise KeyError(slot)
        return place

    def find(self, slot: bytes) -> int | None:
        """The place of a slot, or None."""
        place = self._recent.get(slot)
        if place is None and len(self._slots):
            # numpy leaves zero bytes at the end out, on both sides alike.
            at = int(np.searchsorted(self._slots, np.bytes_(slot)))
            if at < len(self._slots) and self._slots[at] == np.bytes_(slot).rstrip(b"\0"):
                place = int(self._places[at])
        return place

    def add(self, slot: bytes, place: int) -> None:
        """Note the place of a slot; the first one stays."""
        if slot in self:
            return
        self._recent[slot] = place
        if len(self._recent) > max(_RECENT, len(self._slots) // 16):
            self._settle()

    def _settle(self) -> None:
        recent = sorted(self._recent.items())
        slots = np.array([slot for slot, _ in recent], f"S{SLOT}")
        at = np.searchsorted(self._slots, slots)
        self._slots = np.insert(self._slots, at, slots)
        self._places = np.insert(self._places, at, np.array([place for _, place in recent], np.int64))
        self._recent = {}
