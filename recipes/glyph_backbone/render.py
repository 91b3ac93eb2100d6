"""Render the characters of all installed fonts, digits excluded, for pre-training and for glyphs100."""

import argparse
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fontTools import unicodedata as font_unicode
from fontTools.ttLib import TTCollection, TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

SIDE = 32
BOX = 26
POINTS = 64
CANVAS = 3 * POINTS

MIN_FONTS = 40
FILES_PER_FAMILY = 8
UNSEEN_SHARE = 0.05

SAME_PIXELS = 0.97
SAME_SHAPE = 0.4
ALIKE_SHAPE = 0.12
SAME_MEAN = 0.985
ALIKE_MEAN = 0.95
ALIASED_FAMILY = 0.2
READABLE = 0.15

CLASSES = 100
TRAIN_IMAGES = 60
TEST_IMAGES = 20
TRAIN, TEST, PRETRAIN, UNSEEN = "train", "test", "pretrain", "unseen"

STYLE_WORDS = re.compile(
    r"\b(thin|hairline|extra|ultra|semi|demi|light|book|regular|roman|normal|medium|bold|heavy|black|fat|"
    r"italic|italics|oblique|slanted|upright|cond|condensed|semicondensed|extracondensed|compressed|narrow|"
    r"extended|expanded|wide|outline|shadow|display|caption|text|ui|bd|it|sc|caps|smallcaps|small|oldstyle|"
    r"pro|std|otf|ttf|web|hinted|unhinted|variable|vf|nf|lgc|compact|literacy|mono|monospace|\d+(pt)?)\b"
)
MIN_TRAIN_FAMILIES = 12
MIN_TEST_FAMILIES = 5
# Chosen by eye from contact sheets, and not complete (see the data card): what passes for a digit.
DIGIT_LIKE = frozenset(
    "OoQDCcSsZzlIiTJjbBqgGEeYyΛVßØøƏəƃƂ\u0184ƅɖʐɥ"
    "ƷƸʒɛɜɝɞɋʡʢΟοΙιΘθΣσδβΒϞϛζξΕε"
    "ЗЭэОоІіЇїБбЪъЬьЧчҶҷӋӌҌҍҘҙӠӡѢѣԐԑЄєСвВћЋѲѳ"
    "ՕօՏտՅյՑց"
    "עוןוזסדרךףפטם"
    "اهةوۋؤعى"
    "ๅาไใเโแว๐ล"
    "ᴠᴧᴓᴄᴏᴛ"
)


@dataclass(frozen=True, order=True)
class Face:
    """One face of one font file, with the characters that it maps."""

    path: str
    index: int
    family: str
    characters: frozenset[str]


@dataclass(frozen=True)
class Glyphs:
    """Rendered images with, for each, its character and the face and family that drew it."""

    images: NDArray[np.uint8]
    characters: NDArray[np.str_]
    faces: NDArray[np.int32]
    families: NDArray[np.str_]

    def select(self, keep: NDArray[Any]) -> "Glyphs":
        """Return the images that a mask or an index array keeps."""
        return Glyphs(self.images[keep], self.characters[keep], self.faces[keep], self.families[keep])


def is_digit(character: str) -> bool:
    """Tell whether a character is, or decomposes into, a number of any script."""
    forms = character + unicodedata.normalize("NFKC", character) + unicodedata.normalize("NFKD", character)
    return any(unicodedata.category(form) in {"Nd", "Nl", "No"} for form in forms)


def is_drawable(character: str) -> bool:
    """Tell whether a character is a letter, a symbol with a shape, or a decimal digit to compare with."""
    category = unicodedata.category(character)
    if category == "Nd":
        return unicodedata.normalize("NFKC", character) == character
    if category[0] not in "LSP" or is_digit(character):
        return False
    # Compatibility forms repeat another character's shape; ideographs and syllables would swamp the alphabet.
    if unicodedata.normalize("NFKC", character) != character:
        return False
    return font_unicode.script(character) not in {
        "Hani",
        "Hang",
        "Hira",
        "Kana",
        "Yiii",
        "Brai",
        "Tang",
        "Nshu",
    }


