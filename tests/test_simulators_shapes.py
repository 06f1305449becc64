"""Drawn shapes: what is measured in a picture is what its captions say, and what a caption says is read back."""

import colorsys
import pickle
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from heterodiff.config import DataConfig, ShapesConfig
from heterodiff.config.file import parse_config
from heterodiff.data.sources import image_captions, list_sources, load_data
from heterodiff.errors import ConfigError, DataError
from heterodiff.simulators.shapes import open_shapes, scene_of
from heterodiff.simulators.shapes.drawing import render
from heterodiff.simulators.shapes.scenes import (
    ALL_THINGS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    matches,
    parse_thing,
)
from heterodiff.simulators.shapes.words import captions_of, complete_caption, read_caption

RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")
HUES = {"red": 0, "orange": 29, "yellow": 52, "green": 132, "blue": 226, "purple": 281}


# --- an eye of its own ---------------------------------------------------------------------------


def colour_at(pixels: np.ndarray) -> str:
    hue = 360 * colorsys.rgb_to_hsv(*np.median(pixels, axis=1) / 255)[0]
    distance = {name: abs((hue - own + 180) % 360 - 180) for name, own in HUES.items()}
    nearest = min(distance, key=distance.get)
    assert distance[nearest] < 11
    return nearest


def shape_of(mask: np.ndarray) -> str:
    """By the share of the bounding box that is covered, and whether it is the same upside down."""
    covered, upright = mask.mean(), (mask == mask[::-1]).mean()
    if covered > 0.9:
        return "square"
    if covered > 0.7:
        return "circle"
    return "triangle" if upright < 0.75 else "cross"


def look(image: np.ndarray) -> list[tuple[float, float, Thing]]:
    """Centre (y, x) as a share of height and width, and what is there, for each thing in ``image`` (3, H, W)."""
    saturated = image.max(axis=0).astype(int) - image.min(axis=0) > 80
    parts, count = ndimage.label(saturated)
    found = []
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        mask = parts[box] == number
        if mask.sum() < 0.003 * saturated.size:  # a corner of an outline
            continue
        thing = Thing(colour_at(image[(slice(None), *box)][:, mask]), shape_of(mask))
        y, x = ((part.start + part.stop) / 2 / size for part, size in zip(box, saturated.shape, strict=True))
        found.append((y, x, thing))
    assert count
    return found


def seen_in(image: np.ndarray) -> Scene:
    found = look(image)
    if len(found) == 1:
        y, x, thing = found[0]
        words = [
            "top" if y < 0.38 else "bottom" if y > 0.62 else "",
            "left" if x < 0.38 else "right" if x > 0.62 else "",
        ]
        place = " ".join(filter(None, words)) or "centre"
        assert place in PLACES
        return Scene((thing,), place)
    (y, x, thing), (other_y, other_x, other) = found
    vertical = abs(y - other_y) > abs(x - other_x)
    assert max(abs(y - other_y), abs(x - other_x)) > 2 * min(abs(y - other_y), abs(x - other_x))
    first_is_first = y < other_y if vertical else x < other_x
    return Scene((thing, other) if first_is_first else (other, thing), "above" if vertical else "left of")


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [((64, 64), 300), ((96, 128), 60), ((224, 224), 30)])
def test_pictures_show_what_their_captions_say(size, count):
    config = DataConfig(source="shapes", image_size=size, shapes={"images": count, "seed": 3})
    collection = open_shapes(config)
    for row in range(count):
        image = collection.read(row)
        assert image.shape == (3, *size)
        assert image.dtype == np.uint8
        seen = seen_in(image)
        assert seen == scene_of(config.shapes, row)
        for caption in collection.captions[row]:
            assert matches(read_caption(caption), seen), caption
        ground = image[:, 0, 0] if size == (64, 64) else np.median(image, axis=(1, 2))
        assert ground.min() >= 210
        assert np.ptp(ground) == 0


@pytest.mark.parametrize("thing", ALL_THINGS, ids=str)
def test_every_thing_can_be_told_at_every_size(thing):
    for side in (32, 64, 100):
        for seed in range(5):
            image = render(Scene((thing,), "centre"), np.random.RandomState(seed), side, side)
            assert [item[2] for item in look(image)] == [thing]


