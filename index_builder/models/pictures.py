"""Pictures as image models read them; needs the extra `images` (Pillow)."""

import io
from importlib.util import find_spec
from typing import Any

import numpy as np

from index_builder.models.manifest import ImageInput

INSTALL_COMMAND = "pip install 'ringfort[images]'"
#: What is decoded. Fewer decoders, fewer ways in for crafted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: A picture of more is not decoded, however few bytes it comes in.
MAX_PIXELS = 32 * 1024 * 1024


class PictureRefused(ValueError):
    """Bytes that are no picture, or one too large; the message says which."""


def can_decode() -> bool:
    """Whether the decoder is installed."""
    return find_spec("PIL") is not None


def prepared(data: bytes, wanted: ImageInput) -> np.ndarray:
    """One picture as the model reads it, float32 [3, height, width] or [height, width, 3]; PictureRefused.

    Of a moving picture the first frame. What is transparent shows its colour.
    """
    picture = _resized(_decoded(data, wanted), wanted)
    mean, std = np.array(wanted.mean, np.float32), np.array(wanted.std, np.float32)
    pixels: np.ndarray = np.asarray(picture, np.float32)
    if wanted.channels == "BGR":
        pixels = pixels[:, :, ::-1]
    pixels = (pixels / np.float32(wanted.scale) - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if wanted.layout == "CHW" else pixels)


def _decoded(data: bytes, wanted: ImageInput) -> Any:
    """An RGB picture, at no less than the size wanted."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise PictureRefused(
                f"{picture.width} by {picture.height} pixels; at most {MAX_PIXELS} are decoded"
            )
        # JPEG can be decoded at a half, a quarter or an eighth, which is most of its cost.
        least = max(wanted.width, wanted.height, wanted.shorter_side)
        picture.draft("RGB", (least, least))
        return picture.convert("RGB")
    except PictureRefused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureRefused(f"more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise PictureRefused(f"not a picture of a kind known here ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on bad bytes
        raise PictureRefused(f"cannot be decoded ({error})") from None


def _resized(picture: Any, wanted: ImageInput) -> Any:
    from PIL import Image

    resample = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }[wanted.resample]
    size = (wanted.width, wanted.height)
    if wanted.resize == "stretch":
        return picture.resize(size, resample)
    across, down = wanted.width / picture.width, wanted.height / picture.height
    if wanted.resize == "pad":
        factor = min(across, down)
    elif wanted.shorter_side:
        factor = max(wanted.shorter_side / min(picture.size), across, down)
    else:
        factor = max(across, down)
    scaled = picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), resample
    )
    left, top = (scaled.width - wanted.width) // 2, (scaled.height - wanted.height) // 2
    # Beyond the picture this is black, so it cuts and it pads.
    return scaled.crop((left, top, left + wanted.width, top + wanted.height))