def name_family(font: TTFont) -> str:
    """Reduce a font's family name to the part that all its weights, widths and slopes share."""
    names = font["name"]
    raw = names.getDebugName(16) or names.getDebugName(1) or ""
    words = re.sub(r"[^a-z0-9]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", raw).lower())
    return "".join(STYLE_WORDS.sub(" ", words).split()) or "".join(words.split())


def read_faces(path: str) -> list[Face]:
    """List the faces of a font file; a file that fontTools cannot read has none."""
    faces = []
    try:
        count = len(TTCollection(path, lazy=True).fonts) if path.endswith(".ttc") else 1
        for index in range(count):
            with TTFont(path, fontNumber=index, lazy=True) as font:
                cmap = font.getBestCmap() or {}
                found = frozenset(
                    chr(code) for code, name in cmap.items() if name != ".notdef" and is_drawable(chr(code))
                )
                faces.append(Face(path, index, name_family(font), found))
    except Exception:
        # fontTools raises whatever a broken table provokes.
        return faces
    return [face for face in faces if face.family and face.characters]


def draw_character(font: ImageFont.FreeTypeFont, character: str) -> NDArray[np.uint8] | None:
    """Draw one character white on black, centred and scaled to fill the box; None where there is no ink."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text((POINTS, 2 * POINTS), character, fill=255, font=font, anchor="ls")
    bounds = canvas.getbbox()
    if bounds is None or bounds[0] == 0 or bounds[1] == 0 or bounds[2] == CANVAS or bounds[3] == CANVAS:
        return None
    width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    if max(width, height) < 6:
        return None
    scale = BOX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.new("L", (SIDE, SIDE))
    ink = canvas.crop(bounds).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    image.paste(ink, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    pixels = np.asarray(image)
    peak = int(pixels.max())
    if peak < 64:
        return None
    return (pixels.astype(np.uint16) * 255 // peak).astype(np.uint8)


def render_face(face: Face) -> tuple[str, NDArray[np.uint8]]:
    """Draw the characters of one face, without placeholders: the characters and their images, in order."""
    nothing = "", np.zeros((0, SIDE, SIDE), np.uint8)
    try:
        font = ImageFont.truetype(face.path, POINTS, index=face.index, layout_engine=ImageFont.Layout.BASIC)
        drawn = {character: draw_character(font, character) for character in sorted(face.characters)}
        # Code points that no font maps are drawn with the face's placeholder.
        placeholder = draw_character(font, "\U0010fffe")
    except (OSError, ValueError):
        return nothing
    found = {character: image for character, image in drawn.items() if image is not None}
    copies = Counter(image.tobytes() for image in found.values())
    if placeholder is not None:
        copies[placeholder.tobytes()] = len(found) + 8
    kept = {character: image for character, image in found.items() if copies[image.tobytes()] < 8}
    return ("".join(kept), np.stack(list(kept.values()))) if kept else nothing


def map_parallel(function: Callable[[Any], Any], items: list[Any], label: str) -> list[Any]:
    """Map a function over items in parallel, in order, with a progress bar."""
    with Pool() as pool:
        results = pool.imap(function, items, chunksize=8)
        return list(track(results, label, total=len(items)))


def choose_faces(faces: list[Face], rng: np.random.Generator) -> list[Face]:
    """Keep a limited number of faces per family, and the characters that enough of them have."""
    families: dict[str, list[Face]] = defaultdict(list)
    for face in sorted(faces, key=lambda face: (face.path, face.index)):
        families[face.family].append(face)
    chosen: list[Face] = []
    for family in sorted(families):
        members = families[family]
        if len(members) > FILES_PER_FAMILY:
            members = [members[i] for i in sorted(rng.choice(len(members), FILES_PER_FAMILY, replace=False))]
        chosen += members
    fonts = Counter(character for face in chosen for character in face.characters)
    common = {character for character, number in fonts.items() if number >= MIN_FONTS or is_digit(character)}
    return [
        Face(face.path, face.index, face.family, face.characters & common)
        for face in chosen
        if face.characters & common
    ]


def render_faces(faces: list[Face]) -> Glyphs:
    """Draw all faces."""
    results = map_parallel(render_face, faces, "rendering fonts")
    numbers = [len(characters) for characters, _ in results]
    return Glyphs(
        np.concatenate([images for _, images in results]),
        np.array([character for characters, _ in results for character in characters]),
        np.repeat(np.arange(len(faces), dtype=np.int32), numbers),
        np.repeat(np.array([face.family for face in faces]), numbers),
    )


def sketch(images: NDArray[Any]) -> NDArray[np.float32]:
    """Reduce images to unit vectors of a blurred 16x16 picture, whose products measure likeness."""
    wide = images.astype(np.float32)
    rows = wide[:, ::2] + wide[:, 1::2]
    padded = np.pad(rows[:, :, ::2] + rows[:, :, 1::2], ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]).reshape(len(images), -1)
    return blurred / np.maximum(np.linalg.norm(blurred, axis=1, keepdims=True), 1e-6)


def average_shapes(glyphs: Glyphs, names: list[str]) -> NDArray[np.float32]:
    """Average each character's sketches over all faces."""
    index = {name: i for i, name in enumerate(names)}
    codes = np.array([index[character] for character in glyphs.characters])
    means = np.zeros((len(names), 256), np.float32)
    order = codes.argsort(kind="stable")
    for code, where in enumerate(np.split(order, np.searchsorted(codes[order], np.arange(1, len(names))))):
        means[code] = sketch(glyphs.images[where]).sum(0)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def drop_unreadable(glyphs: Glyphs) -> Glyphs:
    """Drop faces whose glyphs do not resemble their characters, such as pictures in the place of letters."""
    names = sorted(set(glyphs.characters))
    means = average_shapes(glyphs, names)
    index = {name: i for i, name in enumerate(names)}
    keep = np.zeros(len(glyphs.images), bool)
    for face in track(np.unique(glyphs.faces), "reading fonts"):
        where = np.flatnonzero(glyphs.faces == face)
        truth = [index[character] for character in glyphs.characters[where]]
        likeness = sketch(glyphs.images[where]) @ means.T
        own = likeness[np.arange(len(truth)), truth]
        rank = (likeness > own[:, None]).sum(1)
        keep[where] = np.mean(rank < 10) >= READABLE
    return glyphs.select(keep)


