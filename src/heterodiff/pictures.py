"""Pictures of tensors: single images, image files, captioned grids."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from heterodiff.errors import DataError

BACKGROUND = (255, 255, 255)
INK = (45, 50, 60)
GAP = 6
MARGIN = 12
MAX_ENLARGED_SIDE = 512
MAX_CAPTION_WIDTH = 140
MAX_CAPTION_LINES = 3
MAX_LABEL_LENGTH = 500  # characters; more than there is room for
MAX_ROW_NAME_WIDTH = 240
MAX_TITLE_WIDTH = 600
PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOSAIC_LINE = 0.85  # light grey
NO_LABELS = {"", "none"}
GREEN, RED = (0.1, 0.8, 0.2), (0.95, 0.15, 0.1)
TINT = 0.6


def tinted(images: Tensor, masks: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Tint the pixels of masks (B, H, W) bool in RGB images (B, 3, H, W) in [0, 1]."""
    tint = torch.tensor(colour).view(1, 3, 1, 1)
    return torch.where(masks[:, None], (1 - TINT) * images + TINT * tint, images)


def _cells(channels: int, mosaic: bool) -> tuple[int, int]:
    """Return the rows and columns of the mosaic of ``channels`` channels; (1, 1) for a plain picture."""
    if channels in PNG_MODES and not mosaic:
        return 1, 1
    columns = math.ceil(math.sqrt(channels))
    return math.ceil(channels / columns), columns


def _channel_mosaic(image: Tensor) -> Tensor:
    """Tile the channels of an image, (C, H, W) -> (1, rows (H + 1) - 1, columns (W + 1) - 1), see :func:`to_pil`."""
    rows, columns = _cells(len(image), mosaic=True)
    lined = torch.nn.functional.pad(image, (0, 1, 0, 1), value=MOSAIC_LINE)
    channels, height, width = lined.shape
    padded = torch.cat([lined, lined.new_ones(rows * columns - channels, height, width)])
    tiled = padded.reshape(rows, columns, height, width).permute(0, 2, 1, 3)
    return tiled.reshape(1, rows * height, columns * width)[:, :-1, :-1]


def _check_image(image: Tensor) -> Tensor:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"an image has the shape (C, H, W), found {tuple(image.shape)}")
    return image.detach().to("cpu", torch.float32)


def to_pil(image: Tensor, mosaic: bool = False) -> Image.Image:
    """Convert one image to a picture for viewing.

    Args:
        image: (C, H, W), values in [0, 1]; values outside are clipped, NaN is drawn black.
        mosaic: show 3 or 4 channels as grey tiles too, for modalities instead of colours.

    Returns:
        Mode L, RGB or RGBA for 1, 3 or 4 channels; otherwise L, the channels as a near-square mosaic with light lines
        of one pixel between the tiles and white spare tiles.

    Raises:
        ValueError: ``image`` does not have three non-empty dimensions.
    """
    image = _check_image(image)
    if mosaic or image.shape[0] not in PNG_MODES:
        image = _channel_mosaic(image)
    values = image.nan_to_num(0).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values.squeeze(2) if values.shape[2] == 1 else values)


def save_image(
    image: Tensor,
    path_stem: str | Path,
    spec_dtype: str = "uint8",
    value_range: tuple[float, float] = (0, 255),
) -> Path:
    """Write one image in the units of the data it was trained on.

    8-bit data with 1, 3 or 4 channels become an 8-bit PNG and 16-bit data with one channel a 16-bit PNG; everything
    else becomes a float32 ``.npy`` of shape (C, H, W), because PNG cannot hold it.

    Args:
        image: (C, H, W), values in [0, 1]; values outside are clipped.
        path_stem: path without the suffix (dots in it are kept); missing folders are made.
        spec_dtype: type of the stored data: ``uint8``, ``uint16``, or any other name for float.
        value_range: stored values of 0 and 1.

    Returns:
        The path written.

    Raises:
        DataError: the image contains NaN or infinity.
        ValueError: ``image`` does not have three non-empty dimensions.
    """
    image = _check_image(image)
    if not bool(torch.isfinite(image).all()):
        raise DataError(f"{path_stem}: the image to save contains NaN or infinite values; nothing written")
    low, high = value_range
    stored = low + image.double().clamp(0, 1).numpy() * (high - low)
    Path(path_stem).parent.mkdir(parents=True, exist_ok=True)
    channels = image.shape[0]
    fits_png = channels in PNG_MODES if spec_dtype == "uint8" else channels == 1 and spec_dtype == "uint16"
    if not fits_png:
        path = Path(f"{path_stem}.npy")
        np.save(path, stored.astype(np.float32), allow_pickle=False)
        return path
    pixels = stored.round().clip(0, np.iinfo(spec_dtype).max).astype(spec_dtype).transpose(1, 2, 0)
    path = Path(f"{path_stem}.png")
    Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(path)
    return path


@lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib: the same on every machine, with most alphabets."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _widest(texts: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return max((math.ceil(font.getlength(" ".join(text.split()))) for text in texts), default=0)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return ``text`` on one line, cut with an ellipsis if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return ``text`` in up to three lines of at most ``width`` pixels; the last one is cut if necessary."""
    lines, words = [""], text.split()
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) < MAX_CAPTION_LINES:
            lines.append("")
        else:
            lines[-1] = " ".join([lines[-1], *words])
            words = []
    return [_shorten(line, font, width) for line in lines]


def _enlarge(image: Tensor, min_side: int, mosaic: bool) -> Tensor:
    """Repeat the pixels of (C, H, W) so that the shorter side of its picture reaches ``min_side`` (bounded).

    This precedes the mosaic, so that its lines stay one pixel thin.
    """
    channels, height, width = image.shape
    rows, columns = _cells(channels, mosaic)
    short, long = sorted((rows * height, columns * width))
    factor = max(1, min(math.ceil(min_side / short), MAX_ENLARGED_SIDE // long))
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _on_background(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*BACKGROUND, 255)), picture).convert("RGB")


def image_grid(
    images: Tensor,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    min_side: int = 64,
    title: str | None = None,
    mosaic: bool = False,
) -> Image.Image:
    """Lay images out in a grid on white, row by row.

    Args:
        images: (B, C, H, W), values in [0, 1].
        labels: one per image, drawn under it, or left of the row if each row has a single label; or one per row, drawn
            left of it. Nothing is drawn if all are "none" or empty.
        columns: images per row; default: a near-square grid.
        min_side: images with a shorter side are enlarged by an integer factor, nearest neighbour.
        title: one line above the grid.
        mosaic: show every channel as a grey tile, see :func:`to_pil`.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no images, a wrong shape, or a number of labels that fits neither images nor rows.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have the shape (B, C, H, W) with B >= 1, found {tuple(images.shape)}")
    tiles = [_on_background(to_pil(_enlarge(_check_image(image), min_side, mosaic), mosaic)) for image in images]
    tile_width, tile_height = tiles[0].size
    if columns is None:
        columns = max(1, round(math.sqrt(len(tiles) * tile_height / tile_width)))
    columns = min(columns, len(tiles))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, found {columns}")
    rows = math.ceil(len(tiles) / columns)
    names = [str(label)[:MAX_LABEL_LENGTH] for label in labels] if labels is not None else []
    if labels is not None and len(names) not in (len(tiles), rows):
        raise ValueError(f"expected {len(tiles)} labels (images) or {rows} (rows), found {len(names)}")
    captions, row_names = _place_labels(names, len(tiles), columns)
    return _draw_grid(tiles, columns, captions, row_names, title)


def _place_labels(names: list[str], images: int, columns: int) -> tuple[list[str], list[str]]:
    """Return (captions of the images, names of the rows), one of them empty: a repeated label appears once a row."""
    if set(names) <= NO_LABELS:
        return [], []
    if len(names) != images:
        return [], names
    rows = [names[start : start + columns] for start in range(0, images, columns)]
    if all(len(set(row)) == 1 for row in rows):
        return [], [row[0] for row in rows]
    return names, []


def _draw_grid(
    tiles: list[Image.Image], columns: int, captions: list[str], row_names: list[str], title: str | None
) -> Image.Image:
    """Draw tiles of one size with a caption under each, or a name left of each row, or neither."""
    tile_width, tile_height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    # Text keeps a readable size; cells widen for it, within bounds.
    size = min(20, max(12, tile_height // 9))
    font, title_font = _font(size), _font(size + 3, bold=True)
    cell_width = max(tile_width, min(_widest(captions, font), MAX_CAPTION_WIDTH))
    wrapped = [_wrap(caption, font, cell_width) for caption in captions]
    line_height = round(size * 1.25)
    cell_height = tile_height + (line_height * max(map(len, wrapped)) + size // 4 if captions else 0)
    name_width = min(_widest(row_names, font), MAX_ROW_NAME_WIDTH)
    left = MARGIN + (name_width + 2 * GAP if row_names else 0)
    top = MARGIN + (round((size + 3) * 1.8) if title else 0)
    width = left + columns * (cell_width + GAP) - GAP + MARGIN
    if title:
        width = max(width, min(_widest([title], title_font), MAX_TITLE_WIDTH) + 2 * MARGIN)

    picture = Image.new("RGB", (width, top + rows * (cell_height + GAP) - GAP + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN), _shorten(title, title_font, width - 2 * MARGIN), INK, title_font)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = left + column * (cell_width + GAP), top + row * (cell_height + GAP)
        picture.paste(tile, (x + (cell_width - tile_width) // 2, y))
        if captions:
            for line, text in enumerate(wrapped[index]):
                draw.text((x + cell_width / 2, y + tile_height + 2 + line * line_height), text, INK, font, anchor="ma")
    for row, name in enumerate(row_names):
        middle = top + row * (cell_height + GAP) + tile_height / 2
        draw.text((MARGIN + name_width, middle), _shorten(name, font, name_width), INK, font, anchor="rm")
    return picture
