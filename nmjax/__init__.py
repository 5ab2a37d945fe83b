"""nmjax: change a language model from the inside while it runs, and measure what that does."""

from nmjax.forward_pass import ForwardResult, forward
from nmjax.generation import Generation, generate
from nmjax.interventions.adapter import use_adapter
from nmjax.interventions.attention import (
    anchor_attention,
    bias_positions,
    mask_heads,
    oscillate_attention,
    scale_heads,
    scale_qk,
)
from nmjax.interventions.compose import Intervention, batch, compose
from nmjax.interventions.draws import Drawing
from nmjax.interventions.effect import Context, Effect, shared, static
from nmjax.interventions.inputs import drop_tokens, jitter_embeddings, preface
from nmjax.interventions.memory import decay_kv, decay_segments, segment_kv, stride_kv, window_kv
from nmjax.interventions.residual import add_noise, gain_layers
from nmjax.interventions.sampler import (
    bias_tokens,
    contrast,
    frequency_penalty,
    min_p,
    presence_penalty,
    pulse_temperature,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from nmjax.interventions.span import steer_span
from nmjax.interventions.steering import ablate, clamp_projection, soft_projection, steer, steer_placebo
from nmjax.interventions.where import where
from nmjax.lm import LanguageModel
from nmjax.next_token import next_logprobs
from nmjax.packs import PackError, list_packs, load_pack
from nmjax.paths import enable_compilation_cache
from nmjax.prefix import share_prefix
from nmjax.scoring import ChoiceScores, continuation_logprobs, mean_logprobs, score, score_choices

enable_compilation_cache()

__all__ = [
    "ChoiceScores",
    "Context",
    "Drawing",
    "Effect",
    "ForwardResult",
    "Generation",
    "Intervention",
    "LanguageModel",
    "PackError",
    "ablate",
    "add_noise",
    "anchor_attention",
    "batch",
    "bias_positions",
    "bias_tokens",
    "clamp_projection",
    "compose",
    "continuation_logprobs",
    "contrast",
    "decay_kv",
    "decay_segments",
    "drop_tokens",
    "forward",
    "frequency_penalty",
    "gain_layers",
    "generate",
    "jitter_embeddings",
    "list_packs",
    "load_pack",
    "mask_heads",
    "mean_logprobs",
    "min_p",
    "next_logprobs",
    "oscillate_attention",
    "preface",
    "presence_penalty",
    "pulse_temperature",
    "repetition_penalty",
    "scale_heads",
    "scale_qk",
    "score",
    "score_choices",
    "segment_kv",
    "share_prefix",
    "shared",
    "soft_projection",
    "static",
    "steer",
    "steer_placebo",
    "steer_span",
    "stride_kv",
    "temperature",
    "top_k",
    "top_p",
    "use_adapter",
    "where",
    "window_kv",
]
