"""The packaged characters in front of clutter: the same pixels everywhere, and what their recipe says."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipelines.data.catalog import images, load_benchmark
from pipelines.data.glyphs import glyphs, scene, scenes

PIXELS = "043a3a2532f22182d52d85d42f844dfb4485687ca42ab3593bb464a83a0cf29d"
"""SHA-256 of the pixels of all scenes, in their order. Results of other machines stand beside ours only with these."""

BLACK, WHITE = (np.full((32, 32), grey, np.uint8) for grey in (0, 255))


@pytest.mark.slow
def test_the_pixels_of_all_scenes_are_those_that_were_measured() -> None:
    digest = hashlib.sha256()
    for _, data in scenes():
        digest.update(np.asarray(Image.open(io.BytesIO(data))).tobytes())

    assert digest.hexdigest() == PIXELS


@pytest.mark.slow
def test_every_character_becomes_one_scene_on_its_own_side_of_the_division() -> None:
    paths = [path for path, _ in images("glyphs100-scene", "official")]

    assert paths == [path for path, _ in glyphs()]
    assert Counter(path.parts[0] for path in paths) == {"train": 6000, "test": 2000}
    assert {path.parts[1] for path in paths} == set(load_benchmark("glyphs100-scene").classes)


def test_a_scene_depends_on_its_character_and_its_number_alone() -> None:
    character = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))

    np.testing.assert_array_equal(scene(character, 7), scene(character.copy(), 7))
    assert (scene(character, 7) != scene(character, 8)).mean() > 0.9
    assert (scene(character, 7) != scene(character.T, 7)).mean() > 0.5


def test_the_share_of_the_character_is_that_of_the_recipe() -> None:
    """Between a black and a white character of one draw lies its share, where nothing is clipped."""
    found = []
    for index in range(200):
        black, white = (scene(character, index).astype(int) for character in (BLACK, WHITE))
        # The centre is inside the character for every draw, and a middling pixel is not clipped.
        centre = np.abs(white - black)[12:20, 12:20]
        inside = (black > 0) & (black < 255) & (white > 0) & (white < 255)
        found += (centre[inside[12:20, 12:20]] / 255).tolist()

    assert 0.345 < min(found) < 0.37
    assert 0.63 < max(found) < 0.655


def test_about_half_of_the_scenes_are_inverted() -> None:
    brighter = [
        scene(WHITE, i)[12:20, 12:20].mean() > scene(BLACK, i)[12:20, 12:20].mean() for i in range(400)
    ]

    assert 160 < sum(brighter) < 240


def test_characters_stay_in_sight_and_are_moved() -> None:
    """The middle of a dot that is drawn wanders by at most the shift and the turn, and is never lost."""
    dot = np.zeros((32, 32), np.uint8)
    dot[14:18, 14:18] = 255
    places = []
    for index in range(200):
        change = np.abs(scene(dot, index).astype(int) - scene(BLACK, index).astype(int))
        rows, columns = np.nonzero(change > 25)
        assert len(rows)
        places.append((rows.mean() - 15.5, columns.mean() - 15.5))
    far = np.abs(places).max(axis=0)

    # 0.175 of 16 pixels over the smallest scale of 0.85 is 3.3; turning adds up to a third of it.
    assert ((far > 2) & (far < 4.5)).all()
