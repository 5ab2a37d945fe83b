"""nmjax: change a language model from the inside while it runs, and measure what that does."""

from nmjax.forward_pass import ForwardResult, forward
from nmjax.generation import Generation, generate
from nmjax.interventions.attention import mask_heads, scale_qk
from nmjax.interventions.compose import Intervention, batch, compose
from nmjax.interventions.effect import Context, Effect, shared, static
from nmjax.interventions.memory import decay_kv
from nmjax.interventions.residual import ablate, steer
from nmjax.interventions.sampler import frequency_penalty, temperature, top_k, top_p
from nmjax.interventions.where import where
from nmjax.lm import LanguageModel
from nmjax.packs import PackError, load_pack
from nmjax.paths import enable_compilation_cache
from nmjax.scoring import ChoiceScores, score, score_choices

enable_compilation_cache()

__all__ = [
    "ChoiceScores",
    "Context",
    "Effect",
    "ForwardResult",
    "Generation",
    "Intervention",
    "LanguageModel",
    "PackError",
    "ablate",
    "batch",
    "compose",
    "decay_kv",
    "forward",
    "frequency_penalty",
    "generate",
    "load_pack",
    "mask_heads",
    "scale_qk",
    "score",
    "score_choices",
    "shared",
    "static",
    "steer",
    "temperature",
    "top_k",
    "top_p",
    "where",
]
