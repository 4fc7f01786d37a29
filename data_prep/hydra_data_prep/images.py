"""Pictures as documents: the values of their pixels, for the `bytes` tokenizer."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra_data_prep.sources import list_files, source_suffixes
from hydra_scale.errors import DataError, EnvironmentFault

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
_MODES = {"grey": "L", "rgb": "RGB"}
_DEEPER = ("I", "F")  # more than 8 bits a pixel: 16-bit and 32-bit grey, floating point


@dataclass(frozen=True)
class ImageOptions:
    """How pictures become documents."""

    size: int
    """N: the shorter side is resized to N pixels (bicubic), and the middle N x N of the longer one kept."""
    color: Literal["grey", "rgb"] = "grey"


def read_images(inputs: Sequence[Path], options: ImageOptions) -> Iterator[bytes]:
    """The pictures of files and folders, in the order of their paths.

    A picture of N x N pixels is taken as it is. Of an animated one the first frame is read, transparency is left out,
    and a turn that EXIF asks for is made.

    Yields:
        N * N bytes (grey) or N * N * 3 (RGB, red green blue of each pixel), row by row.

    Raises:
        DataError: a path is missing, or a picture is damaged, of too many pixels (a decompression bomb), or of more
            than 8 bits a pixel.
        EnvironmentFault: Pillow is not installed.
    """
    image, operations = _pillow()
    return (_pixels(image, operations, file, options) for file in list_files(inputs, source_suffixes("images")))


def _pixels(image: Any, operations: Any, file: Path, options: ImageOptions) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)  # raised before anything is decompressed
            with image.open(file, formats=_FORMATS) as picture:
                picture.verify()  # checksums of a PNG; pixels cannot be read after it
            with image.open(file, formats=_FORMATS) as picture:
                if picture.mode.startswith(_DEEPER):
                    raise DataError(f"{file}: a picture of mode {picture.mode}, expected 8 bits a value; convert it")
                upright = operations.exif_transpose(picture).convert(_MODES[options.color])
    except (image.DecompressionBombWarning, image.DecompressionBombError) as error:
        raise DataError(f"{file}: refused as a decompression bomb ({error}); make it smaller or remove it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for damaged files
        raise DataError(f"{file}: cannot be read as a picture ({error}); repair or remove it") from None
    side = (options.size, options.size)
    fitted = upright if upright.size == side else operations.fit(upright, side, image.Resampling.BICUBIC)
    content: bytes = fitted.tobytes()
    return content


def _pillow() -> tuple[Any, Any]:
    """The one place that needs Pillow."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise EnvironmentFault("--source images needs Pillow; pip install 'hydra-scale[images]'") from None
    return Image, ImageOps
