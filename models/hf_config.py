"""What the `config.json` of every family has in common: how a field is read, when it is refused, how it is written."""

from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A `config.json` that this code can't honour exactly; the message names the field."""


def family_of(hf: dict[str, Any], known: Mapping[str, str]) -> str:
    """The family whose architecture a `config.json` names, or, where it names none, whose `model_type`.

    Args:
      hf: a parsed `config.json`.
      known: architecture -> family.
    Raises:
      ConfigError: the architecture is not a known one.
    """
    architecture = (hf.get("architectures") or [None])[0]
    found = known.get(architecture) if architecture else hf.get("model_type")
    if found is None or found not in known.values():
        raise ConfigError(
            f"config.json: architecture {architecture or hf.get('model_type')!r} is unknown, "
            f"wanted one of {sorted(known)}"
        )
    return found


def refuse(hf: dict[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Raises ConfigError for the first field that holds anything but null or one of the values allowed."""
    for name, values in allowed.items():
        value = hf.get(name)
        if value is not None and value not in values:
            wanted = " or ".join(map(repr, values)) if values else "no such field"
            raise ConfigError(f"config.json: {name}={value!r} is not supported, wanted {wanted}")


def integer(hf: dict[str, Any], name: str, least: int = 1) -> int:
    """A field that must be there, such as a size."""
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"config.json: {name}={value!r}, wanted an integer of {least} or more")
    return value


def number(hf: dict[str, Any], name: str, default: float | None = None) -> float:
    """A field that, if it has a default, may be null or missing."""
    value = default if hf.get(name) is None else hf[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {name}={value!r}, wanted a number")
    return float(value)


def read_shared(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields `bos_id`, `eos_ids`, `pad_id` and `dtype` of any of our configs."""
    eos = hf.get("eos_token_id")
    return {
        "bos_id": hf.get("bos_token_id"),
        "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_id": hf.get("pad_token_id"),
        "dtype": str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch."),
    }


def write_shared(config) -> dict[str, Any]:
    """What `read_shared` reads back. A null counts: some families have a default for the first two."""
    ids = config.eos_ids
    hf = {"bos_token_id": config.bos_id, "eos_token_id": list(ids) if len(ids) > 1 else next(iter(ids), None)}
    return hf | ({} if config.pad_id is None else {"pad_token_id": config.pad_id}) | {"torch_dtype": config.dtype}
