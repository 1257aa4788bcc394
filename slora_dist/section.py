"""What a section of settings is, and how a finding about one becomes the message that a user reads."""

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from slora_dist.errors import ConfigError


def _number(value: object) -> object:
    """PyYAML reads ``1e-3`` as a string (YAML 1.1 wants ``1.0e-3``): read it as the number that everybody means."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _key(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _off(value: object) -> object:
    return "off" if value is False else value


Off = BeforeValidator(_off)  # PyYAML reads the word ``off`` as False (YAML 1.1)
Key = Annotated[int, BeforeValidator(_key)]  # of a mapping: JSON, in which a run keeps its settings, writes it as text
Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of settings: unknown names are errors, values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def explain(error: ValidationError, root: type[Section], prefix: str = "") -> ConfigError:
    """Turn the first of pydantic's findings into the one message that a user reads."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    if first["type"] == "extra_forbidden":
        typed = [str(part) for part in first["loc"]]
        return ConfigError(prefix + ".".join(typed), "unknown setting", ", ".join(_names(root, typed[:-1])))
    parts = [str(part) for part in first["loc"]]
    location = [part for part in parts if part != "int" and (part.isidentifier() or part.isdigit())]  # unions add the types they tried
    name = prefix + ".".join(location)
    if first["type"] == "missing":
        return ConfigError(name, "missing", _meaning(root, location))
    return ConfigError(name, f"{first['input']!r} does not fit", f"{_lower(first['msg'])} ({_meaning(root, location)})")


def _lower(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _section(root: type[Section], location: Sequence[str]) -> type[Section]:
    parts = iter(location)
    for part in parts:
        field = root.model_fields.get(part)
        inner: Any = field.annotation if field else None
        if get_origin(inner) is dict and next(parts, None) is not None:  # a mapping of sections: behind its key stands one
            inner = get_args(inner)[1]
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            break
        root = inner
    return root


def _names(root: type[Section], location: Sequence[str]) -> list[str]:
    return sorted(name for name in _section(root, location).model_fields if name != "kind")


def _meaning(root: type[Section], location: Sequence[str]) -> str:
    section = _section(root, location)
    field = next((section.model_fields[part] for part in reversed(location) if part in section.model_fields), None)
    return (field.description or (section.__doc__ or "").strip()).rstrip(".") if field else (section.__doc__ or "").strip().rstrip(".")
