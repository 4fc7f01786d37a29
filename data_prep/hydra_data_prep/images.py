"""Pictures as documents: the values of their pixels, for the `bytes` tokenizer, and the class of their folder."""

import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra_data_prep.cleaning import Labelled
from hydra_data_prep.sources import list_files, source_suffixes
from hydra_scale.errors import DataError, EnvironmentFault

ClassFolders = Literal["folders", "none"]
"""Whether pictures have the class of the folder they lie in."""
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
_MODES = {"grey": "L", "rgb": "RGB"}
_DEEPER = ("I", "F")  # more than 8 bits a pixel: 16-bit and 32-bit grey, floating point
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error)
"""What Pillow's decoders raise for damaged files; they promise nothing."""


@dataclass(frozen=True)
class ImageOptions:
    """How pictures become documents."""

    size: int
    """N: the shorter side is resized to N pixels (bicubic), and the middle N x N of the longer one kept."""
    color: Literal["grey", "rgb"] = "grey"


@dataclass(frozen=True)
class Classes:
    """Folders INPUT/CLASS that hold pictures, at whatever depth. A label is a class's place in the sorted names."""

    names: tuple[str, ...]
    roots: tuple[Path, ...]

    def label_of(self, file: Path) -> int:
        """Of a picture in one of the folders."""
        name = _class_of(file, self.roots)
        assert name is not None
        return self.names.index(name)


def find_classes(inputs: Sequence[Path], wanted: ClassFolders | None) -> Classes | None:
    """The classes of all pictures, None if they have none.

    If it is not said what is `wanted`, there are classes where every picture lies in a folder inside an input, and
    these are two or more.

    Raises:
        DataError: some pictures lie in such folders and others do not; or classes are wanted and a picture has none.
    """
    if wanted == "none":
        return None
    found = {file: _class_of(file, inputs) for file in list_files(inputs, source_suffixes("images"))}
    names = sorted({name for name in found.values() if name is not None})
    outside = next((file for file, name in found.items() if name is None), None)
    if outside is not None and (names or wanted):
        others = f"others in {', '.join(names[:3])}" if names else "no other does"
        raise DataError(
            f"{outside}: lies in no folder of a class, INPUT/CLASS/..., {others}; move it or give --image-labels none"
        )
    return Classes(tuple(names), tuple(inputs)) if len(names) >= (1 if wanted else 2) else None


def _class_of(file: Path, roots: Sequence[Path]) -> str | None:
    inside = next((file.relative_to(root).parts for root in roots if file.is_relative_to(root)), ())
    return inside[0] if len(inside) > 1 else None


def read_images(
    inputs: Sequence[Path], options: ImageOptions, classes: Classes | None = None
) -> Iterator[bytes] | Iterator[Labelled]:
    """The pictures of files and folders, in the order of their paths; with their labels, if there are classes.

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
    files = list_files(inputs, source_suffixes("images"))
    if classes is None:
        return (_pixels(image, operations, file, options) for file in files)
    return (Labelled(_pixels(image, operations, file, options), classes.label_of(file)) for file in files)


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
    except _DAMAGED as error:
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
