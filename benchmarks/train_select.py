"""Train the scores of `halfmap select` from simulated classifications with known junk.

Simulates data sets of many structures with junk, classifies them (`select_data.py`), and fits two logistic
regressions: of a class, the share of its particles that are good; of a particle, whether it is good, from
its own numbers and the logit of its class. Limits are chosen, and figures given, on data sets that the
regressions were not fitted to, each left out in turn. Writes the weights with their record. See
docs/select.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfmap.engine import Context
from halfmap.io.images import ImageStack
from halfmap.steps.select.classification import Classification, read
from halfmap.steps.select.features import Features, class_features, particle_features
from halfmap.steps.select.images import NAMES, measure_images
from halfmap.steps.select.score import CLASS_LOGIT, WEIGHTS, Logistic, logit
from halfmap.steps.select.step import SelectStep
from select_data import SCENES, crowded, is_good, kinds, make

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
LOSS = 0.03
"""Share of the good particles that the limits may cost, as a mean over structures and data sets left out."""

DECAY = {"classes": 3.0, "particles": 10.0}
"""Inverse variances of the weights' priors."""


@dataclass(frozen=True, eq=False)
class Example:
    """One classification: where it is from, its features, and which particles are good."""

    scene: str
    found: Classification
    classes: Features
    particles: Features
    good: NDArray[np.bool_]
    kinds: NDArray[np.str_]


def load(scene: str, project: Path, job: Path) -> list[Example]:
    """Read a classification and its truth, with its particles as they were and in crowded micrographs."""
    found = read(SelectStep(model=job / "model.star"), Context(folder=job, project=project))
    names = kinds(project, job)
    rows = found.particles.rows
    diameter_px = found.diameter / found.pixel_size
    makers = {
        "images": lambda: torch.from_numpy(
            ImageStack(rows["rlnImageName"], root=project).read(np.arange(len(rows)))
        ),
        "crowded": lambda: crowded(scene, project, job),
    }
    examples = []
    for name, images in makers.items():
        kept = job / f"measured_{name}.npy"
        if not kept.exists():
            np.save(kept, measure_images(images(), diameter_px).double().numpy())
        features = particle_features(found, np.load(kept))
        examples.append(Example(scene, found, class_features(found), features, is_good(names), names))
    return examples


def joined(features: list[Features]) -> Features:
    """Features of several classifications as one, NaN where one lacks what another has."""
    names = sorted({name for one in features for name in one})
    lengths = [len(next(iter(one.values()))) for one in features]
    return {
        name: np.concatenate(
            [one.get(name, np.full(n, np.nan)) for one, n in zip(features, lengths, strict=True)]
        )
        for name in names
    }


