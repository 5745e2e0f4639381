"""What went wrong in a run before now: kept in each checkpoint's manifest, so that a resumed run remembers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Checkpoint
from pipeline.errors import Diverged
from pipeline.watch import Diverging


@dataclass(frozen=True)
class History:
    """What went wrong before this stretch; kept in each checkpoint's manifest."""

    order_offset: int = 0
    """Images that the order is ahead of images_seen."""
    rollbacks: int = 0
    """Times that training went back without getting past the trouble since."""
    trouble_at: int = 0
    """Images seen when it last went wrong."""
    went_back_to: int | None = None
    """Images seen of the checkpoint that it then went back to."""
    news: str = ""
    """What to tell of it in this stretch's log."""

    def manifest(self) -> dict[str, Any]:
        """Its entries in a checkpoint's manifest."""
        names = ("order_offset", "rollbacks", "trouble_at", "went_back_to")
        return {name: getattr(self, name) for name in names}

    def past_trouble(self, images_seen: int) -> History:
        """What is left to remember once a good checkpoint of so many images is written."""
        return History(order_offset=self.order_offset) if images_seen > self.trouble_at else self


def history_of(found: Checkpoint | None) -> History:
    """What a checkpoint's manifest says of the trouble before it."""
    if found is None:
        return History()
    known = {name: found.manifest[name] for name in History().manifest() if name in found.manifest}
    return History(**known)


def after_trouble(history: History, trouble: Diverging, found: Checkpoint | None, most: int) -> History:
    """The history of the stretch that begins at `found` because of this trouble.

    Raises:
        Diverged: it went back often enough.
    """
    if history.rollbacks >= most:
        raise Diverged(
            f"{trouble.reason} after {trouble.images_seen} images, and going back {history.rollbacks} time(s) did not "
            "mend it (watch.max_rollbacks); a lower optim.lr may"
        ).on_every_rank()
    start = found.images_seen if found else 0
    number = history.rollbacks + 1
    return History(
        # Past the images at which it went wrong, whatever the checkpoint's own order was.
        order_offset=history.order_offset + trouble.images_seen - start,
        rollbacks=number,
        trouble_at=max(history.trouble_at, trouble.images_seen),
        went_back_to=start,
        news=f"{trouble.reason} after {trouble.images_seen} images: back to {start} images and on with other images "
        f"({number} of {most} times)",
    )