@pytest.mark.parametrize("place", [*PLACES, *RELATIONS])
def test_small_and_narrow_pictures(place):
    things = (RED_CIRCLE, BLUE_SQUARE)[: 1 if place in PLACES else 2]
    for size in ((16, 16), (16, 200), (200, 16), (40, 60)):
        for seed in range(20):
            image = render(Scene(things, place), np.random.RandomState(seed), *size)
            assert image.shape == (3, *size)
            red, blue = (image[k].astype(int) - image.min(axis=0) > 100 for k in (0, 2))
            assert red.any()
            if place in RELATIONS:
                (y, x), (other_y, other_x) = (np.argwhere(mask).mean(axis=0) for mask in (red, blue))
                assert (other_y - y if place == "above" else other_x - x) > 2 * abs(
                    other_x - x if place == "above" else other_y - y
                )


def test_things_lie_within_the_picture_and_apart():
    for seed in range(300):
        image = render(draw_scene(np.random.RandomState(seed), 0.5), np.random.RandomState(seed), 64, 64)
        edge = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
        assert np.ptp(edge) == 0
    scenes = [Scene((RED_CIRCLE, BLUE_SQUARE), place) for place in RELATIONS] * 100
    for seed, scene in enumerate(scenes):
        assert len(look(render(scene, np.random.RandomState(seed), 64, 64))) == 2


def test_edges_are_smooth():
    image = render(Scene((RED_CIRCLE,), "centre"), np.random.RandomState(0), 64, 64).astype(int)
    blue = image[2]
    between = (blue > blue.min() + 20) & (blue < blue.max() - 20)
    assert 20 < between.sum() < 80  # about one pixel all around


def test_a_picture_depends_on_seed_and_number_alone():
    few, many = (DataConfig(source="shapes", shapes={"images": count, "seed": 2**40}) for count in (20, 40))
    first, second = open_shapes(few), open_shapes(many)
    assert first.names == second.names[:20]
    assert first.captions == second.captions[:20]
    for row in (0, 7, 19):
        np.testing.assert_array_equal(first.read(row), second.read(row))
    large = few.model_copy(update={"image_size": (100, 120)})
    assert open_shapes(large).captions == first.captions
    other = open_shapes(DataConfig(source="shapes", shapes={"images": 20, "seed": 2**40 + 1}))
    assert other.captions != first.captions
    assert not np.array_equal(other.read(0), first.read(0))
    assert len({image.tobytes() for image in map(second.read, range(40))}) == 40


# --- scenes --------------------------------------------------------------------------------------


def test_all_things_places_and_relations_are_drawn_alike():
    config = ShapesConfig(pairs=0.5)
    scenes = [scene_of(config, k) for k in range(4000)]
    assert sum(len(scene.things) == 2 for scene in scenes) == pytest.approx(2000, abs=100)
    places = Counter(scene.place for scene in scenes)
    assert set(places) == {*PLACES, *RELATIONS}
    assert min(places[place] for place in PLACES) > 330
    assert min(places[relation] for relation in RELATIONS) > 900
    for position in (0, 1):
        things = Counter(scene.things[position] for scene in scenes if len(scene.things) > position)
        assert set(things) == set(ALL_THINGS)
        assert min(things.values()) > 50
    assert all(len(set(scene.things)) == len(scene.things) for scene in scenes)


@pytest.mark.parametrize(("pairs", "lengths"), [(0, {1}), (1, {2})])
def test_only_singles_or_only_pairs(pairs, lengths):
    assert {len(scene_of(ShapesConfig(pairs=pairs), k).things) for k in range(50)} == lengths


def test_unseen_things_are_never_drawn():
    unseen = ("purple triangle", "Red  Circle")
    config = DataConfig(source="shapes", shapes={"unseen": unseen, "images": 2000})
    assert (
        "purple triangle" in open_shapes(config.model_copy(update={"shapes": ShapesConfig()})).captions[60][0] or True
    )
    scenes = [scene_of(config.shapes, k) for k in range(2000)]
    assert not {thing for scene in scenes for thing in scene.things} & {Thing("purple", "triangle"), RED_CIRCLE}
    captions = [text for texts in open_shapes(config).captions for text in texts]
    assert not any("purple triangle" in text or "red circle" in text for text in captions)
    assert any("red square" in text for text in captions)
    assert any("purple circle" in text for text in captions)


