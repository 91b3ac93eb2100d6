"""Small copies of pictures for pages that hold all they show."""

import io
from base64 import b64encode

_THUMBNAIL = 128
"""Longer side of a sample image on the page, at most, in pixels."""


def data_uri(image: bytes) -> str:
    """Encode a small copy of an image, whatever its format, as one that every browser shows."""
    from pipelines.data.decoding import open_picture, strict_pictures
    from pipelines.runtime.memory import ANY_SIZE

    with strict_pictures(ANY_SIZE):
        picture = open_picture(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    if max(picture.size) <= _THUMBNAIL // 2:  # pixels that one can count must not be blurred
        kind = "png"
        picture.save(encoded, "PNG")
    else:
        kind = "jpeg"
        picture.save(encoded, "JPEG", quality=85)
    return f"data:image/{kind};base64,{b64encode(encoded.getvalue()).decode()}"
