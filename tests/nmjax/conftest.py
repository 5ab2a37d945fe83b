"""One tiny Llama for every test of the engine, and its interventions with float64 logits from plain torch."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import models
import nmjax
from nmjax.generation import Generation
from nmjax.interventions.compose import Intervention

GOLDEN = Path(__file__).parents[1] / "golden" / "interventions"
ROWS = 96  # of the batch that tests share


@pytest.fixture(scope="session")
def tiny_lm():
    """A random Llama: L 3, N 4, K 2, D 32, V 97, context 128; greedy has no near ties; no tokenizer."""
    return models.load(GOLDEN / "model")


@pytest.fixture(scope="session")
def word_lm(tiny_lm):
    """`tiny_lm` with a tokenizer of whole words, w3 to w96 and specials, and a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ 'w10' if m['role'] == 'user' else 'w11' }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w11{% endif %}"
    )
    return dataclasses.replace(tiny_lm, tokenizer=tokenizer)


@dataclasses.dataclass(frozen=True)
class Cases:
    """`tests/golden/make_interventions.py` as the tests see it."""

    prompts: list[list[int]]
    specs: dict[str, list]  # name -> (transform, arguments, dose, where) in order
    vectors: dict[str, np.ndarray]
    interventions: dict[str, Intervention]
    golden: dict[str, np.ndarray]  # "<case>.<prompt>.<tokens | logits | final>"

    def rows(self) -> list[tuple[str, int]]:
        """(case, index of its prompt) of every row of `everything`."""
        return [(name, i) for name in self.specs for i in range(len(self.prompts))]


@pytest.fixture(scope="session")
def cases() -> Cases:
    spec = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    vectors = dict(np.load(GOLDEN / "vectors.npz"))

    def build(transform, arguments, dose, where):
        resolved = {k: vectors[v] if k in ("vector", "direction") else v for k, v in arguments.items()}
        effect = getattr(nmjax, transform)(**resolved).at(dose)
        return effect if where is None else effect.on(**where)

    return Cases(
        prompts=spec["prompts"],
        specs=spec["cases"],
        vectors=vectors,
        interventions={name: nmjax.compose(*(build(*e) for e in effects)) for name, effects in spec["cases"].items()},
        golden=dict(np.load(GOLDEN / "logits.npz")),
    )


@pytest.fixture(scope="session")
def in_company(tiny_lm, cases):
    """`generate` for up to 38 rows of your own behind the 58 of all cases, and what it returned for yours.

    Whatever is asked, it is one compiled program (prompts and new tokens up to 16; effects and vectors of the cases):
    compiling takes seconds, running it milliseconds. Values that come as lists are for your rows. `company` is what the
    other rows do instead of the cases.
    """
    others = cases.rows()

    def generate(prompts, packs=None, lm=tiny_lm, company="cases", **options) -> Generation:
        spare = ROWS - len(others) - len(prompts)

        def widen(value):
            return [value[0]] * len(others) + value + [value[0]] * spare if isinstance(value, list) else value

        shared = ("stop", "eos_token_id")
        options = {name: value if name in shared else widen(value) for name, value in options.items()}
        out = nmjax.generate(
            lm,
            [cases.prompts[i] for _, i in others] + prompts + [cases.prompts[0]] * spare,
            packs=_with_company(cases, company, packs, len(prompts)),
            **{"max_new_tokens": 16, "eos_token_id": [], **options},
        )
        mine = slice(len(others), len(others) + len(prompts))
        lists = [f.name for f in dataclasses.fields(out) if f.name not in ("notes", "seen")]
        return dataclasses.replace(out, **{name: getattr(out, name)[mine] for name in lists})

    return generate


@pytest.fixture(scope="session")
def pass_in_company(tiny_lm, cases):
    """`forward` in the same company, prompts up to 32 tokens: a row's unpadded logits [T, V] and next_logits [V]."""
    others = [cases.prompts[i] + cases.golden[f"{name}.{i}.tokens"].tolist() for name, i in cases.rows()]

    def forward(prompts, packs=None, company="cases"):
        spare = ROWS - len(others) - len(prompts)
        rows = others + prompts + [others[1]] * spare
        result = nmjax.forward(tiny_lm, rows, packs=_with_company(cases, company, packs, len(prompts)))
        logits, mask, last = (np.asarray(x) for x in (result.logits, result.mask, result.next_logits))
        return [(logits[i][mask[i]], last[i]) for i in range(len(others), len(others) + len(prompts))]

    return forward