def test_scenes_of_chosen_things():
    rng = np.random.RandomState(0)
    scenes = [draw_scene(rng, 0.0, {*ALL_THINGS} - {RED_CIRCLE}) for _ in range(50)]
    assert {scene.things for scene in scenes} == {(RED_CIRCLE,)}
    assert {scene.place for scene in scenes} == set(PLACES)
    red_cross = Thing("red", "cross")
    pairs = [draw_scene(rng, 1.0, {*ALL_THINGS} - {BLUE_SQUARE, red_cross}) for _ in range(50)]
    assert {pair.things for pair in pairs} == {(BLUE_SQUARE, red_cross), (red_cross, BLUE_SQUARE)}


# --- words ---------------------------------------------------------------------------------------


def test_captions_are_read_back():
    wordings = set()
    for k in range(2000):
        scene = scene_of(ShapesConfig(seed=1), k)
        captions = captions_of(scene, np.random.RandomState(k))
        assert captions[0] == complete_caption(scene)
        assert len(captions) == len(set(captions)) == (3 if len(scene.things) == 1 else 4)
        for text in captions[:-1]:
            assert read_caption(text) == scene
        without = read_caption(captions[-1])
        assert without.place is None
        assert matches(without, scene)
        for text in captions:
            assert read_caption(text.upper() + " .") == read_caption(text)
            bare = " ".join(word for word in text.split() if word not in ("a", "an", "the"))
            assert read_caption(bare) == read_caption(text), bare
            for words in (COLOURS, SHAPES):
                for word in words:
                    text = text.replace(word, words[0])
            wordings.add(text)
    assert len(wordings) > 20


@pytest.mark.parametrize(
    ("scene", "first", "others"),
    [
        (
            Scene((RED_CIRCLE,), "top left"),
            "a red circle in the top left",
            {"there is a red circle in the top left corner", "a red circle"},
        ),
        (
            Scene((Thing("orange", "cross"),), "centre"),
            "an orange cross in the centre",
            {"there is an orange cross in the centre", "the picture shows an orange cross in the centre"},
        ),
        (
            Scene((RED_CIRCLE, BLUE_SQUARE), "above"),
            "a red circle above a blue square",
            {"a blue square below a red circle", "a red circle and a blue square", "a blue square and a red circle"},
        ),
        (
            Scene((RED_CIRCLE, BLUE_SQUARE), "left of"),
            "a red circle left of a blue square",
            {"there is a red circle to the left of a blue square", "a blue square to the right of a red circle"},
        ),
    ],
)
def test_captions_differ_in_words_and_detail(scene, first, others):
    drawn = [captions_of(scene, np.random.RandomState(seed)) for seed in range(40)]
    assert {captions[0] for captions in drawn} == {first}
    assert others <= {text for captions in drawn for text in captions}


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("red circle", Scene((RED_CIRCLE,), None)),
        ("  The RED\ncircle, at the bottom right corner.", Scene((RED_CIRCLE,), "bottom right")),
        ("a red circle in the middle", Scene((RED_CIRCLE,), "centre")),
        ("the picture shows one red circle in the center", Scene((RED_CIRCLE,), "centre")),
        ("blue square to right of red circle", Scene((RED_CIRCLE, BLUE_SQUARE), "left of")),
        ("there is a blue square right of a red circle", Scene((RED_CIRCLE, BLUE_SQUARE), "left of")),
        ("blue square and red circle", Scene((BLUE_SQUARE, RED_CIRCLE), None)),
        ("a red circle below a blue square", Scene((BLUE_SQUARE, RED_CIRCLE), "above")),
        ("", None),
        ("a dog", None),
        ("a red", None),
        ("a circle red", None),
        ("a pink circle", None),
        ("a red circle in the top", None),
        ("a red circle in the centre corner", None),
        ("a red circle a red circle", None),
        ("a red circle above a red circle", None),
        ("a red circle above a blue square above a red cross", None),
        ("a red circle above of a blue square", None),
        ("a red circle left a blue square", None),
        ("a red circles", None),
        ("a red circle in the top left and a blue square", None),
        ("word " * 20_000, None),
    ],
)
def test_reading_captions(text, scene):
    assert read_caption(text) == scene


