"""A wheel: the encoder as a Python package that needs torch, safetensors and what its tokenizer needs.

NAME/__init__.py            load, Encoder (exported_files/package_init.py)
NAME/...                    what `hydra_scale.convert.exported` lists
NAME/tokenizer.py errors.py the tokenizers of the training, this system's own code
NAME-VERSION.dist-info/     METADATA with the model card, WHEEL, RECORD

The same source gives the same bytes: entries are sorted and stored as they are, with one fixed date.
"""

import base64
import hashlib
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from importlib.resources import as_file, files
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from safetensors.torch import load_file, save_file

from hydra_scale.convert.card import card
from hydra_scale.convert.exported import copy_code, read_contents, write_contents
from hydra_scale.convert.package import EncoderPackage, Probe
from hydra_scale.data.tokenizer import GivenTokenizer
from hydra_scale.errors import CheckpointError, ConfigError, EnvironmentFault

_NEEDED = ("numpy", "safetensors", "sentencepiece", "torch")
_INIT = "package_init.py"
_TOKENIZER_CODE = {"hydra_scale.data": "tokenizer.py", "hydra_scale": "errors.py"}
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip file can hold
_RUN = """
import importlib, sys, torch
from safetensors.torch import load_file, save_file
encoder = importlib.import_module(sys.argv[1]).load(device="cpu", dtype=getattr(torch, sys.argv[2]))
save_file({"logits": encoder.logits(**load_file(sys.argv[3]))}, sys.argv[4])
"""


def check_name(name: str | None, version: str) -> tuple[str, str]:
    """The name and the normalised version of the package to build.

    Raises:
        ConfigError: no name, or one that cannot be imported or would hide another package; or not a version.
    """
    if name is None:
        raise ConfigError("convert --to wheel: give the name of the package to build as --name my_encoder")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"--name {name}: expected lower-case letters, digits and single underscores, as my_encoder")
    if name in sys.stdlib_module_names or name in (*_NEEDED, "tokenizers", "transformers"):
        raise ConfigError(f"--name {name}: is the name of another package, which it would hide; choose another")
    try:
        return name, str(Version(version))
    except InvalidVersion:
        raise ConfigError(f"--package-version {version}: not a version of a Python package, as 1.0 or 2.1.3") from None


def write_wheel(package: EncoderPackage, folder: Path, name: str, version: str) -> None:
    """Write the wheel as the only file of a new folder."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        (root / name).mkdir()
        write_contents(package, root / name)
        copy_code(root / name)
        _copy_package_code(root / name)
        information = root / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(_metadata(package, name, version), encoding="utf-8")
        (information / "WHEEL").write_text(
            "Wheel-Version: 1.0\nGenerator: hydra-scale\nRoot-Is-Purelib: true\nTag: py3-none-any\n", encoding="utf-8"
        )
        _pack(root, information / "RECORD", folder / f"{name}-{version}-py3-none-any.whl")


def read_wheel(path: Path) -> EncoderPackage:
    """The package in a wheel, or in a folder that holds one wheel. No code of it is run.

    Raises:
        CheckpointError: not a wheel of this system.
        DataError: the tokenizer in it was altered.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return read_contents(_unpack(_wheel_file(path), Path(temporary)))


def run_wheel(folder: Path, package: EncoderPackage, probe: Probe) -> torch.Tensor:
    """Logits of the package, imported by another Python from its unpacked files: (batch, seqlen, vocab_size)."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        name = _unpack(_wheel_file(folder), root / "site").name
        save_file({"input_ids": probe.inputs, "attention_mask": probe.attention_mask}, root / "inputs")
        dtype = str(package.dtype).removeprefix("torch.")
        command = [sys.executable, "-P", "-c", _RUN, name, dtype, str(root / "inputs"), str(root / "outputs")]
        environment = os.environ | {"PYTHONPATH": str(root / "site"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            last = result.stderr.strip().splitlines()[-1:] or ["no output"]
            raise CheckpointError(f"{folder}: the package does not run: {last[0]}; not published")
        return load_file(root / "outputs")["logits"]


def _copy_package_code(folder: Path) -> None:
    with as_file(files("hydra_scale.convert") / "exported_files" / _INIT) as source:
        shutil.copyfile(source, folder / "__init__.py")
    for module, name in _TOKENIZER_CODE.items():
        code = (files(module) / name).read_text(encoding="utf-8")
        code = code.replace("from hydra_scale.errors import", "from .errors import")
        assert "import hydra_scale" not in code and "from hydra_scale" not in code, f"{name}: imports more"
        (folder / name).write_text(code, encoding="utf-8")


def _own_requirements() -> list[str]:
    """Requirements of hydra-scale, whose versions a package states as well."""
    try:
        return requires("hydra-scale") or []
    except PackageNotFoundError:
        raise EnvironmentFault(
            "hydra-scale runs here without being installed, so the versions a wheel needs are not known; run"
            " `pip install --editable .` where its pyproject.toml lies"
        ) from None


def _metadata(package: EncoderPackage, name: str, version: str) -> str:
    given = package.tokenizer is not None and package.tokenizer.kind == GivenTokenizer.kind
    names = (*_NEEDED, "tokenizers") if given else _NEEDED
    needs = sorted(str(need) for need in map(Requirement, _own_requirements()) if need.name in names)
    use = f"""```python
import {name}

encoder = {name}.load()  # on the GPU if there is one
encoder.fill_mask("... [MASK] ...")  # the likeliest tokens with their probabilities
encoder.embed(["a sentence", "another"])  # (2, {package.model.d_model}), the mean over the tokens
encoder.tokenize("a sentence")  # ids, as in the training
```"""
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    head += [f"Summary: Hydra encoder {name}, written by hydra-scale", "Requires-Python: >=3.11"]
    head += [*(f"Requires-Dist: {need}" for need in needs), "Description-Content-Type: text/markdown"]
    return "\n".join(head) + "\n\n" + card(package, use)


def _pack(root: Path, record: Path, wheel: Path) -> None:
    """Every file under `root`, and last the record of their hashes."""
    lines = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            member = path.relative_to(root).as_posix()
            with path.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").digest()
                source.seek(0)
                with archive.open(_member(member), "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            lines.append(f"{member},sha256={encoded},{path.stat().st_size}")
        own = record.relative_to(root).as_posix()
        archive.writestr(_member(own), "\n".join([*lines, f"{own},,", ""]))


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _DATE)
    member.create_system = 3  # Unix, wherever this runs
    member.external_attr = 0o100644 << 16
    return member


def _wheel_file(path: Path) -> Path:
    wheels = sorted(path.glob("*.whl")) if path.is_dir() else [path]
    if len(wheels) != 1 or not wheels[0].is_file():
        raise CheckpointError(f"{path}: found {len(wheels) if path.is_dir() else 'no'} wheels; give one .whl file")
    return wheels[0]


def _unpack(wheel: Path, site: Path) -> Path:
    """Unpack a wheel of this system into `site`; returns the folder of its package."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)  # removes absolute paths and .. from the names
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel}: not a wheel: {error}; give one of `convert --to wheel`") from None
    configurations = list(site.glob("*/config.json"))
    if len(configurations) != 1:
        raise CheckpointError(f"{wheel}: holds no exported encoder; give a wheel of `convert --to wheel`")
    return configurations[0].parent
