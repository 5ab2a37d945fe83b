"""Trains the models that are compared, all seeds of one together, and evaluates them on the same held-out text."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from experiments.lookahead import arms, evaluation
from experiments.lookahead.analysis import analyse
from experiments.lookahead.arms import CONFIDENCE, EQUAL_FLOPS, STANDARD, UNTOLD, Arm
from experiments.lookahead.config import ConfidenceExperimentConfig
from experiments.lookahead.data import ConfidenceData, prepare_confidence_data
from experiments.lookahead.results import (
    ConfidenceExperimentResults,
    ConfidenceTrainingResult,
    TrainingResult,
    save_results,
)
from nmjax.metrics.loss_prediction import quality
from nmjax.report import results
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import Metrics, make_schedule, train
from nmjax.training.sharding import gather, make_mesh

NAME = "confidence"
EVALUATION_SEED = 0  # of the choices that held-out tokens are followed by, the same for all models and steps
SAMPLE = 1000  # held-out tokens a seed that go into the results file
# Where results and checkpoints go, and what devices they come from, changes nothing in them but the last bits.
_FREE = ("results_dir", "save_interval", "checkpoint_interval", "mesh")


@dataclasses.dataclass
class Trained:
    """An arm after some of its steps: the history [dict of lists R], parameters [R, ...] and seconds so far.

    `tokens` [R] are the held-out ones that it has read at the end.
    """

    arm: Arm
    history: list[Metrics]
    params: Any
    seconds: float
    tokens: list[dict[str, np.ndarray]] | None = None

    def replica(self, r: int) -> Any:
        """Parameters of one seed."""
        return jax.tree.map(lambda leaf: leaf[r], self.params)


class Study:
    """One comparison, which can be killed and goes on.

    What it has done so far lies in `results_dir/run_<hash of what decides its numbers>`, until it is done.
    """

    def __init__(self, config: ConfidenceExperimentConfig, tokenizer: Any = None, progress: bool = True):
        """Reads the data. Raises ValueError for what can't be had or doesn't fit."""
        self.config, self.progress = config, progress
        several = jax.process_count() > 1
        self.mesh = make_mesh(config.mesh or "data=-1") if config.mesh or several else None
        self.writes = jax.process_index() == 0
        self.data: ConfidenceData = prepare_confidence_data(config, tokenizer)
        vocab, eos_id = self.data.vocab, self.data.tokenizer.eos_token_id
        standard, confidence = arms.standard_arm(config, vocab, eos_id), arms.confidence_arm(config, vocab, eos_id)
        self.arms = [standard, confidence]
        if config.untold and config.feedback != "zeros":
            self.arms.append(arms.untold_arm(config, vocab, eos_id))
        self.flops = {arm.name: arms.step_flops(config, arm) for arm in self.arms}
        if config.equal_flops:
            steps = config.training_steps * self.flops[CONFIDENCE] / self.flops[STANDARD]
            whole_calls = max(1, round(steps / config.scan)) * config.scan
            self.arms.append(dataclasses.replace(standard, name=EQUAL_FLOPS, steps=whole_calls))
            self.flops[EQUAL_FLOPS] = self.flops[STANDARD]
        plan = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
        # Intervals decide how many steps a compiled call takes, and so where a run can stop and go on.
        plan |= {"steps": {arm.name: arm.steps for arm in self.arms}, "steps_per_call": config.scan}
        self.plan = plan | {"data": self.data.fingerprint(), "versions": results.versions()}
        self.folder = pathlib.Path(config.results_dir) / f"run_{results.content_hash(self.plan)[:12]}"

    def run(self) -> tuple[ConfidenceExperimentResults, dict[str, Trained]]:
        """Trains, evaluates, analyses; the results, and the trained models by arm. Writes intermediate files only."""
        done: dict[str, Trained] = {}
        for arm in self.arms:
            done[arm.name] = self._train(arm, done)
        return self._results(done, analyse({name: trained.tokens or [] for name, trained in done.items()})), done

    def finish(self) -> None:
        """Removes the checkpoints, so that the next run of the same plan starts anew."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _train(self, arm: Arm, before: dict[str, Trained]) -> Trained:
        config = self.config
        clock = _Clock(self.folder / f"{arm.name}_seconds.json", self.writes)
        path = pathlib.Path(config.results_dir) / "intermediate_results.json"

        tokens = None

        def watch(history, params):
            nonlocal tokens
            step = history[-1]["step"]
            last = step == arm.steps
            clock.stop()
            if last or (config.eval_interval and step % config.eval_interval == 0):
                tokens = self._read(arm, params)
                history[-1] |= _summary(tokens)
            if self.writes and (last or step % config.save_interval == 0):
                so_far = before | {arm.name: Trained(arm, history, params, clock.seconds)}
                save_results(self._results(so_far), path)
            clock.start()

        clock.start()
        state, history = train(
            arm.loss,
            arm.initial_params(config.seeds),
            self.data.batches(config.batch_size, config.seeds),
            config.recipe(arm.steps),
            seeds=config.seeds,
            optimizer=arms.optimizer(config, arm.steps),
            carry=arm.carry,
            checkpoints=Checkpoints(self.folder / arm.name),
            progress=f"{arm.name}, {len(config.seeds)} seeds" if self.progress else False,
            watch=watch,
            mesh=self.mesh,
        )
        params = jax.device_get(state.params if self.mesh is None else gather(state.params))
        if tokens is None:  # it was done before this process began
            tokens = self._read(arm, params)
        return Trained(arm, history, params, clock.seconds, tokens)

    def _read(self, arm: Arm, params) -> list[dict[str, np.ndarray]]:
        return evaluation.held_out(arm, params, self.data.held_out, self.config.eval_draws, EVALUATION_SEED)

    def _results(self, done: dict[str, Trained], findings: dict[str, Any] | None = None) -> ConfidenceExperimentResults:
        """The results so far; with what the held-out tokens of all arms say, once they are there."""
        by_arm = {
            name: {str(seed): [self._result(trained, r, seed)] for r, seed in enumerate(self.config.seeds)}
            for name, trained in done.items()
        }
        config = dataclasses.asdict(self.config)
        hashes = {"data": self.plan["data"]}
        return ConfidenceExperimentResults(
            standard_model_results=by_arm.get(STANDARD, {}),
            confidence_model_results=by_arm.get(CONFIDENCE, {}),  # type: ignore[arg-type]
            untold_model_results=by_arm.get(UNTOLD, {}),  # type: ignore[arg-type]
            equal_flops_results=by_arm.get(EQUAL_FLOPS, {}),
            config=self.config,
            timestamp=results.timestamp(),
            training_time={name: trained.seconds for name, trained in done.items()},
            parameter_counts={arm.name: arm.parameters for arm in self.arms},
            flops_per_step=self.flops,
            data={
                "vocabulary": self.data.vocab,
                "training_tokens": len(self.data.train.stream),
                "held_out_tokens": self.data.held_out_tokens,
                "evaluated_tokens": sum(batch[:, 2:].size for batch in self.data.held_out),
            },
            findings=findings or {},
            identity=results.run_identity(NAME, config, {str(seed): seed for seed in self.config.seeds}, hashes),
        )

    def _result(self, trained: Trained, r: int, seed: int) -> TrainingResult:
        arm, history = trained.arm, [{k: v if k == "step" else v[r] for k, v in rec.items()} for rec in trained.history]
        schedule = make_schedule(self.config.recipe(arm.steps))
        evaluated = [
            {
                "step": record["step"],
                "flops": record["step"] * self.flops[arm.name],
                "lr": float(schedule(record["step"] - 1)),
                "train_loss": record["loss_lm"],
                "perplexity": math.exp(record["eval_loss"]),
                **{name: record[name] for name in record if name.startswith("eval_") or name in _SUMMARY},
            }
            for record in history
            if "eval_loss" in record
        ]
        losses = [record["eval_loss"] for record in evaluated]
        last, best = (losses[-1], min(losses)) if losses else (None, None)
        common = {
            "model_type": arm.name,
            "seed": seed,
            "final_train_loss": history[-1]["loss_lm"],
            "final_eval_loss": last,
            "final_perplexity": None if last is None else math.exp(last),
            "best_eval_loss": best,
            "best_perplexity": None if best is None else math.exp(best),
            "loss_history": evaluated,
            "token_loss_history": [record["loss_lm"] for record in history],
            "training_time": trained.seconds / len(self.config.seeds),
        }
        if arm.name not in (CONFIDENCE, UNTOLD):
            return TrainingResult(**common)
        sample: dict[str, list[float]] = {}
        if trained.tokens is not None:
            tokens = trained.tokens[r]
            chosen = np.random.default_rng(0).permutation(len(tokens["actual"]))[:SAMPLE]
            sample = {name: tokens[name][chosen].tolist() for name in ("predicted", "actual")}
        return ConfidenceTrainingResult(
            **common,
            confidence_loss_history=[record["loss_confidence"] for record in history],
            total_loss_history=[record["loss"] for record in history],
            confidence_predictions=[record["prediction"] for record in history],
            actual_future_losses=[record["future_loss"] for record in history],
            held_out_sample=sample,
        )


_SUMMARY = ("mse", "r2", "pearson", "told_error")


def _summary(tokens: list[dict[str, np.ndarray]]) -> Metrics:
    """Means over the held-out tokens of each replica, lists [R]."""
    by_seed = []
    for read in tokens:
        one = {f"eval_loss{name.removeprefix('token_loss')}": float(read[name].mean()) for name in read
               if name.startswith("token_loss")}  # fmt: skip
        if "predicted" in read:
            measured = quality(read["predicted"], read["actual"], read["wrong"], read["row"])
            one |= {name: measured[name] for name in ("mse", "r2", "pearson")}
        if "told_error" in read:
            one["told_error"] = float(read["told_error"].mean())
        by_seed.append(one)
    return {name: [one[name] for one in by_seed] for name in by_seed[0]}


class _Clock:
    """Seconds of training, evaluations left out, over all processes that took part; kept in a file."""

    def __init__(self, path: pathlib.Path, writes: bool):
        self.path, self.writes, self._started = path, writes, 0.0
        self.seconds: float = json.loads(path.read_text()) if path.exists() else 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._started
        if self.writes:
            results.write_json(self.path, self.seconds)