def fit(features: Features, target: NDArray, weight: NDArray, decay: float) -> Logistic:
    """Logistic regression with a normal prior on the weights, by Newton's method."""
    names = tuple(sorted(features))
    values = np.stack([features[name] for name in names], axis=1)
    known = np.isfinite(values)
    mean = np.array([np.average(v[k], weights=weight[k]) for v, k in zip(values.T, known.T, strict=True)])
    square = np.where(known, (values - mean) ** 2, 0)
    deviation = np.sqrt(
        (square * weight[:, None]).sum(0) / np.maximum((known * weight[:, None]).sum(0), 1e-9)
    )
    model = Logistic(names, mean, np.maximum(deviation, 1e-3), np.zeros(len(names)), 0.0)
    z = np.column_stack([model.standardised(features), np.ones(len(target))])
    prior = np.full(z.shape[1], decay)
    prior[-1] = 0.0
    beta = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(z @ beta, -30, 30)))
        gradient = z.T @ (weight * (target - p)) - prior * beta
        hessian = (z * (weight * p * (1 - p))[:, None]).T @ z + np.diag(prior + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        beta += step * min(1.0, 2.0 / np.abs(step).max())
        if np.abs(step).max() < 1e-6:
            break
    return Logistic(names, model.mean, model.deviation, beta[:-1], float(beta[-1]))


def fit_classes(examples: list[Example]) -> Logistic:
    """Fit the score of classes; a class weighs as the root of its members."""
    target, weight = [], []
    for one in examples:
        inside = one.found.members
        share = np.bincount(one.found.number, one.good, minlength=len(inside)) / np.maximum(inside, 1)
        target.append(share)
        weight.append(np.sqrt(inside) / np.sqrt(inside).mean())
    features = joined([one.classes for one in examples])
    return fit(features, np.concatenate(target), np.concatenate(weight), DECAY["classes"])


def with_class(example: Example, scores: NDArray, *, seen: bool) -> Features:
    """Features of the particles with the logit of their class, and with or without those of their images."""
    own = {name: v for name, v in example.particles.items() if seen or not name.startswith(NAMES)}
    return {**own, CLASS_LOGIT: logit(scores)[example.found.number]}


def fit_particles(examples: list[Example], scores: list[NDArray], *, seen: bool) -> Logistic:
    """Fit the score of particles."""
    features = joined([with_class(*pair, seen=seen) for pair in zip(examples, scores, strict=True)])
    target = np.concatenate([one.good for one in examples]).astype(float)
    weight = np.concatenate([evened(one) for one in examples])
    return fit(features, target, weight, DECAY["particles"])


def evened(example: Example) -> NDArray:
    """Weights of the particles with which all structures count the same, and junk as much as it does."""
    weight = np.ones(len(example.kinds))
    structures, counts = np.unique(example.kinds[example.good], return_counts=True)
    for name, count in zip(structures, counts, strict=True):
        weight[example.kinds == name] = counts.sum() / len(counts) / count
    return weight


def class_scores(examples: list[Example]) -> list[NDArray]:
    """Scores of classes by regressions that have not seen their data set."""
    result = []
    for one in examples:
        model = fit_classes([other for other in examples if other.scene != one.scene])
        result.append(np.where(one.found.members > 0, model(one.classes), 0.0))
    return result


def particle_scores(examples: list[Example], classes: list[NDArray], *, seen: bool) -> list[NDArray]:
    """Scores of particles by regressions that have not seen their data set."""
    result = []
    for one, scores in zip(examples, classes, strict=True):
        rest = [i for i, other in enumerate(examples) if other.scene != one.scene]
        model = fit_particles([examples[i] for i in rest], [classes[i] for i in rest], seen=seen)
        result.append(model(with_class(one, scores, seen=seen)))
    return result


def rates(example: Example, kept: NDArray, *, even: bool = False) -> tuple[float, float]:
    """Shares of good particles lost, all structures counting the same if wanted, and of junk rejected."""
    weight = evened(example) if even else np.ones(len(kept))
    lost = np.average(~kept[example.good], weights=weight[example.good])
    return float(lost), float((~kept[~example.good]).mean())


def kept_by(example: Example, classes: NDArray, particles: NDArray, limits: tuple[float, float]) -> NDArray:
    """Particles that limits on the two scores keep."""
    return (classes[example.found.number] >= limits[0]) & (particles >= limits[1])


def mean_rates(
    examples: list[Example], classes: list[NDArray], particles: list[NDArray], limits: tuple[float, float]
) -> NDArray:
    """Shares of good particles lost, as means over structures, and of junk rejected, over classifications."""
    pairs = [
        rates(one, kept_by(one, c, p, limits), even=True)
        for one, c, p in zip(examples, classes, particles, strict=True)
    ]
    return np.mean(pairs, axis=0)


def best_limits(
    examples: list[Example], classes: list[NDArray], particles: list[NDArray], lows: NDArray
) -> tuple[float, float]:
    """Limits that reject most junk while good particles are lost no more often than `LOSS`."""
    best, found = -1.0, (0.0, 0.0)
    for low in lows:
        for limit in np.arange(0, 0.96, 0.02):
            lost, rejected = mean_rates(examples, classes, particles, (low, limit))
            if lost <= LOSS and rejected > best + 1e-9:
                best, found = float(rejected), (float(low), float(limit))
    return round(found[0], 3), round(found[1], 3)


def area(score: NDArray, good: NDArray) -> float:
    """Area under the curve of true over false positives."""
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    n = int(good.sum())
    return float((rank[good].sum() - n * (n + 1) / 2) / (n * (len(good) - n)))


def report(
    examples: list[Example], classes: list[NDArray], particles: list[NDArray], limits: tuple[float, float]
) -> list[dict[str, Any]]:
    """Figures of every classification, scored by regressions that have not seen its data set."""
    rows = []
    for one, c, p in zip(examples, classes, particles, strict=True):
        members = one.found.members
        share = np.bincount(one.found.number, one.good, minlength=len(members)) / np.maximum(members, 1)
        right = ((c >= 0.5) == (share >= 0.5))[members > 0]
        kept, by_class = kept_by(one, c, p, limits), kept_by(one, c, p, (limits[0], 0.0))
        row = {"data": one.scene, "classes": len(members), "junk": float((~one.good).mean())}
        row |= {"classes right": float(right.mean()), "AUC by class": area(c[one.found.number], one.good)}
        row["AUC"] = area(p, one.good)
        for name, mask in (("", kept), (" by class", by_class)):
            row[f"good lost{name}"], row[f"junk rejected{name}"] = rates(one, mask)
        row["good lost, structures even"] = rates(one, kept, even=True)[0]
        lost = [float((~kept[one.kinds == kind]).mean()) for kind in np.unique(one.kinds[one.good])]
        row["good lost of the worst structure"] = max(lost)
        row["good lost expected"] = float(p[~kept].sum() / p.sum())
        for kind in np.unique(one.kinds[~one.good]):
            row[f"{kind} rejected"] = float((~kept[one.kinds == kind]).mean())
        rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    names = [key for key in rows[0] if key not in ("data", "classes")]
    means = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in names}
    return [*rows, {"data": "mean", **means}]


