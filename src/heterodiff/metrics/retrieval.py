"""Retrieval of images by texts and of texts by images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1024


def recall(
    images: Tensor, texts: Tensor, image_of_text: Tensor, captions: Sequence[str], ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Recall at k in both directions: the share of queries with a correct answer among the k most similar.

    Texts of the same wording are the same text: each is correct for all images that one of them describes.

    Args:
        images: embeddings (N, D); texts: embeddings (M, D); compared by their cosine.
        image_of_text: (M,) index of the image that each text describes.
        captions: the M texts themselves.

    Returns:
        ``recall@k_image_to_text`` and ``recall@k_text_to_image`` for each k.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    number: dict[str, int] = {}
    wording = torch.tensor([number.setdefault(caption, len(number)) for caption in captions], device=texts.device)
    describes = torch.zeros(len(number), len(images), dtype=torch.bool, device=images.device)
    describes[wording, image_of_text.to(images.device)] = True
    found: dict[str, float] = {}
    for name, queries, gallery, right in (
        ("image_to_text", images, texts, describes.T[:, wording]),
        ("text_to_image", texts, images, describes[wording]),
    ):
        k = min(max(ks), len(gallery))
        hits = torch.cat(
            [
                answers.gather(1, (part @ gallery.T).topk(k).indices)
                for part, answers in zip(queries.split(AT_ONCE), right.split(AT_ONCE), strict=True)
            ]
        )
        found |= {f"recall@{n}_{name}": float(hits[:, :n].any(dim=1).float().mean()) for n in ks}
    return found