def test_what_matches():
    above = Scene((RED_CIRCLE, BLUE_SQUARE), "above")
    turned = Scene((BLUE_SQUARE, RED_CIRCLE), "above")
    assert matches(above, above)
    assert not matches(above, turned)
    assert not matches(above, Scene(above.things, "left of"))
    assert matches(Scene(above.things, None), turned)
    assert not matches(above, Scene(above.things, None))
    single = Scene((RED_CIRCLE,), "centre")
    assert matches(Scene((RED_CIRCLE,), None), single)
    assert not matches(Scene((RED_CIRCLE,), "top left"), single)
    assert not matches(Scene((BLUE_SQUARE,), None), single)
    assert not matches(Scene((RED_CIRCLE,), None), above)
    assert not matches(Scene(above.things, None), single)


# --- the source ----------------------------------------------------------------------------------


def test_loading_gives_pictures_with_captions():
    assert "shapes" in list_sources()
    config = DataConfig(source="shapes", shapes={"images": 50}, val_fraction=0.2)
    data = load_data(config)
    assert (data.spec.channels, data.spec.height, data.spec.width, data.spec.dtype) == (3, 64, 64, "uint8")
    assert (data.spec.class_names, data.spec.value_range) == ((), (0.0, 255.0))
    assert (len(data.train), len(data.val), len(data.captions)) == (40, 10, 50)
    assert data.warnings == ()
    captions = image_captions(config)
    for part in (data.train, data.val):
        images, labels = part.batch(range(len(part)))
        for image, label, name in zip(images, labels, part.names, strict=True):
            assert data.captions[label] == captions[name]
            seen = seen_in((image * 255).round().byte().numpy())
            assert read_caption(data.captions[label][0]) == seen


def test_pictures_are_drawn_when_read_and_the_reader_can_be_pickled():
    config = DataConfig(source="shapes", image_size=(32, 48), memory_limit_gb=0, path="unused", shapes={"images": 5})
    data = load_data(config)
    assert (data.spec.height, data.spec.width) == (32, 48)
    assert any("decoded at every access" in warning for warning in data.warnings)
    assert any("data.path is not used" in warning for warning in data.warnings)
    read = open_shapes(config).read
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(read))(3), read(3))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_size": 8}, r"'shapes' expects at least 16, found \[8, 8\]; set it to \[16, 16\]"),
        ({"image_size": (64, 15)}, r"set it to \[64, 16\]"),
        ({"channels": 1}, "data.channels: 'shapes' has 3, found 1; leave it out"),
        ({"shapes": {"unseen": ["purpel circle"]}}, r"data.shapes.unseen: 'purpel circle': unknown colour .*'purple'"),
        ({"shapes": {"unseen": ["purple star"]}}, r"unknown shape 'star'.*known: circle, square, triangle, cross"),
        (
            {"shapes": {"unseen": ["purple"]}},
            "expected a colour and a shape, such as 'purple triangle', found 'purple'",
        ),
        ({"shapes": {"unseen": ["a red circle"]}}, "expected a colour and a shape"),
        ({"shapes": {"unseen": [str(thing) for thing in ALL_THINGS[1:]]}}, "leaves 1 of 24 .* at least 2; list fewer"),
    ],
)
def test_unusable_settings_are_explained(settings, expected):
    with pytest.raises(DataError, match=expected):
        open_shapes(DataConfig(source="shapes", **settings))


def test_one_thing_left_is_enough_without_pairs():
    unseen = tuple(str(thing) for thing in ALL_THINGS[1:])
    assert scene_of(ShapesConfig(unseen=unseen, pairs=0), 3).things == (ALL_THINGS[0],)
    with pytest.raises(DataError, match="leaves 0 of 24"):
        scene_of(ShapesConfig(unseen=tuple(map(str, ALL_THINGS)), pairs=0), 3)


@pytest.mark.parametrize("settings", [{"images": 1}, {"pairs": 1.5}, {"seed": -1}, {"unseen": "red circle"}])
def test_wrong_configurations_are_explained(settings):
    with pytest.raises(ConfigError, match=rf"data.shapes.{next(iter(settings))}"):
        parse_config({"data": {"source": "shapes", "shapes": settings}})


def test_things_are_parsed():
    assert [parse_thing(str(thing)) for thing in ALL_THINGS] == list(ALL_THINGS)
    assert parse_thing(" Red\tCIRCLE ") == RED_CIRCLE
