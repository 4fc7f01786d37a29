"""What is given by mistake is named in one line: the file, what was found in it, what was expected, what to do."""

from pathlib import Path

import pytest
import torch
from public_forward import Shape, random_state
from safetensors.torch import save_file

from hydra_scale.convert.convert import convert
from hydra_scale.convert.public_hydra import read_public
from hydra_scale.errors import CheckpointError, ConfigError

FIRST = "bert.encoder.layer.0.layer.mixer."
STATE = random_state(Shape())
MIXER = {name.removeprefix(FIRST): tensor for name, tensor in STATE.items() if name.startswith(FIRST)}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("public-hydra", None, "there is no such file; give a"),
        ("public-hydra", b"", "it is empty; give a"),
        ("public-hydra", b"hello", "cannot be read as tensors: KeyError 101; give a"),
        ("public-hydra", torch.zeros(3), "holds no named tensors; give a state dict"),
        ("public-hydra", {"state": {"optimizers": {}}}, "holds no named tensors; give a state dict"),
        ("public-hydra", MIXER, "in_proj.weight: no counterpart .*; of a mixer alone say --from mixer"),
        ("public-hydra", STATE | {f"{FIRST}matrix_mixer.bias": torch.ones(1)}, "has no place for 1 tensors"),
        ("public-hydra", STATE | {f"{FIRST}conv1d.weight": torch.ones(48, 1, 4)}, "d_conv is 4; a centred .* taps$"),
        ("mixer", STATE, "holds no tensor fc_D.weight: not .* of a Hydra mixer; a whole encoder is public-hydra"),
        ("mixer", MIXER | {"in_proj.weight": torch.ones(3)}, r"in_proj.weight has shape \(3,\), expected 2 axes"),
        ("mixer", MIXER | {"A_log": torch.full((4,), torch.inf)}, "A_log holds 4 values that are not finite"),
        ("mixer", {n: t for n, t in MIXER.items() if n != "D"}, "the mixer lacks 1 of 9 tensors: D; give the whole"),
    ],
)  # fmt: skip
def test_files_of_something_else(kind: str, content: object, message: str, tmp_path: Path) -> None:
    source = tmp_path / "given.pt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(CheckpointError, match=rf"given\.pt: .*{message}") as error:
        convert(kind, kind, source, tmp_path / "out.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.pt").exists()


def test_metadata_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "told.safetensors"
    for metadata, message in (
        ({"config": "{"}, "its metadata 'config' is not JSON"),
        ({"config": "[1]"}, r"its configuration is \[1\], expected an object"),
        ({"ngroups": '"two"'}, "it says ngroups: input should be a valid integer.*, found 'two'"),
        ({"dt_limit": "[0.1]"}, "it says dt_limit"),
        ({"config": '{"dt_limit": 3}'}, "it says dt_limit"),
    ):
        save_file({n: t.clone() for n, t in STATE.items()}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=rf"told\.safetensors: not a public Hydra .*: {message}"):
            read_public(path)


def test_the_name_of_the_file_to_write_is_the_one_given(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"/out\.bin: the name of the file to write must end in"):
        convert("public-hydra", "public-hydra", tmp_path / "state.pt", tmp_path / "out.bin")
