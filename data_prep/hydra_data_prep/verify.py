"""`verify`: does a prepared folder still hold what its manifest says?"""

from pathlib import Path

from hydra_scale.data.manifest import MANIFEST, TOKENIZER_FOLDER, read_manifest
from hydra_scale.data.shards import TokenStore
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError


def verify(folder: Path) -> None:
    """Hash every file of a prepared folder, check lengths and token ids, and look for files that do not belong there.

    Raises:
        DataError: the first difference from the manifest.
    """
    manifest = read_manifest(folder)
    if Tokenizer.load(folder / TOKENIZER_FOLDER).sha256 != manifest.tokenizer.sha256:
        raise DataError(f"{folder / TOKENIZER_FOLDER}: not the tokenizer of the manifest; copy the folder again")
    known = {folder / MANIFEST}
    for split, entry in manifest.splits.items():
        store = TokenStore(folder, manifest, split)
        store.counts()
        store.verify()
        known |= {store.folder / file.name for file in (entry.lengths, entry.counts, *entry.shards)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in known and path.parent != folder / TOKENIZER_FOLDER:
            raise DataError(f"{path}: not listed in the manifest; remove it or prepare the folder again")
