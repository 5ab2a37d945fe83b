"""Adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors, read and written.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (r, in)     a [in..., r]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   (out, r)    b [r, out...]

The files hold what is needed to add the branch to the same base, and nothing of the base. What we write carries the
base's fingerprint in the tensor file's metadata, which PEFT ignores; what others write says no more than shapes.
"""

import dataclasses
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import safe_open

from models.adapter_card import AdapterCard, write_card
from models.convert import tensors
from models.families import build
from models.files import FLOATS, CheckpointError, Stored, file_tensors, find
from models.peft_config import PeftConfig, read_config, select, write_config
from nmjax import adapters
from nmjax.adapters import Adapter, Site
from nmjax.lm import LanguageModel
from nmjax.steering.io import with_sorted_metadata
from nmjax.training.lora import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_NEW = ".saving-"
_BASE = "nmjax_base"  # in the metadata: the fingerprint of the model that the adapter was trained on
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of the Hugging Face model: one of our projections, or queries, keys and values packed in one."""

    name: str
    sites: tuple[Site, ...]

    @property
    def into(self) -> int:
        return int(np.prod(self.sites[0].into))

    @property
    def out(self) -> int:
        return sum(int(np.prod(site.out)) for site in self.sites)


def load_adapter(
    lm: LanguageModel, adapter: str | Path, *, subfolder: str = "", any_base: bool = False
) -> LanguageModel:
    """The model under an adapter from a folder or the hub; arguments and errors are those of `read_adapter`."""
    return lm.with_adapter(read_adapter(lm, adapter, subfolder=subfolder, any_base=any_base))


def read_adapter(lm: LanguageModel, adapter: str | Path, *, subfolder: str = "", any_base: bool = False) -> Adapter:
    """Reads a LoRA adapter in PEFT's format, in float32 whatever it is stored in.

    Args:
      lm: the base.
      adapter: a folder, else the id of a repository on the hub.
      subfolder: of either, for a repository with several adapters.
      any_base: takes an adapter that was trained on other weights of the same shapes (or on these in another dtype).
    Raises:
      CheckpointError: anything in the way of an adapter that acts as in PEFT, naming the file, the field or the
        tensors: a missing or damaged file, another kind of adapter, another base (hash or shapes).
    """
    at = f"{subfolder.strip('/')}/" if subfolder else ""
    folder = find(adapter, files=[f"{at}{CONFIG}", f"{at}{WEIGHTS}"], ignored=[], what="LoRA adapter") / subfolder
    config = read_config(folder / CONFIG)
    stored = _stored(folder)
    if not any_base:
        _check_base(lm, folder)
    where, known = folder / WEIGHTS, _modules(lm)
    found = _by_module(where, stored)
    _check_modules(config, where, found, known)
    leaves = {}
    for name, pair in found.items():
        r, module = config.rank(name), known[name]
        wanted = {"A": (r, module.into), "B": (module.out, r)}
        for part, tensor in pair.items():
            if tensor.shape != wanted[part]:
                raise CheckpointError(
                    f"{where}: lora_{part} of {name} has shape {tensor.shape}, wanted {wanted[part]}: r={r} by "
                    f"{CONFIG}, and the base's sizes"
                )
        a, b = (pair[part].view().astype(np.float32).T for part in "AB")
        each = np.split(b, len(module.sites), axis=1)
        for site, own in zip(module.sites, each, strict=True):
            leaves[site.path] = {
                "a": jnp.asarray(a.reshape(*site.into, r)),
                "b": jnp.asarray(own.reshape(r, *site.out)),
                "scale": jnp.full(r, config.scale(name), jnp.float32),
                "dropout": jnp.float32(config.dropout),
            }
    names, layers = select(leaves, [site.path for module in known.values() for site in module.sites])
    made_with = LoraConfig(
        r=config.r,
        alpha=config.alpha,
        targets="|".join("/".join(path) for path in names) if isinstance(names[0], tuple) else tuple(names),
        rslora=config.rslora,
        dropout=config.dropout,
        layers="all" if layers is None else layers,
    )
    return adapters.assemble(made_with, leaves)


def save_adapter(lm: LanguageModel, adapter: Adapter, folder: str | Path, card: AdapterCard | None = None) -> None:
    """Writes an adapter as PEFT does, with the base's fingerprint, and with a README.md if there is a card.

    `read_adapter` gives the same bits back. adapter_config.json comes last: a folder that has one is whole.

    Args:
      lm: the base; with or without adapters, unrolled or stacked.
      adapter: with layers unrolled or stacked.
      folder: created if it doesn't exist; its other files stay.
    Raises:
      CheckpointError: the adapter is for another model, or is one that PEFT has no form for.
    """
    adapter = adapters.unstack_layers(adapter)
    try:
        adapters.check(build(lm.config), adapter.weights)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    leaves, known = adapters.leaves_of(adapter), _modules(lm)
    by_path = {site.path: module for module in known.values() for site in module.sites}
    arrays, ranks, scales = {}, {}, {}
    for module in dict.fromkeys(by_path[path] for path in leaves):
        A, B, scale = _packed(module, [leaves.get(site.path) for site in module.sites])
        arrays[f"base_model.model.{module.name}.lora_A.weight"] = A
        arrays[f"base_model.model.{module.name}.lora_B.weight"] = B
        ranks[module.name], scales[module.name] = len(A), scale
    config = _config(adapter.config, ranks, scales, list(known))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_NEW}*"):  # of a run that was killed here
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=_NEW, dir=folder) as temporary:
        new = Path(temporary)
        metadata = {"format": "pt", _BASE: lm.base.fingerprint}
        (new / WEIGHTS).write_bytes(with_sorted_metadata(safetensors.numpy.save(arrays, metadata)))
        write_config(config, new / CONFIG, base=base_name(lm), packed=any(len(m.sites) > 1 for m in known.values()))
        if card is not None:
            write_card(
                card, new, base=base_name(lm), fingerprint=lm.base.fingerprint, config=config,
                count=sum(map(np.size, arrays.values())), modules=len(ranks),
            )  # fmt: skip
        (folder / CONFIG).unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, folder / path.name)


def base_name(lm: LanguageModel) -> str:
    """What to call the base in files that travel: its id on the hub if it came from there, else its folder's name."""
    if lm.folder is None:
        return ""
    for part in Path(lm.folder).parts:
        if cached := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(cached.groups())
    return Path(lm.folder).name