def train(examples: list[Example]) -> dict[str, Any]:
    """Fit, choose limits, and give the record with all weights and figures."""
    classes = class_scores(examples)
    record: dict[str, Any] = {"kind": "select", "version": 1, "data": described(examples)}
    particles = particle_scores(examples, classes, seen=True)
    low, limit = best_limits(examples, classes, particles, np.arange(0, 0.9, 0.025))
    unseen = particle_scores(examples, classes, seen=False)
    _, limit_unseen = best_limits(examples, classes, unseen, np.array([low]))
    record["left out"] = report(examples, classes, particles, (low, limit))
    record["left out, images unseen"] = report(examples, classes, unseen, (low, limit_unseen))
    record["classes"] = {"min_score": low, **fit_classes(examples).record()}
    for name, seen, least in (("particles", True, limit), ("particles_unseen", False, limit_unseen)):
        record[name] = {"min_score": least, **fit_particles(examples, classes, seen=seen).record()}
    return record


def described(examples: list[Example]) -> dict[str, Any]:
    """What was trained on."""
    names = sorted({one.scene for one in examples})
    found = {id(one.found): one.found for one in examples}.values()
    return {
        "structures": {name: [model.split(".")[0] for model in SCENES[name].models] for name in names},
        "classifications": len(found),
        "classes": int(sum((one.members > 0).sum() for one in found)),
        "particles": sum(len(one.number) for one in found),
    }


def main() -> None:
    """Make the data, train, write the record, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for simulated data")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the atomic models")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file of weights to write")
    parser.add_argument("--runs", type=int, default=2, help="classifications of each data set")
    parser.add_argument("--have", action="store_true", help="take the data sets that are there")
    arguments = parser.parse_args()
    examples = []
    for scene in SCENES:
        folder = arguments.scratch / scene
        if arguments.have:
            jobs = sorted(path.parent for path in folder.glob("Class2D/*/RELION_JOB_EXIT_SUCCESS"))
        else:
            jobs = make(scene, folder.parent, arguments.models, arguments.runs)
        examples += [one for job in jobs for one in load(scene, folder, job)]
    record = train(examples)
    for row in record["left out"] + record["left out, images unseen"]:
        print(json.dumps(row))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
