"""Cut the four pictures at the top of README.md out of those of the demos: ``python docs/draw_strip.py``.

Each shows the first columns of its picture, whatever is in them. Run it again when a demo's picture changes.
"""

from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
SIDE = 400


def cut(name: str, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Cut ``boxes`` (left, top, right, bottom) of equal size out of a picture and put them below each other."""
    with Image.open(IMAGES / name) as opened:
        parts = [opened.convert("RGB").crop(box) for box in boxes]
    height = sum(part.height for part in parts)
    stacked = Image.new("RGB", (parts[0].width, height), "white")
    for i, part in enumerate(parts):
        stacked.paste(part, (0, i * part.height))
    scale = SIDE / max(stacked.size)
    small = stacked.resize((round(stacked.width * scale), round(stacked.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def main() -> None:
    pictures = {
        "digits": cut("digits.png", (30, 10, 448, 428)),  # six of each of six classes
        "radar": cut("radar_demo.png", (83, 10, 501, 428)),  # six of each class
        "text": cut(  # prompts and what is generated for them; the real pictures above are left out
            "shapes_small_text_to_image.png", (8, 140, 446, 332), (446, 140, 884, 332)
        ),
        "lesions": cut("anomaly_demo.png", (132, 10, 580, 458)),  # image, true mask, found mask
    }
    for name, picture in pictures.items():
        picture.save(IMAGES / f"strip_{name}.png", optimize=True)


if __name__ == "__main__":
    main()