def _with_company(cases, company, packs, rows):
    """One intervention for each of the shared batch's rows."""
    names = [name for name, _ in cases.rows()]
    before = [cases.interventions[name] if company == "cases" else company for name in names]
    mine = packs if isinstance(packs, list) else [packs] * rows
    behind = None if company == "cases" else company
    return before + mine + [behind] * (ROWS - len(before) - rows)


@pytest.fixture(scope="session")
def everything(in_company, cases) -> Generation:
    """Every case on every prompt, greedily, 8 tokens: row i is `cases.rows()[i]`."""
    parts = []
    for start in (0, 29):
        rows = cases.rows()[start : start + 29]
        prompts, packs = [cases.prompts[i] for _, i in rows], [cases.interventions[name] for name, _ in rows]
        parts.append(in_company(prompts, packs, max_new_tokens=8))
    lists = [f.name for f in dataclasses.fields(Generation) if f.name not in ("notes", "seen")]
    return dataclasses.replace(parts[0], **{name: getattr(parts[0], name) + getattr(parts[1], name) for name in lists})


@pytest.fixture(scope="session")
def assert_close():
    """The project's tolerance: 1e-5 * max(1, max|wanted|), and infinities at the same places."""

    def check(seen, wanted, scale=None):
        seen, wanted = np.asarray(seen), np.asarray(wanted)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.where(finite, 0, seen), np.where(finite, 0, wanted))
        largest = max(1.0, np.abs(wanted[finite]).max(initial=0.0) if scale is None else scale)
        np.testing.assert_allclose(seen[finite], wanted[finite], rtol=0, atol=1e-5 * largest)
        return np.abs(seen[finite] - wanted[finite]).max(initial=0.0) / largest

    return check


@pytest.fixture(scope="session")
def signals_by_definition():
    """Every signal of a monitor, one step and one layer after another in float64; NaN at steps between checks.

    Takes logits [T, V], states [T, L, D] and tokens [T]; returns float64 [T] by name.
    """

    def one_step(x, h, token, before, tau, lambda_, alpha):
        p = np.exp(x - x.max())
        p = p / p.sum()
        u = [layer / math.sqrt(layer @ layer + 1e-8) for layer in h]
        L = len(u)
        now = {"I_cat": 1 - (p * p).sum(), "max_prob": p.max(), "entropy": -sum(q * math.log(q) for q in p if q > 0)}
        now["delta_mu"] = 1 / math.sqrt(now["I_cat"] + 0.01)
        parts = {"": (0, L), "_early": (0, L // 4), "_middle": (L // 4, 3 * L // 4), "_final": (3 * L // 4, L)}
        for name, (start, stop) in parts.items():
            off = [v - sum(u[start:stop]) / (stop - start) for v in u[start:stop]]
            now[f"delta_sigma{name}"] = math.sqrt(sum(v @ v for v in off) / (stop - start)) if off else 0.0
            now[f"hbar_s{name}"] = math.sqrt(now["delta_mu"] * now[f"delta_sigma{name}"])
        now["pfail"] = 1 / (1 + math.exp(-min(max(lambda_ * (now["hbar_s"] - tau), -50), 50)))
        now["surprise"] = -math.log(min(max(p[token], 1e-10), 1))
        now["delta_h"] = 0.0 if before is None else 1 - min(max(u[-1] @ before, -1), 1)
        now["pri"] = now["surprise"] * (1 + alpha * now["delta_h"])
        return now, u[-1]

    def compute(logits, states, tokens, tau=2.0, lambda_=5.0, alpha=0.1, every=1):
        logits, states = np.asarray(logits, np.float64), np.asarray(states, np.float64)
        found, before = {}, None
        for t, token in enumerate(tokens):
            if (t + 1) % every == 0:
                now, before = one_step(logits[t], states[t], token, before, tau, lambda_, alpha)
                for name, value in now.items():
                    found.setdefault(name, np.full(len(tokens), np.nan))[t] = value
        return found

    return compute


@pytest.fixture(scope="session")
def assert_signals():
    """Equal within 1e-5 * max(1, |wanted|) at every step, NaN at the same ones; the largest deviation by name.

    Surprises are differences of logits and have the rounding of those: there it is the largest |wanted| of all steps.
    """

    def check(seen, wanted):
        largest = {}
        for name, values in wanted.items():
            scale = np.maximum(1, np.abs(values))
            scale = np.nanmax(scale, initial=1) if name in ("surprise", "pri") else scale
            np.testing.assert_allclose(seen[name] / scale, values / scale, rtol=0, atol=1e-5, err_msg=name)
            largest[name] = float(np.nanmax(np.abs(seen[name] - values) / scale, initial=0))
        return largest

    return check
