"""How many pictures are drawn between two reports of progress."""

import torch

BATCH_SIZES = {"cpu": 20}  # small, so that progress is seen; a GPU wants more at once
BATCH_SIZE = 100


def pictures_at_once(device: torch.device | str) -> int:
    """How many pictures to draw between two reports of progress."""
    return BATCH_SIZES.get(torch.device(device).type, BATCH_SIZE)
