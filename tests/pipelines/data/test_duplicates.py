import io
import random
import time
from collections.abc import Sequence
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipelines.data.decoding import open_picture
from pipelines.data.duplicates import (
    NEAR,
    Print,
    Prints,
    near_across_parts,
    near_pictures,
    perceptual_hash,
    read_pictures,
    refuse_unreadable,
    same_pictures,
)
from pipelines.data.source_files import PARTS, Found
from pipelines.project.errors import InputError
from tests.support.case_files import encoded
from tests.support.fuzzing import assert_line


def scene(seed: int, size: int = 160) -> Image.Image:
    """A smooth picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def bits_between(one: Image.Image, other: Image.Image) -> int:
    return (int(perceptual_hash(one), 16) ^ int(perceptual_hash(other), 16)).bit_count()


def some(number: int, *, part: str = "train", label: int = 0, seed: int = 0) -> list[Print]:
    """Prints of pictures that have nothing to do with each other."""
    generator = random.Random(f"{seed} {part} {label}")
    return [
        Print(f"{part}/{label}/{i}", part, label, f"{part} {label} {i}", f"{generator.getrandbits(256):064x}")
        for i in range(number)
    ]


def columns(prints: Sequence[Print]) -> Prints:
    """The same in columns."""
    labels = [picture.label for picture in prints]
    parts = [PARTS.index(picture.part) for picture in prints]
    texts = ([picture.pixels for picture in prints], [picture.perceptual for picture in prints])
    hashes = (np.array([text.encode() for text in column], "S64") for column in texts)
    return Prints(
        lambda place: prints[place].shown, np.array(parts, np.uint8), np.array(labels, object), *hashes
    )


def all_pairs(left: Sequence[Print], right: Sequence[Print]) -> list[tuple[Print, Print]]:
    """What `near_pictures` returns, by comparing all with all."""

    def near(one: Print, other: Print) -> bool:
        hashes = one.perceptual, other.perceptual
        if not all(hashes) or one.pixels == other.pixels:
            return False
        return (int(hashes[0], 16) ^ int(hashes[1], 16)).bit_count() <= NEAR

    pairs = ((one, next((other for other in right if near(one, other)), None)) for one in left)
    return [(one, other) for one, other in pairs if other is not None]


def turned(picture: Print, bits: int, *, part: str, seed: int = 0) -> Print:
    """The print of a picture whose hash differs in so many bits."""
    value = int(picture.perceptual, 16)
    for bit in random.Random(seed).sample(range(256), bits):
        value ^= 1 << bit
    return Print(f"near {picture.shown}", part, picture.label, f"near {picture.pixels}", f"{value:064x}")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda picture: jpeg(picture, 40), id="jpeg"),
        pytest.param(lambda picture: picture.resize((60, 60)), id="smaller"),
        pytest.param(lambda picture: picture.resize((400, 400)), id="larger"),
        pytest.param(lambda picture: picture.convert("L"), id="grey"),
        pytest.param(lambda picture: ImageEnhance.Brightness(picture).enhance(1.1), id="brighter"),
    ],
)
def test_a_picture_saved_in_another_way_is_near_and_another_picture_is_not(change: object) -> None:
    for seed in range(10):
        assert bits_between(scene(seed), change(scene(seed))) <= NEAR  # type: ignore[operator]
        assert bits_between(scene(seed), scene(seed + 1)) > 3 * NEAR


def test_the_hash_is_that_of_imagehash() -> None:
    """Whose text is what the samples of every chain hold."""
    for seed in range(20):
        small = scene(seed).resize((64, 64), Image.Resampling.LANCZOS, reducing_gap=3.0).convert("L")
        assert perceptual_hash(scene(seed)) == str(imagehash.phash(small, hash_size=16))


def test_what_is_transparent_counts_as_white() -> None:
    hidden, white = scene(1).convert("RGBA"), scene(1)
    hidden.paste((0, 0, 0, 0), (0, 0, 80, 160))
    white.paste("white", (0, 0, 80, 160))

    assert bits_between(open_picture(encoded(hidden)), white) <= NEAR


def test_a_picture_without_structure_is_near_nothing() -> None:
    flat = [Print(str(i), "train", 0, str(i), perceptual_hash(Image.new("L", (9, 9), i))) for i in (10, 200)]

    assert [one.perceptual for one in flat] == ["", ""]
    assert near_pictures(columns(flat), columns(flat)) == []


@pytest.mark.parametrize("bits", [0, 1, NEAR, NEAR + 1, 40])
def test_near_pictures_are_those_within_the_bits_and_none_is_missed(bits: int) -> None:
    """In whatever bits they differ, one chunk is left in which they do not."""
    known = some(500)
    asked = [turned(picture, bits, part="test", seed=i) for i, picture in enumerate(known)]

    found = near_pictures(columns(asked), columns(known))

    assert found == (list(zip(asked, known, strict=True)) if bits <= NEAR else [])


def test_the_same_picture_is_not_a_near_one() -> None:
    picture = some(1)[0]

    assert near_pictures(columns([picture._replace(part="test")]), columns([picture])) == []


def test_near_pictures_are_those_that_comparing_all_pairs_finds() -> None:
    """Also among pictures that crowd together, with copies, flat ones, and others that share most of their bits."""
    generator = random.Random(5)
    base = some(3)
    crowd = [
        turned(generator.choice(base), generator.randint(0, 24), part="train", seed=i) for i in range(400)
    ]
    crowd = [picture._replace(shown=f"{i}", pixels=f"{i % 350}") for i, picture in enumerate(crowd)]
    crowd += [picture._replace(shown=f"copy {picture.shown}") for picture in crowd[:30]]
    crowd += [picture._replace(perceptual="") for picture in crowd[:5]]
    generator.shuffle(crowd)
    left, right = crowd[:150], crowd[150:]

    found = near_pictures(columns(left), columns(right))

    assert found == all_pairs(left, right)
    assert 20 < len(found) < 140


def test_near_pictures_across_parts_are_found_among_new_and_earlier_ones_each_pair_once() -> None:
    old_train, old_test = some(1), some(1, part="test")
    new_train, new_held = some(1, label=1), some(1, part="validation", label=1)
    new = [
        *new_train,
        *new_held,
        turned(new_train[0], 3, part="validation"),
        turned(old_train[0], 3, part="test"),
        turned(old_test[0], 3, part="train"),
        turned(new_train[0], 3, part="train"),  # on the same side: no leak
    ]

    found = near_across_parts(columns(new), Prints.joined([columns(old_train), columns(old_test)]))

    assert {(one.shown, other.shown) for one, other in found} == {
        ("near train/1/0", "train/1/0"),
        ("near train/0/0", "train/0/0"),
        ("near test/0/0", "test/0/0"),
    }


def test_many_pictures_are_compared_without_comparing_all_pairs() -> None:
    started = time.process_time()
    assert near_pictures(columns(some(5000, part="test")), columns(some(20000))) == []
    frames = [turned(some(1)[0], 4, part="test", seed=i) for i in range(2000)]
    stills = [turned(some(1)[0], 4, part="train", seed=-i - 1)._replace(pixels=str(i)) for i in range(2000)]
    assert len(near_pictures(columns(frames), columns(stills))) == 2000
    assert time.process_time() - started < 10  # all pairs: a minute


def test_many_copies_of_one_picture_cost_no_more_than_others() -> None:
    copies = [Print(str(i), "train", 0, "same", "") for i in range(20000)]
    started = time.process_time()

    assert list(same_pictures(columns(copies), columns(copies), tolerated=True)) == []
    assert time.process_time() - started < 5


def test_a_picture_that_an_earlier_task_has_of_the_class_is_refused_unless_tolerated() -> None:
    earlier = some(1)[0]
    again = [earlier._replace(shown="x"), earlier._replace(shown="y")]

    assert [str(fault) for fault in same_pictures(columns(again), columns([earlier]), tolerated=False)] == [
        f"{name}: the same picture as train/0/0; remove one, or set data.duplicates: allow or keep_first in params.yaml"
        for name in "xy"
    ]
    assert not list(same_pictures(columns(again), columns([earlier]), tolerated=True))
    assert not list(same_pictures(columns(again), columns([]), tolerated=False))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_picture_in_two_parts_is_named_with_both(part: str) -> None:
    train = some(1)[0]

    (fault,) = same_pictures(
        columns([train._replace(part=part, shown="x")]), columns([train]), tolerated=True
    )

    assert str(fault) == f"x: the same picture as train/0/0, in train and {part}; remove one"


def test_a_picture_of_validation_is_no_picture_of_test() -> None:
    """What was selected on a test picture would be tested on what it was selected for."""
    test = some(1, part="test")[0]

    (fault,) = same_pictures(
        columns([test._replace(part="validation", shown="x")]), columns([test]), tolerated=True
    )

    assert "in validation and test" in str(fault)


def test_all_that_cannot_be_read_are_in_a_file_and_a_mended_task_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [Found(Path(f"{i}.png"), "train", "a", f"{i}.png") for i in range(6)]
    for i in (1, 2, 3, 4):
        Path(f"{i}.png").write_bytes(b"x")
    scene(0).save("5.png")
    looked: list[int] = []

    faults = read_pictures(
        "read", images, lambda index, data, picture: looked.append(index), max_pixels=10**6
    )
    with pytest.raises(InputError) as caught:
        refuse_unreadable("t01", images, faults)

    assert looked == [5]
    report = Path(".sdlora/unreadable/t01.txt")
    assert report.read_text().splitlines() == [
        "0.png (No such file or directory)",
        *(f"{i}.png (it is no image that Pillow knows)" for i in (1, 2, 3, 4)),
    ]
    assert "3 more" not in str(caught.value)
    assert "and 2 more, all of them in .sdlora/unreadable/t01.txt; replace or remove" in str(caught.value)
    refuse_unreadable("t01", images, {})
    assert not report.exists()


def test_a_line_about_unreadable_images_names_as_many_as_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [Found(Path("x" * 120, f"{i}\u202f.png"), "train", "a", f"{i}.png") for i in range(3)]

    with pytest.raises(InputError) as caught:
        refuse_unreadable("t01", images, dict.fromkeys(range(3), "it is a pipe, not a file"))

    assert_line(str(caught.value))
    assert " and 2 more, all of them in .sdlora/unreadable/t01.txt" in str(caught.value)
    assert len(Path(".sdlora/unreadable/t01.txt").read_text().splitlines()) == 3
