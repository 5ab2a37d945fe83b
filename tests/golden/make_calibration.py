"""Makes tests/golden/calibration.json: seeded answers and what other packages say of their calibration.

    pip install scikit-learn netcal==1.4.0 torchmetrics==1.9.0 relplot==1.0.3
    python tests/golden/make_calibration.py

Only what is defined as ours is kept. Not kept, because it is something else:
  * netcal's ACE, the mean gap of the bins that are not empty (Neumann et al. 2018), each with the same weight;
  * netcal's equal-mass ECE of tied confidences: its bins are [lo, hi) and part ties from their quantile;
  * anything of confidences on a bin's edge, for bins are [lo, hi) in netcal and torchmetrics and (lo, hi] in ours; and
    of confidence 1, which torchmetrics gives a bin of its own. `main` sees to it that there are none;
  * relplot's smooth ECE of confidences within 0.001 of 0 or 1, which it counts by half (`nmjax.metrics.smooth`).
relplot integrates on 200 points. Its values at fixed bandwidths are made on 20 001, to compare the kernels closely.
torchmetrics computes in float32.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import relplot
import torch
from netcal.metrics import ECE, MCE
from sklearn import metrics as sk_metrics
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

GOLDEN = Path(__file__).parent / "calibration.json"
PACKAGES = ("netcal", "torchmetrics", "torch", "relplot", "scikit-learn", "numpy")
N, C = 210, 4  # N is a multiple of 10 and 15, so all definitions of a quantile part the same answers
BINS = (10, 15)
BANDWIDTHS = (0.02, 0.05, 0.1)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def draw(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    return np.minimum((rng.random((len(truth), 1)) > truth.cumsum(axis=1)).sum(axis=1), C - 1)


def rounded(probs: np.ndarray) -> np.ndarray:
    """Six decimals, and rows that still sum to 1."""
    short = np.round(probs[:, :-1], 6)
    return np.concatenate([short, np.round(1 - short.sum(axis=1, keepdims=True), 6)], axis=1)


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(20)
    z = 1.5 * rng.normal(size=(N, C))
    well = softmax(z), draw(rng, softmax(z))
    z = rng.normal(size=(N, C))
    over = softmax(2.0 * z), draw(rng, softmax(0.8 * z))
    # Seven confidences, each held by about thirty answers.
    top = rng.choice([0.37, 0.43, 0.52, 0.64, 0.77, 0.86, 0.97], size=N)[:, None]
    tied = np.concatenate([top, (1 - top) * [0.52, 0.31, 0.17]], axis=1)
    tied = rng.permuted(rounded(tied), axis=1)
    # Nearly all above 0.85, a few about 0.33, nothing between.
    top = np.where(rng.random(N) < 0.93, rng.uniform(0.85, 0.995, N), rng.uniform(0.31, 0.36, N))[:, None]
    skewed = rng.permuted(np.concatenate([top, (1 - top) * [0.4, 0.33, 0.27]], axis=1), axis=1)
    return {
        "calibrated": well,
        "overconfident": over,
        "tied": (tied, draw(rng, softmax(0.8 * np.log(tied)))),
        "skewed": (skewed, draw(rng, softmax(0.6 * np.log(skewed)))),
    }


def measure(name: str, probs: np.ndarray, labels: np.ndarray) -> dict:
    confidence, correct = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    tensors = torch.tensor(probs), torch.tensor(labels)
    classes = [(probs[:, c], (labels == c).astype(int)) for c in range(C)]

    def top_label(norm: str) -> dict[str, float]:
        return {str(b): float(multiclass_calibration_error(*tensors, C, n_bins=b, norm=norm)) for b in BINS}

    def binary(p: np.ndarray, y: np.ndarray, n_bins: int) -> float:
        return float(binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=n_bins, norm="l1"))

    netcal = {
        "ece": {str(b): float(ECE(b).measure(probs, labels)) for b in BINS},
        "mce": {str(b): float(MCE(b).measure(probs, labels)) for b in BINS},
        "classwise_ece": {str(b): float(np.mean([ECE(b).measure(p, y) for p, y in classes])) for b in BINS},
    }
    if name != "tied":
        netcal["ece_equal_mass"] = {str(b): float(ECE(b, equal_intervals=False).measure(probs, labels)) for b in BINS}
    relplot.config.smECE_mesh_pts = 200
    smooth = float(relplot.smECE(confidence, correct))
    relplot.config.smECE_mesh_pts = 20_001
    at = {str(s): float(relplot.smECE_sigma(confidence, correct, s)) for s in BANDWIDTHS}
    return {
        "probs": probs.tolist(),
        "labels": labels.tolist(),
        "netcal": netcal,
        "torchmetrics": {
            "l1": top_label("l1"),
            "max": top_label("max"),
            "l2": top_label("l2"),
            "classwise_l1": {str(b): float(np.mean([binary(p, y, b) for p, y in classes])) for b in BINS},
        },
        "relplot": {"smece": smooth, "smece_sigma": at},
        "scikit-learn": {
            "brier_score_loss": float(sk_metrics.brier_score_loss(correct, confidence)),
            "log_loss": float(sk_metrics.log_loss(labels, probs)),
            "roc_auc_score": float(sk_metrics.roc_auc_score(correct, confidence)),
            "average_precision_score": float(sk_metrics.average_precision_score(correct, confidence)),
        },
    }


def main() -> None:
    measured = {}
    for name, (probs, labels) in cases().items():
        probs = rounded(probs)
        edges = np.unique([k / b for b in BINS for k in range(b + 1)])
        assert np.abs(probs[..., None] - edges).min() > 3e-7, f"{name}: a probability on a bin's edge"
        assert probs.max() < 0.999, f"{name}: a confidence that relplot counts by half"
        measured[name] = measure(name, probs, labels)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    GOLDEN.write_text(json.dumps({"versions": versions, "cases": measured}) + "\n")


if __name__ == "__main__":
    main()
