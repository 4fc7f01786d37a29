"""The tokenizer that lies in a prepared folder, held against the manifest beside it.

Apart from `tokenizer`, whose code travels with exported packages and knows nothing of folders.
"""

from pathlib import Path

from hydra_scale.data.manifest import TOKENIZER_FOLDER, Manifest
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        DataError: it is missing, damaged, or not the one that the manifest names.
    """
    tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
    if (tokenizer.sha256, tokenizer.vocab_size) != (manifest.tokenizer.sha256, manifest.tokenizer.vocab_size):
        raise DataError(
            f"{folder / TOKENIZER_FOLDER}: {tokenizer.kind} tokenizer {tokenizer.sha256[:12]}, the manifest says"
            f" {manifest.tokenizer.kind} {manifest.tokenizer.sha256[:12]}; copy the folder again"
        )
    return tokenizer
