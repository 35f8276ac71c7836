"""Negatives: a run whose contrastive loss compares nothing looks perfect, and learns nothing. It is told, and stopped.

Where every pair of a global batch has the same caption or image, no text is a negative of any image: the loss is 0.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.train.grad_cache import StepLoss

logger = logging.getLogger(__name__)

PATIENCE = 10  # steps without negatives, one after another, after which the run stops


class NegativesWatch:
    """Counts the steps without negatives. Their numbers are the same on every rank, so all stop at the same one."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.without = 0
        self.warned = False

    def step(self, losses: StepLoss, *, last: bool) -> None:
        """Look at a step's losses. Raises ValueError after PATIENCE of them, or at the run's last step."""
        contrastive = losses.contrastive
        left_out = int(contrastive.duplicates) + int(contrastive.false_negatives)
        only_captions = losses.caption_tokens > 0 and not left_out  # no pair has a short caption
        if float(contrastive.effective_negatives) > 0 or only_captions:
            self.without = 0
            return
        self.without += 1
        if self.without >= PATIENCE or (last and self.warned):
            raise ValueError(
                f"no image of the last {self.without} global batches has a text to be told from, so the contrastive "
                f"loss is 0 and nothing is learned: {self._reason(int(contrastive.duplicates))}"
            )
        if not self.warned:
            logger.warning("no image of this global batch has a text to be told from; the loss says nothing")
            self.warned = True

    def _reason(self, duplicates: int) -> str:
        if self.config.loss.false_negatives_above is not None:
            return (
                f"the teacher finds all captions of a batch as similar as loss.false_negatives_above "
                f"{self.config.loss.false_negatives_above}, or they are equal; raise it"
            )
        if duplicates:
            return (
                "all pairs of a batch have the same caption or the same image, and duplicates are no negatives; look "
                "at the captions that the scan found, or set loss.mask_duplicates False"
            )
        return (
            f"fewer than two pairs of a batch of {self.config.train.global_batch} have a caption of less than "
            f"data.short_below {self.config.data.short_below} tokens; raise one of the two"
        )