def compare_shapes(glyphs: Glyphs) -> tuple[list[str], NDArray[np.float32]]:
    """Measure how often two characters look the same within one face, over one face of every family.

    Returns the characters and a symmetric matrix of shares between 0 and 1. Pairs that fewer than five
    families draw count as the same when their average shapes agree, and pairs with similar averages as alike.
    """
    names = sorted(set(glyphs.characters))
    index = {name: i for i, name in enumerate(names)}
    same = np.zeros((len(names), len(names)), np.float32)
    both = np.zeros_like(same)
    sizes = Counter(glyphs.faces.tolist())
    largest: dict[str, int] = {}
    for family, face in sorted(set(zip(glyphs.families.tolist(), glyphs.faces.tolist(), strict=True))):
        if family not in largest or sizes[face] > sizes[largest[family]]:
            largest[family] = face
    for face in track(sorted(largest.values()), "comparing characters"):
        where = np.flatnonzero(glyphs.faces == face)
        codes = np.array([index[character] for character in glyphs.characters[where]])
        vectors = sketch(glyphs.images[where])
        cells = np.ix_(codes, codes)
        same[cells] += vectors @ vectors.T > SAME_PIXELS
        both[cells] += 1
    share = np.where(both >= 5, same / np.maximum(both, 1), 0)
    means = average_shapes(glyphs, names)
    likeness = means @ means.T
    share[(likeness > SAME_MEAN) & (both < 5)] = 1
    share[likeness > ALIKE_MEAN] = np.maximum(share[likeness > ALIKE_MEAN], ALIKE_SHAPE)
    np.fill_diagonal(share, 1)
    return names, share


