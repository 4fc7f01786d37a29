"""A checkpoint without its moments: what a run leaves for those who only use or start from its weights."""

from collections import defaultdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from hydra_scale.checkpoint.files import MANIFEST, MANIFEST_HASH, flush, publish, sha256_file
from hydra_scale.checkpoint.manifest import CheckpointManifest, FileEntry, read_manifest


def copy_weights(source: Path, aside: Path, final: Path) -> None:
    """Write the parameters of checkpoint `source`, file by file, into the new folder `aside`, and rename it `final`.

    Holds no more in memory than the parameters of one file. `source` has been verified.
    """
    whole = read_manifest(source)
    tensors = {name: entry for name, entry in whole.tensors.items() if name.startswith("parameter/")}
    keys: dict[str, list[str]] = defaultdict(list)
    for entry in tensors.values():
        for piece in entry.pieces:
            keys[piece.file].append(piece.key)
    aside.mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    for name, wanted in keys.items():
        with safe_open(source / name, framework="pt") as file:
            save_file({key: file.get_tensor(key) for key in wanted}, aside / name)
        flush(aside / name)
        files[name] = FileEntry(bytes=(aside / name).stat().st_size, sha256=sha256_file(aside / name))
    manifest = CheckpointManifest(
        version=whole.version, step=whole.step, state=whole.state, files=files, tensors=tensors
    )
    (aside / MANIFEST).write_bytes(manifest.to_json())
    (aside / MANIFEST_HASH).write_text(sha256_file(aside / MANIFEST))
    publish(aside, final)
