"""Run folders that lend each other what they have in common: sealed stages, and finished samples.

Both are found by content: a stage by its fingerprint, a sample by its key, so what is taken over is what would have been
made. Files are linked, or copied where the file system has no links; nobody writes into them again. Left out on purpose:
folders that are still being written; the lender must have finished.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from selfsteer.durable import make_folder, sync
from selfsteer.store import Stage

_MANIFEST, _PARTS = "MANIFEST.json", "parts"


def adopt(stage: Stage, lenders: Iterable[Stage], fingerprint: str) -> bool:
    """Take over the sealed stage of a lender that was made from the same origin; False where none has it."""
    for lender in lenders:
        if lender.is_current(fingerprint):
            outputs = lender.verify().outputs
            for name in outputs:
                _link(lender.path / name, stage.path / name)
            # Last, as in sealing: what is there without it counts for nothing.
            _link(lender.path / _MANIFEST, stage.path / _MANIFEST)
            return True
    return False


def borrow(stage: Stage, lenders: Iterable[Stage]) -> None:
    """Put the samples that lenders made themselves among the stage's own."""
    for lender in lenders:
        run = lender.path.parent.parent.name
        for part in sorted((lender.path / _PARTS).glob("main-*.jsonl")):
            own = stage.path / _PARTS / f"{run}-{part.name}"
            if not own.exists():
                _link(part, own)


def _link(source: Path, target: Path) -> None:
    """`target` as `source` is, whole or not at all."""
    make_folder(target.parent)
    unfinished = target.with_name(f".{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:  # another device, or a file system without links
        shutil.copyfile(source, unfinished)
    unfinished.replace(target)
    sync(target.parent)
