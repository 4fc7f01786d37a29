"""How long the documents of a prepared folder are, as a picture. The one place that imports matplotlib."""

from pathlib import Path
from types import ModuleType

import numpy as np

from hydra_scale.data.manifest import read_manifest
from hydra_scale.data.shards import TokenStore
from hydra_scale.errors import ConfigError, EnvironmentFault


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents between powers of two: borders 1, 2, 4, ... past the longest, int64 (bins + 1,); counts (bins,)."""
    borders = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
    return borders, np.histogram(lengths, borders)[0]


def draw_lengths(folder: Path, picture: Path) -> None:
    """Draw the histogram of each split into a file whose suffix says the format (.svg, .png, .pdf).

    Raises:
        DataError: the folder is damaged.
        EnvironmentFault: matplotlib is not installed, or the file cannot be written.
    """
    figure = drawing().Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    manifest = read_manifest(folder)
    for split in manifest.splits:
        lengths = TokenStore(folder, manifest, split).lengths
        borders, counts = length_histogram(lengths)
        label = f"{split}: {len(lengths):,} documents, median {int(np.median(lengths)):,}"
        axes.stairs(counts, borders, fill=True, alpha=0.5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="documents", title=folder.name)
    axes.set_xscale("log", base=2)
    axes.legend()
    try:
        figure.savefig(picture)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{picture}: cannot be written: {error}; choose another --histogram") from None


def check_picture(picture: Path) -> None:
    """Say before the work what would be said after it.

    Raises:
        ConfigError: its suffix is that of no format.
        EnvironmentFault: matplotlib is not installed, or there is no folder for it.
    """
    formats = drawing().Figure().canvas.get_supported_filetypes()
    if picture.suffix.lower().removeprefix(".") not in formats:
        raise ConfigError(f"--histogram {picture}: expected a name that ends in .{', .'.join(sorted(formats))}")
    if not picture.absolute().parent.is_dir():
        raise EnvironmentFault(f"--histogram {picture}: no such folder {picture.parent}; make it or choose another")


def drawing() -> ModuleType:
    """matplotlib.figure.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise EnvironmentFault("a picture needs matplotlib; pip install 'hydra-scale[bench]'") from None
    return matplotlib.figure
