"""Reading a configuration file with overrides, and writing the resolved one.

YAML is read with the safe loader: no tag builds an object. Errors name file, line and key.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hydra_scale.config import Config, ModelConfig
from hydra_scale.errors import ConfigError

KeyPath = tuple[str, ...]
AnySection = TypeVar("AnySection", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` with each `a.b=value` of `overrides` laid over it. Raises as `load_section`."""
    return load_section(Config, path, overrides)


def load_section(kind: type[AnySection], path: Path, overrides: Sequence[str] = ()) -> AnySection:
    """The settings of a class in the YAML file `path`, with each `a.b=value` of `overrides` laid over them.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown or given twice, or a value does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}; give a YAML file") from None
    values, places = _parse(path, text)
    for override in overrides:
        keys, value = _parse_override(override)
        _assign(values, keys, value, override)
        _note(places, keys, override)
    return _validate(kind, values, places, str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    return yaml.safe_dump(_plain(config.model_dump()), sort_keys=False)


def override_model(model: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """`model` with each `model.a.b=value` of `overrides` laid over it.

    Raises:
        ConfigError: a key is not one of the model's, or a value does not fit.
    """
    values: dict[str, Any] = {"model": model.model_dump(), "data": {"train": "", "seqlen": 1}}
    places: dict[KeyPath, str] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        if keys[0] != "model":
            raise ConfigError(f"override {override!r}: expected the form model.key=value")
        _assign(values, keys, value, override)
        _note(places, keys, override)
    return _validate(Config, values, places, "settings").model


def in_short(error: Exception) -> str:
    """The first problem of a validation; the words of any other error."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, found {first['input']!r}"


def flatten(values: dict[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key)), value


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Nested values, and where each key stands; refuses a key that is given twice."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        places: dict[KeyPath, str] = {}
        if root is not None:
            _walk(path, root, (), places)
        values = loader.construct_document(root) if root is not None else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found a {type(values).__name__} at the top, expected `section:` mappings")
    return values, places


def _walk(path: Path, node: yaml.Node, prefix: KeyPath, places: dict[KeyPath, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        keys = (*prefix, str(key_node.value))
        place = f"{path}:{key_node.start_mark.line + 1}"
        if keys in places:
            raise ConfigError(f"{place}: {'.'.join(keys)} is given twice, first at {places[keys]}; keep one")
        places[keys] = place
        _walk(path, value_node, keys, places)


def _parse_override(override: str) -> tuple[KeyPath, Any]:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: expected the form section.key=value")
    try:
        return tuple(name.strip().split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _assign(values: dict[str, Any], keys: KeyPath, value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
    values[keys[-1]] = value


def _note(places: dict[KeyPath, str], keys: KeyPath, override: str) -> None:
    """Where a key stands, and those sections that no file has."""
    for length in range(1, len(keys)):
        places.setdefault(keys[:length], f"override {override!r}")
    places[keys] = f"override {override!r}"


def _validate(kind: type[AnySection], values: dict[str, Any], places: dict[KeyPath, str], source: str) -> AnySection:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        keys = _keys_in(values, first["loc"])
        explained = _explain(kind, keys, first)
        raise ConfigError(f"{_place_of(keys, explained, places) or source}: {explained}") from None


def _place_of(keys: KeyPath, explained: str, places: dict[KeyPath, str]) -> str | None:
    """Of the setting; where several do not go together, of one that is spoken of, an override if one is."""
    words = set(re.findall(r"[\w.]*\w", explained))
    named = [known for known in places if known[: len(keys)] == keys and ".".join(known[len(keys) :]) in words]
    if named:
        return places[max(named, key=lambda known: places[known].startswith("override"))]
    return next((places[keys[:length]] for length in range(len(keys), 0, -1) if keys[:length] in places), None)


def _keys_in(values: Any, location: tuple[str | int, ...]) -> KeyPath:
    """Where an error is, without the names that pydantic gives to the forms a value may have."""
    keys: list[str] = []
    for part in location:
        is_place = isinstance(values, list | tuple) and isinstance(part, int)
        if is_place or isinstance(values, dict):
            keys.append(str(part))
            values = values[part] if is_place else values.get(part)
    return tuple(keys)


def _explain(kind: type[BaseModel], keys: KeyPath, error: Any) -> str:
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, [".".join(known) for known in _known_keys(kind)], n=1, cutoff=0.0)
        return f"unknown key {name}; did you mean {near[0]}?"
    if error["type"] == "missing":
        return f"{name} is missing; set it in the file or as {name}=value"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    message = error["msg"].replace("valid tuple", "list: [a, b]")
    return f"{name}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def _known_keys(section: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if nested is not None:
            yield from _known_keys(nested, (*prefix, name))
        yield (*prefix, name)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
