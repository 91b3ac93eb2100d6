"""From a picture to what the backbone expects: the one place that knows the geometry, which is timm's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""timm's names of interpolations → Pillow's `Image.Resampling`."""
_CROP_MODES = ("center", "squash", "border")
_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Its values → Pillow's `Image.Transpose`; 1 is upright."""


class _Picture(Protocol):
    """What is used of a `PIL.Image.Image`: this library handles pictures, but opens no files."""

    @property
    def mode(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def has_transparency_data(self) -> bool: ...
    def getexif(self) -> Any: ...  # noqa: ANN401 - a mapping, as below numbers of Pillow's enumerations and colours
    def transpose(self, method: Any) -> Self: ...  # noqa: ANN401
    def copy(self) -> Self: ...
    def convert(self, mode: str) -> Self: ...
    def resize(self, size: tuple[int, int], resample: int) -> Self: ...
    def crop(self, box: tuple[int, int, int, int]) -> Self: ...
    def paste(self, im: Any, box: Any = None) -> None: ...  # noqa: ANN401
    def alpha_composite(self, im: Any) -> None: ...  # noqa: ANN401


P = TypeVar("P", bound=_Picture)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a backbone wants its pictures. Called with an upright or turned picture, its whole eval transform.

    The geometry agrees to the pixel with `timm.data.create_transform(…, is_training=False)`, because servers
    use that one. Two things come before it: a transparent picture is put on white (timm drops the transparency,
    and shows hidden colours), and 1 channel is grey, 3 are RGB.
    """

    input_size: tuple[int, int, int]
    """(channels, height, width)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    """Share of the scaled picture that is cut out."""
    crop_mode: str
    """`center`: the shorter side is scaled; `squash`: both sides are; `border`: the longer side is, and the rest
    is filled with the mean colour."""

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Self:
        """Return the preprocessing of a backbone, from its description (backbone.json).

        Raises:
            ValueError: the backbone wants pictures of a kind that is not known here.
        """
        config = description["pretrained_cfg"]
        channels, height, width = config["input_size"]
        if channels not in (1, 3):
            raise ValueError(
                f"backbone: it takes images of {channels} channels; choose one that takes 1 or 3"
            )
        for key, known in (("interpolation", RESAMPLING), ("crop_mode", _CROP_MODES)):
            if config[key] not in known:
                raise ValueError(f"backbone: its {key} is {config[key]!r}; known are {', '.join(known)}")
        return cls(
            input_size=(channels, height, width),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    def pixels(self, picture: _Picture) -> np.ndarray:
        """uint8 (channels, height, width) of an upright picture of 8 bits."""
        channels, height, width = self.input_size
        mode = "L" if channels == 1 else "RGB"
        flat = on_white(picture)
        fitted = self._cut(self._scale(flat if flat.mode == mode else flat.convert(mode)))
        return np.asarray(fitted).reshape(height, width, channels).transpose(2, 0, 1)

    def __call__(self, picture: _Picture) -> Tensor:
        """Return the normalised picture, float32 (channels, height, width): turned upright, on white, scaled, cut.

        Raises:
            ValueError: the picture has more than 8 bits a channel, without a range that is known.
        """
        if picture.mode[:1] in ("I", "F"):
            raise ValueError(
                f"a picture of mode {picture.mode} has no known range; convert it to 8 bits first"
            )
        pixels = torch.from_numpy(self.pixels(upright(picture)).copy())
        return normalise(pixels[None], mean=self.mean, std=self.std)[0]

    def _scale(self, picture: _Picture) -> _Picture:
        _, *target = self.input_size
        # Rounded down, as timm does.
        height, width = (math.floor(side / self.crop_pct) for side in target)
        found = picture.height, picture.width
        if self.crop_mode == "squash":
            scaled = height, width
        elif self.crop_mode == "center" and height == width:
            # torchvision cuts the fraction of the longer side off.
            short, long = min(found), max(found)
            longer = int(height * long / short)
            scaled = (height, longer) if found[0] <= found[1] else (longer, height)
        else:
            choose = max if self.crop_mode == "border" else min
            ratio = choose(found[0] / height, found[1] / width)
            scaled = max(1, round(found[0] / ratio)), max(1, round(found[1] / ratio))
        if scaled == found:
            return picture
        return picture.resize((scaled[1], scaled[0]), RESAMPLING[self.interpolation])

    def _cut(self, picture: _Picture) -> _Picture:
        """Return the centre of the target's size. What lies outside of the picture is black, or the mean in mode
        `border`.
        """
        _, height, width = self.input_size
        if picture.height == height and picture.width == width:
            return picture
        top, left = _offset(picture.height, height), _offset(picture.width, width)
        cut = picture.crop((left, top, left + width, top + height))
        if self.crop_mode == "border" and (picture.height < height or picture.width < width):
            fill = tuple(round(255 * value) for value in self.mean)
            right, bottom = min(left + width, picture.width), min(top + height, picture.height)
            inside = picture.crop((max(left, 0), max(top, 0), right, bottom))
            cut.paste(fill if len(fill) > 1 else fill[0], (0, 0, width, height))
            cut.paste(inside, (max(-left, 0), max(-top, 0)))
        return cut


def _offset(found: int, wanted: int) -> int:
    """Return where the cut begins along one side. Negative where the picture is smaller, which then starts late."""
    # torchvision rounds halves to the even number, and pads the smaller half in front.
    return round((found - wanted) / 2) if found >= wanted else -((wanted - found) // 2)


def upright(picture: P) -> P:
    """Return the picture as it was seen, whichever way the camera was held."""
    method = TRANSPOSITIONS.get(picture.getexif().get(_ORIENTATION, 1))
    return picture if method is None else picture.transpose(method)


def on_white(picture: P) -> P:
    """Return a transparent picture on white: its hidden colours, often black like the ink, are not part of it."""
    if not picture.has_transparency_data:
        return picture
    clear = picture.convert("RGBA")
    white = clear.copy()
    white.paste((255, 255, 255, 255), (0, 0, white.width, white.height))
    white.alpha_composite(clear)
    return white


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (batch, channels, height, width) as floats, scaled to [0, 1], then (x − mean) / std by channel."""
    centre, scale = (_by_channel(values, images.device) for values in (mean, std))
    return (images.float() / 255 - centre) / scale


def _by_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 (1, channels, 1, 1), made on the device: to copy it there would wait for all that a GPU has to do."""
    channels = [torch.full((), value, dtype=torch.float32, device=device) for value in values]
    return torch.stack(channels).view(1, -1, 1, 1)