def join(pairs: Iterable[tuple[str, str]], items: Iterable[str]) -> dict[str, str]:
    """Group items that pairs connect: each item maps to the smallest item of its group."""
    parent = {item: item for item in items}

    def find(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for left, right in pairs:
        low, high = sorted((find(left), find(right)))
        parent[high] = low
    return {item: find(item) for item in parent}


def hash_images(images: NDArray[np.uint8]) -> NDArray[np.void]:
    """Hash every image to 16 bytes."""
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
    return np.frombuffer(digests, "V16")


def join_families(glyphs: Glyphs, hashes: NDArray[np.void]) -> dict[str, str]:
    """Group families that share so many identical letters that they are one design under two names."""
    owners: dict[bytes, set[str]] = defaultdict(set)
    for digest, family in zip(hashes.tolist(), glyphs.families.tolist(), strict=True):
        owners[digest].add(family)
    totals: Counter[str] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    for group in owners.values():
        members = sorted(group)
        totals.update(members)
        # Bars and rings are identical in very many families and say nothing about kinship.
        if len(members) <= 12:
            shared.update((a, b) for i, a in enumerate(members) for b in members[i + 1 :])
    pairs = [
        pair
        for pair, number in sorted(shared.items())
        if number >= ALIASED_FAMILY * min(totals[pair[0]], totals[pair[1]])
    ]
    return join(pairs, sorted(set(glyphs.families.tolist())))


def split_families(glyphs: Glyphs, rng: np.random.Generator) -> dict[str, str]:
    """Deal the families out to the benchmark's test and train, pre-training and its unseen fonts.

    Scripts with few families are served first, so that each script has families in every set.
    """
    scripts = {character: font_unicode.script(character) for character in set(glyphs.characters.tolist())}
    faces: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    rows = zip(glyphs.characters.tolist(), glyphs.families.tolist(), glyphs.faces.tolist(), strict=True)
    for character, family, face in rows:
        faces[scripts[character]][family].add(face)
    splits: dict[str, str] = {}
    for script in sorted(faces, key=lambda script: (len(faces[script]), script)):
        families = sorted(faces[script])
        numbers = {family: len(faces[script][family]) for family in families}
        total = sum(numbers.values())
        quotas = {TEST: min(2.4 * TEST_IMAGES, 0.2 * total), TRAIN: min(1.6 * TRAIN_IMAGES, 0.55 * total)}
        free = [family for family in rng.permutation(families).tolist() if family not in splits]
        for split, quota in quotas.items():
            have = sum(numbers[family] for family in families if splits.get(family) == split)
            while free and have < quota:
                family = free.pop()
                splits[family] = split
                have += numbers[family]
        for family in free:
            splits[family] = UNSEEN if rng.random() < UNSEEN_SHARE else PRETRAIN
    return splits


def find_supplied(glyphs: Glyphs, splits: NDArray[np.str_]) -> set[str]:
    """Find the unmarked letters that enough families draw in both sets of the benchmark."""
    counts = {split: Counter(glyphs.characters[splits == split].tolist()) for split in (TRAIN, TEST)}
    rows = zip(glyphs.characters.tolist(), glyphs.families.tolist(), splits.tolist(), strict=True)
    families = Counter((character, split) for character, _, split in set(rows))
    return {
        name
        for name in counts[TEST]
        if unicodedata.category(name) in {"Lu", "Ll", "Lo"}
        and unicodedata.normalize("NFD", name) == name
        and counts[TRAIN][name] >= TRAIN_IMAGES
        and counts[TEST][name] >= TEST_IMAGES
        and families[name, TRAIN] >= MIN_TRAIN_FAMILIES
        and families[name, TEST] >= MIN_TEST_FAMILIES
    }


def choose_characters(
    supplied: set[str], names: list[str], share: NDArray[np.float32], rng: np.random.Generator
) -> list[str]:
    """Choose the benchmark's characters, in turn from each script, no two alike and none like a digit."""
    like_digit = share[:, [is_digit(name) for name in names]].max(1) >= ALIKE_SHAPE
    eligible: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if name in supplied and not like_digit[i] and name not in DIGIT_LIKE:
            eligible[font_unicode.script(name)].append(i)
    queues = {script: rng.permutation(eligible[script]).tolist() for script in sorted(eligible)}
    chosen: list[int] = []
    while len(chosen) < CLASSES:
        if not any(queues.values()):
            raise ValueError(
                f"only {len(chosen)} characters of {CLASSES} have enough fonts: install more fonts"
            )
        for queue in queues.values():
            while queue and len(chosen) < CLASSES:
                candidate = queue.pop()
                if not chosen or share[candidate, chosen].max() < ALIKE_SHAPE:
                    chosen.append(candidate)
                    break
    return sorted(names[i] for i in chosen)


def pick_images(glyphs: Glyphs, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Pick images in turn from the families, so that none dominates."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i in rng.permutation(len(glyphs.images)).tolist():
        queues[str(glyphs.families[i])].append(i)
    order = rng.permutation(sorted(queues)).tolist()
    picked: list[int] = []
    while len(picked) < number:
        for family in order:
            if queues[family] and len(picked) < number:
                picked.append(queues[family].pop())
    return np.array(sorted(picked))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey image as the smallest PNG that Pillow writes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_benchmark(path: Path, rows: list[dict[str, Any]], characters: list[str]) -> None:
    """Write the benchmark as an Arrow file with its title, licence and class names in the schema."""
    classes = {name_label(c): {"character": c, "name": unicodedata.name(c)} for c in characters}
    schema = pa.schema(
        [("image", pa.binary()), ("split", pa.string()), ("label", pa.string()), ("font", pa.string())],
        metadata={
            "title": "glyphs100: 100 characters of several scripts, drawn by open fonts",
            "licence": "Images drawn from fonts under free licences (SIL OFL, GPL with font exception, "
            "Apache-2.0, public domain and similar); see glyphs100.md",
            "classes": json.dumps(classes, sort_keys=True),
        },
    )
    rows.sort(key=lambda row: (row["split"], row["label"], row["font"], row["image"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=len(rows))


def name_label(character: str) -> str:
    """Name a character's class folder."""
    return f"u{ord(character):04x}"


def draw_sheet(rows: list[NDArray[np.uint8]], path: Path) -> None:
    """Draw rows of images as one picture, to look at."""
    width = max(len(row) for row in rows)
    padded = [np.concatenate([row, np.zeros((width - len(row), SIDE, SIDE), np.uint8)]) for row in rows]
    grid = np.stack(padded).transpose(0, 2, 1, 3).reshape(len(rows) * SIDE, width * SIDE)
    Image.fromarray(grid).save(path)


def join_shapes(names: list[str], share: NDArray[np.float32]) -> dict[str, str]:
    """Map each character to the smallest character that has its shape."""
    left, right = np.nonzero(np.triu(share >= SAME_SHAPE, 1))
    return join(((names[i], names[j]) for i, j in zip(left, right, strict=True)), names)


def group_shapes(names: list[str], share: NDArray[np.float32], characters: list[str]) -> dict[str, str]:
    """Map each character of the pre-training set to the character that stands for its shape.

    Left out are digits, what looks like one, the benchmark's characters, what looks like one of them, and
    letters that are one of these with a mark.
    """
    index = {name: i for i, name in enumerate(names)}
    digits = [i for i, name in enumerate(names) if is_digit(name)]
    banned = (share[:, digits] >= ALIKE_SHAPE).any(1)
    banned |= (share[:, [index[character] for character in characters]] >= ALIKE_SHAPE).any(1)
    taken = {name for name, is_banned in zip(names, banned, strict=True) if is_banned}
    free = [name for name in names if not taken & {name, unicodedata.normalize("NFD", name)[0]}]
    numbers = [index[name] for name in free]
    return join_shapes(free, share[np.ix_(numbers, numbers)])


def keep_first(hashes: NDArray[np.void], labels: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return the first of each set of identical images, and none of those that occur under two labels."""
    seen: dict[bytes, str] = {}
    torn: set[bytes] = set()
    first: dict[bytes, int] = {}
    for i, (digest, label) in enumerate(zip(hashes.tolist(), labels.tolist(), strict=True)):
        if seen.setdefault(digest, label) != label:
            torn.add(digest)
        first.setdefault(digest, i)
    return np.array([i for digest, i in first.items() if digest not in torn])


def render(fonts: Path, out: Path, benchmark: Path, seed: int) -> None:
    """Render everything, choose the benchmark, and write both sets of images."""
    rng = np.random.default_rng(seed)
    paths = sorted(str(path) for path in fonts.rglob("*") if path.suffix.lower() in {".ttf", ".otf", ".ttc"})
    found = [face for faces in map_parallel(read_faces, paths, "reading font files") for face in faces]
    faces = choose_faces(found, rng)
    glyphs = drop_unreadable(render_faces(faces))
    names, share = compare_shapes(glyphs)
    hashes = hash_images(glyphs.images)
    groups = join_families(glyphs, hashes)
    grouped = np.array([groups[family] for family in glyphs.families.tolist()])
    by_group = Glyphs(glyphs.images, glyphs.characters, glyphs.faces, grouped)
    dealt = split_families(by_group, rng)
    splits = np.array([dealt[group] for group in grouped.tolist()])

    # An image that two sets or two shapes share belongs to neither.
    alike = join_shapes(names, share)
    drawn = np.array([alike[character] for character in glyphs.characters.tolist()])
    own = keep_first(hashes, np.char.add(np.char.add(splits, " "), drawn))
    supplied = find_supplied(by_group.select(own), splits[own])
    characters = choose_characters(supplied, names, share, rng)
    shapes = group_shapes(names, share, characters)
    out.mkdir(parents=True, exist_ok=True)
    rows, sheet = [], []
    for character in characters:
        strip = []
        for split, number in ((TRAIN, TRAIN_IMAGES), (TEST, TEST_IMAGES)):
            where = own[(splits[own] == split) & (glyphs.characters[own] == character)]
            picked = where[pick_images(by_group.select(where), number, rng)]
            strip.append(glyphs.images[picked[: number // 5]])
            rows += [
                {
                    "image": encode_png(glyphs.images[i]),
                    "split": split,
                    "label": name_label(character),
                    "font": str(glyphs.families[i]),
                }
                for i in picked
            ]
        sheet.append(np.concatenate(strip))
    write_benchmark(benchmark, rows, characters)
    draw_sheet(sheet, out / "glyphs100.png")

    usable = np.isin(splits, [PRETRAIN, UNSEEN]) & np.isin(glyphs.characters, list(shapes))
    where = np.flatnonzero(usable)
    labels = np.array([shapes[character] for character in glyphs.characters[where].tolist()])
    # Copies of benchmark images under other characters would slip through the split by families alone.
    reserved = np.isin(hashes[where], hashes[~usable])
    where, labels = where[~reserved], labels[~reserved]
    first = keep_first(hashes[where], np.char.add(np.char.add(splits[where], " "), labels))
    where, labels = where[first], labels[first]
    counts = Counter(labels[splits[where] == PRETRAIN].tolist())
    common = np.isin(labels, [label for label, number in counts.items() if number >= MIN_FONTS // 2])
    where, labels = where[common], labels[common]
    classes = sorted(set(labels.tolist()))
    index = {name: i for i, name in enumerate(classes)}
    np.save(out / "images.npy", glyphs.images[where])
    np.save(out / "labels.npy", np.array([index[label] for label in labels.tolist()], np.int64))
    np.save(out / "unseen.npy", splits[where] == UNSEEN)
    members: dict[str, list[str]] = defaultdict(list)
    for character, shape in shapes.items():
        members[shape].append(character)
    summary = {
        "benchmark": "".join(characters),
        "benchmark_images": len(rows),
        "benchmark_scripts": dict(sorted(Counter(font_unicode.script(c) for c in characters).items())),
        "classes": [name_label(name) for name in classes],
        "faces": len(set(glyphs.faces.tolist())),
        "faces_found": len(found),
        "families": dict(sorted(Counter(dealt.values()).items())),
        "images": {s: int((splits[where] == s).sum()) for s in (PRETRAIN, UNSEEN)},
        "rendered": len(glyphs.images),
        "seed": seed,
        "shapes": {name_label(name): "".join(sorted(members[name])) for name in classes},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    short = {key: value for key, value in summary.items() if key not in {"classes", "shapes"}}
    print(json.dumps(short, ensure_ascii=False))


def main() -> None:
    """Read the command line and render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of the fonts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pre-training images")
    parser.add_argument(
        "--benchmark",
        type=Path,
        default=Path("pipelines/data/embedded/glyphs100/glyphs100.arrow"),
        help="file for the benchmark",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    arguments = parser.parse_args()
    render(arguments.fonts, arguments.out, arguments.benchmark, arguments.seed)


if __name__ == "__main__":
    main()