def _modules(lm: LanguageModel) -> dict[str, Module]:
    """The linear layers of a checkpoint of this model by name, in the order of the table."""
    known = adapters.sites(build(lm.config))
    found = {}
    for tensor in tensors(lm.config):
        paths = [path[:-1] for path in tensor.ours]
        if tensor.ours[0][-1] == "kernel" and known.keys() >= set(paths):
            name = tensor.hf.removesuffix(".weight")
            found[name] = Module(name, tuple(known[path] for path in paths))
    return found


def _stored(folder: Path) -> dict[str, Stored]:
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        reason = ", only adapter_model.bin: pickled weights can run code and are not read" if pickled else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{reason}")
    stored = file_tensors(folder / WEIGHTS)
    wrong = [f"{name} is {tensor.kind}" for name, tensor in stored.items() if tensor.kind not in FLOATS]
    if wrong:
        raise CheckpointError(f"{folder / WEIGHTS}: wanted tensors of {', '.join(FLOATS)}, but {'; '.join(wrong)}")
    return stored


def _check_base(lm: LanguageModel, folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="np") as file:
        base = (file.metadata() or {}).get(_BASE)
    if base is not None and base != lm.base.fingerprint:
        raise CheckpointError(
            f"{folder} is an adapter for the base {base}, this one is {lm.base.fingerprint}; wanted the base that it "
            "was trained on, in the same dtype, or any_base=True"
        )


def _by_module(where: Path, stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    found: dict[str, dict[str, Stored]] = {}
    unknown = []
    for key, tensor in stored.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            unknown.append(key)
    if unknown or not found:
        raise CheckpointError(
            f"{where}: wanted tensors called base_model.model.<module>.lora_A.weight and lora_B.weight, got "
            f"{_listed(unknown) or 'none'}"
        )
    half = [name for name, pair in found.items() if len(pair) < 2]
    if half:
        raise CheckpointError(f"{where}: wanted lora_A and lora_B of every module, got one of them for {_listed(half)}")
    return found


def _check_modules(config: PeftConfig, where: Path, found: Iterable[str], known: Mapping[str, Module]) -> None:
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in known))
    foreign = [name for name in found if name not in known]
    if foreign:
        raise CheckpointError(f"{where}: the base has no {_listed(foreign)}; its linear layers are {kinds}")
    wanted = {name for name in known if config.targets(name)}
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("not among them", [name for name in found if name not in wanted]),
            ("missing", [name for name in known if name in wanted and name not in found]),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: its modules are not the target_modules of {CONFIG}; {'; '.join(problems)}")


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _packed(module: Module, leaves: list[dict[str, Any] | None]) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """lora_A [r, in], lora_B [out, r] and the scale of a module, of the leaves at its sites."""
    present = [{name: np.asarray(leaf) for name, leaf in here.items()} for here in leaves if here is not None]
    first, equal = present[0], np.array_equal
    alike = all(equal(other[name], first[name]) for other in present for name in ("a", "scale"))
    if len(present) < len(leaves) or not alike:
        raise CheckpointError(
            f"adapter: {module.name} is one module to PEFT, with one lora_A for {len(leaves)} projections which have "
            "each its own here; wanted other targets, or the adapter merged into the model and that saved"
        )
    scale = first["scale"]
    if len(set(scale.tolist())) != 1:
        raise CheckpointError(f"adapter: {module.name} has scales {sorted(set(scale.tolist()))}, wanted one a module")
    r = len(scale)
    B = np.concatenate([here["b"].reshape(r, -1).T for here in present])
    return np.ascontiguousarray(first["a"].reshape(-1, r).T), np.ascontiguousarray(B), scale[0]


def _config(made_with: LoraConfig, ranks: dict[str, int], scales: dict[str, Any], known: list[str]) -> PeftConfig:
    """The config of these modules: what most have in common, and a pattern for each exception."""
    most = Counter(ranks.values()).most_common(1)[0][0]
    r = made_with.r if made_with.r in ranks.values() else most
    alphas = {name: _alpha(made_with, ranks[name], scales[name]) for name in ranks}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names, layers = select([tuple(name.split(".")) for name in ranks], [tuple(name.split(".")) for name in known])
    return PeftConfig(
        r=r,
        alpha=alpha,
        target_modules=[".".join(name) if isinstance(name, tuple) else name for name in names],
        rslora=made_with.rslora,
        dropout=made_with.dropout,
        layers=layers,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )


def _alpha(made_with: LoraConfig, r: int, scale) -> float:
    """The alpha that gives this scale in bits: the config's own, else a whole number, else any."""
    divisor = math.sqrt(r) if made_with.rslora else r
    exact = float(scale) * divisor
    own = [] if made_with.alpha is None else [made_with.alpha]
    return next((alpha for alpha in [*own, round(exact)] if np.float32(alpha / divisor) == scale), exact)
