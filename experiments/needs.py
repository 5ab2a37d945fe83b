"""What packs need to know of a model before they can run: its steering vectors and its induction heads."""

from __future__ import annotations

from collections.abc import Sequence

import nmjax
from experiments import build_steering_vectors
from nmjax import induction, packs
from nmjax.steering import store, vectors


def provide(lm: nmjax.LanguageModel, interventions: Sequence[nmjax.Intervention], build_missing: bool) -> dict:
    """Builds the vectors that are missing and finds the induction heads, with progress bars; both are kept for later.

    Args:
      build_missing: False raises instead.
    Returns:
      What the packs will use, as JSON: by vector, whether held-out pairs accept a layer of it; the heads.
    Raises:
      ValueError: a vector is missing that may not, or can't, be built.
    """
    names, needs_heads = packs.vectors_of(interventions), any(packs.needs(iv)[1] for iv in interventions)
    used: dict = {"steering_vectors": {}, "induction_heads": None}
    missing = [name for name in names if not store.has_vector(lm, name)]
    if missing and not build_missing:
        store.named_vector(lm, missing[0])
    if missing:
        pairs = vectors.read_pairs()
        unknown = [name for name in missing if name not in pairs]
        if unknown:
            store.named_vector(lm, unknown[0])
        print(f"Building the steering vectors {', '.join(missing)}, once for this model")
        build_steering_vectors.build(lm, {name: pairs[name] for name in missing}, keep_rejected=True)
    for name in names:
        layer = store.metadata_of(lm, name).get("chosen_layer", "none")
        used["steering_vectors"][name] = {"accepted": layer != "none", "best_layer": None if layer == "none" else layer}
        if layer == "none":
            print(f"Note: steering vector {name!r} did not pass its held-out test in any layer of this model")
    if needs_heads:
        found = induction.induction_heads(lm, on_empty="none")
        heads = [[int(layer), int(head)] for layer, head in zip(*found.nonzero(), strict=True)]
        used["induction_heads"] = heads
        print(f"Induction heads (layer, head): {', '.join(f'{a}.{b}' for a, b in heads) or 'none'}"
              "; where a pack's layers have none, it scales their two middle heads")  # fmt: skip
    return used
