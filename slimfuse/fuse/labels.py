"""What the fused head shall give: from the parents' logits to goals over the target's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from slimfuse.errors import ParentError

Evidence = Literal["energy", "span", "norm"]
KINDS: tuple[Evidence, ...] = ("energy", "span", "norm")  # the order of the first signs
Share = tuple[Tensor, float | Tensor]
ROUNDS = 2  # of co-training; further ones let the discriminant forget what the parents know
FLOOR = 0.03  # the least probability that an image is of a parent's classes: bounds the goals
SHRINK = 0.02  # of the discriminant's covariance towards its mean diagonal
STRENGTH = 2.0  # log-odds that a parent gains by a standard deviation of the first evidence
TINY = 1e-12  # beside sums of squares and of shares that may vanish


class Goals(Protocol):
    """A rule that turns the parents' logits into goals for the head.

    shares: for each parent, the target's classes (places) that its own classes are, and its
    weight in them: what its head gives to the prior.
    """

    @property
    def shares(self) -> Sequence[Share]:
        """Places (c_p,) of the parent's classes and its weight, one or (c_p, 1), for each."""

    def __call__(
        self, scores: Sequence[Tensor], features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return goals (n, classes) from each parent's logits (n, c_p) and features (n, d_p)."""


class MeanLogits:
    """The weighted mean of logits over the same classes: of log-probabilities, up to a shift."""

    def __init__(self, weights: Sequence[float], classes: int) -> None:
        total = sum(weights)
        self.shares = [(torch.arange(classes), w / total) for w in weights]

    def __call__(
        self, scores: Sequence[Tensor], features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return Σ w_p logits_p (n, classes); features don't matter."""
        parts = [w * s for (_, w), s in zip(self.shares, scores, strict=True)]
        return torch.stack(parts).sum(0)


def mean_shares(goals: Goals) -> list[float]:
    """Return the parents' weights in the mean of their logits; raises ParentError for other goals.

    Heads over a vocabulary make no logits, so they can follow no other rule.
    """
    if not isinstance(goals, MeanLogits):
        raise ParentError(
            "heads over a vocabulary follow the mean of their parents' logits only",
            got=type(goals).__name__,
            hint="give parents of one vocabulary",
        )
    return [float(weight) for _, weight in goals.shares]


class LabelUnion:
    """Parents that know different classes, as one classifier of all, fitted without labels.

    With r_p(x) the probability that the class of x is among those of parent p, the goal of class c
    is the weighted mean, over the parents that know c, of log softmax(z_p)_c + log max(r_p, FLOOR),
    centred over the classes. Parents of the same classes have r_p = 1: their mean
    log-probabilities. A parent of other classes can't tell so by its own softmax, so r_p is found
    by co-training (Blum and Mitchell 1998) on two views of the same unlabelled images:
    - *evidence*: how each parent reacts. Of its centred last features the log energy inside and
      outside the span of its head (an image that it knows moves them inside: null space analysis,
      see ViM, arXiv 2203.10807, section 3) and of both, log Σ exp of its logits (arXiv
      2010.02759), the log of its largest probability;
    - *discriminant*: where the parents' features, side by side, lie: a linear discriminant over
      all classes, which also uses what a parent tells of classes that it never learnt.
    The first evidence labels the images softly; then each view is fitted to the other's labels,
    `rounds` times; r_p comes from their mean log-posterior. Of the first evidences to choose from,
    the one is taken whose labels a discriminant, fitted to half of the images, restates most often
    on the other half.
    """

    def __init__(
        self,
        places: Sequence[Tensor],
        weights: Sequence[float],
        classes: int,
        views: _Views | None,
    ) -> None:
        self._known, self.classes, self._views = _Classes(places, weights, classes), classes, views

    @classmethod
    def fit(
        cls,
        scores: Sequence[Tensor],
        places: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        classes: int | None = None,
        features: Sequence[Tensor] | None = None,
        evidence: Evidence | None = None,
        rounds: int = ROUNDS,
    ) -> LabelUnion:
        """Return the union calibrated on the parents' answers to the same unlabelled images.

        scores: logits (n, c_p). places: for each parent the places (c_p,) of its classes among the
        target's `classes` (by default one more than the largest place). features: (n, d_p), what
        each parent's head reads; without them the views see logits only, which is worse. evidence:
        the first one, chosen by agreement where None; without features "energy". rounds: 0 leaves
        the first evidence and the discriminant fitted to it. Some hundreds of images are needed for
        a sure choice of the evidence. Deterministic.
        Raises ParentError if the parents don't cover the classes, answer with nan or inf, or the
        images are too few.
        """
        classes = 1 + max(int(p.max()) for p in places) if classes is None else classes
        weights = [1.0] * len(places) if weights is None else weights
        known = _Classes(places, weights, classes)
        if known.equal:
            return cls(places, weights, classes, None)
        answers = _answers(scores, features)
        for p, answer in enumerate(answers):
            if not all(bool(x.isfinite().all()) for x in answer):
                raise ParentError(
                    "a parent's logits or features are not finite",
                    got=f"nan or inf from parent {p} (from 0)",
                    hint="run it in float32; check its weights and the images' normalisation",
                )
        need = 2 * max(classes, *(x.shape[1] for _, x in answers))
        if len(answers[0][0]) < need:
            raise ParentError(
                "too few unlabelled images to tell which parent knows what",
                got=len(answers[0][0]),
                allowed=f"at least {need}: twice the widest parent's features and the classes",
                hint="give calibration more samples",
            )
        views = _Views.fit(known, answers, features is not None, evidence, rounds)
        return cls(places, weights, classes, views)

    @property
    def shares(self) -> Sequence[Share]:
        """Places (c_p,) of each parent's classes and its share, (c_p, 1) where shares differ."""
        return [(p, float(w[0]) if bool((w == w[0]).all()) else w) for p, w in self._known.shares]

    @property
    def evidence(self) -> Evidence | None:
        """The evidence that co-training began with; None for equal label sets."""
        return None if self._views is None else self._views.evidence

    def knows(self, scores: Sequence[Tensor], features: Sequence[Tensor] | None = None) -> Tensor:
        """Return r_p (n, parents), float64: P(the image's class is one of parent p's)."""
        if self._views is None:
            return scores[0].new_ones(len(scores[0]), len(scores), dtype=torch.float64)
        assert (features is not None) == self._views.featured, "fitted and asked with other inputs"
        return self._views.knows(self._known, _answers(scores, features)).to(scores[0].device)

    def __call__(
        self, scores: Sequence[Tensor], features: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return centred goals (n, classes), float64."""
        gates = self.knows(scores, features).clamp_min(FLOOR).log()
        goals = self._known.mix(scores, gates)
        return goals - goals.mean(1, keepdim=True)

    def probabilities(
        self,
        scores: Sequence[Tensor],
        features: Sequence[Tensor] | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return soft targets softmax(goals / temperature) (n, classes), float64."""
        return torch.softmax(self(scores, features) / temperature, 1)


class _Classes:
    """Which parent knows which of the classes, and its share in each."""

    def __init__(self, places: Sequence[Tensor], weights: Sequence[float], classes: int) -> None:
        assert len(places) == len(weights) > 0, "a weight for every parent"
        assert all(w > 0 for w in weights), "weights are positive"
        total = torch.zeros(classes, dtype=torch.float64)
        for p, w in zip(places, weights, strict=True):
            assert p.ndim == 1 and len(p.unique()) == len(p), "a parent's places are distinct"
            assert set(p.tolist()) <= set(range(classes)), "places are among the classes"
            total[p.cpu()] += w
        if not bool((total > 0).all()):
            raise ParentError(
                "no parent knows some of the classes",
                got=f"classes without a parent: {(total == 0).nonzero().flatten().tolist()}",
                hint="add a parent that was trained on them, or take them out of the target",
            )
        self.classes, self.places = classes, [p.cpu() for p in places]
        self.equal = all(len(p) == classes for p in places)
        self.shares = [
            (p, (w / total[p])[:, None]) for p, w in zip(self.places, weights, strict=True)
        ]

    def mix(self, scores: Sequence[Tensor], gates: Tensor) -> Tensor:
        """Return log softmax(z_p) + gate_p (n, classes), the mean over who knows c."""
        mixed = scores[0].new_zeros(len(scores[0]), self.classes, dtype=torch.float64)
        for p, (places, share) in enumerate(self.shares):
            assert scores[p].shape[1] == len(places), "a logit for every class of the parent"
            logs = torch.log_softmax(scores[p].double(), 1) + gates[:, p, None]
            mixed[:, places.to(mixed.device)] += share.T.to(mixed.device) * logs
        return mixed

    def masses(self, posterior: Tensor) -> Tensor:
        """Return the sum (n, parents) of a posterior (n, classes) over each parent's classes."""
        return torch.stack([posterior[:, p].sum(1) for p in self.places], 1)


Answers = Sequence[tuple[Tensor, Tensor]]


def _answers(scores: Sequence[Tensor], features: Sequence[Tensor] | None) -> Answers:
    """Return each parent's (logits, features) in float64; logits are the features if need be."""
    features = scores if features is None else features
    assert len(features) == len(scores), "features of every parent"
    pairs = [
        (z.detach().cpu().double(), f.detach().cpu().double())
        for z, f in zip(scores, features, strict=True)
    ]
    assert len({len(x) for pair in pairs for x in pair}) == 1, "parents saw different images"
    return pairs


@dataclass(frozen=True)
class _Reaction:
    """How one parent reacts to an image: see the evidence view of `LabelUnion`."""

    centre: Tensor
    span: Tensor
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, logits: Tensor, features: Tensor) -> _Reaction:
        centre = features.mean(0)
        # logits are linear in the features: their slope is the head
        slope = torch.linalg.lstsq(features - centre, logits - logits.mean(0), driver="gelsd")
        head = slope.solution - slope.solution.mean(1, keepdim=True)
        span = torch.linalg.svd(head, full_matrices=False).U[:, : max(1, logits.shape[1] - 1)]
        one = torch.ones((), dtype=torch.float64)
        raw = cls(centre, span, 0 * one, one).signs(logits, features)
        return cls(centre, span, raw.mean(0), raw.std(0) + TINY)

    def signs(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return standardised signs (n, 6): energy, span, norm, then those of the logistic only."""
        moved = features - self.centre
        inside = (moved @ self.span).square().sum(1)
        whole = moved.square().sum(1)
        outside = (whole - inside).clamp_min(0)
        logs = [(x + TINY).log() for x in (inside, outside, whole)]
        energy = logits.logsumexp(1)
        sure = torch.log_softmax(logits, 1).amax(1)
        signs = torch.stack([energy, logs[0] - logs[1], logs[2], logs[0], logs[1], sure], 1)
        return (signs - self.mean) / self.scale


@dataclass(frozen=True)
class _Linear:
    """log-odds or log-posteriors (n, k) = x @ weight + bias."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    @classmethod
    def discriminant(cls, x: Tensor, labels: Tensor) -> _Linear:
        """Return the linear discriminant of soft labels (n, k), its covariance shrunk."""
        counts = labels.sum(0) + TINY
        means = labels.T @ x / counts[:, None]
        prior = counts / counts.sum()
        within = x.T @ x / len(x) - means.T @ (prior[:, None] * means)
        spread = within.diagonal().mean() + TINY
        within = (1 - SHRINK) * within + SHRINK * spread * torch.eye(len(within), dtype=x.dtype)
        weight = torch.linalg.solve(within, means.T)
        return cls(weight, prior.log() - 0.5 * (means.T * weight).sum(0))

    @classmethod
    def logistic(cls, x: Tensor, shares: Tensor) -> _Linear:
        """Return one logistic regression for each column of soft labels (n, k)."""
        twice, yes = torch.cat([x, x]).numpy(), [1] * len(x) + [0] * len(x)
        found = []
        for share in shares.T:
            # a soft label is two rows, yes and no, with their shares as weights
            rows = torch.cat([share, 1 - share]).clamp_min(TINY).numpy()
            model = LogisticRegression(solver="newton-cholesky", tol=1e-8)
            found.append(model.fit(twice, yes, rows))
        weight = torch.stack([torch.from_numpy(m.coef_[0]) for m in found], 1)
        return cls(weight, torch.stack([torch.as_tensor(m.intercept_[0]) for m in found]))


@dataclass(frozen=True)
class _Senses:
    """What both views see of the images, fitted before any of them is labelled."""

    reactions: tuple[_Reaction, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def fit(cls, answers: Answers) -> _Senses:
        reactions = tuple(_Reaction.fit(z, f) for z, f in answers)
        moved = [f - r.centre for (_, f), r in zip(answers, reactions, strict=True)]
        return cls(reactions, tuple(x.square().mean().sqrt() + TINY for x in moved))

    def __call__(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return the features side by side (n, Σ d_p), each parent's of mean square 1, and signs.

        The signs are (n, parents, 6).
        """
        each = list(zip(self.reactions, self.scales, answers, strict=True))
        beside = torch.cat([(f - r.centre) / scale for r, scale, (_, f) in each], 1)
        return beside, torch.stack([r.signs(z, f) for r, _, (z, f) in each], 1)


@dataclass(frozen=True)
class _Views:
    """Both views of the images, fitted to each other; gate: None before the first round."""

    senses: _Senses
    featured: bool
    evidence: Evidence
    discriminant: _Linear
    gate: _Linear | None = None

    @classmethod
    def fit(
        cls, known: _Classes, answers: Answers, featured: bool, evidence: Evidence | None,
        rounds: int,
    ) -> _Views:  # fmt: skip
        senses, scores = _Senses.fit(answers), [z for z, _ in answers]
        beside, signs = senses(answers)
        kinds = (KINDS if featured else KINDS[:1]) if evidence is None else (evidence,)
        starts = [known.mix(scores, _first(signs, kind)).softmax(1) for kind in kinds]
        best = max(range(len(kinds)), key=lambda i: _restated(beside, starts[i]))
        views = cls(senses, featured, kinds[best], _Linear.discriminant(beside, starts[best]))
        for turn in range(rounds):
            if turn:
                labels = known.mix(scores, views._gates(signs)).softmax(1)
                views = replace(views, discriminant=_Linear.discriminant(beside, labels))
            shares = known.masses(views.discriminant(beside).softmax(1))
            views = replace(views, gate=_Linear.logistic(signs.flatten(1), shares))
        return views

    def _gates(self, signs: Tensor) -> Tensor:
        if self.gate is None:
            return _first(signs, self.evidence)
        return nn.functional.logsigmoid(self.gate(signs.flatten(1)))

    def knows(self, known: _Classes, answers: Answers) -> Tensor:
        """Return r_p (n, parents) from the mean of both views' log-posteriors."""
        beside, signs = self.senses(answers)
        told = known.mix([z for z, _ in answers], self._gates(signs)).log_softmax(1)
        return known.masses((0.5 * (told + self.discriminant(beside).log_softmax(1))).softmax(1))


def _first(signs: Tensor, kind: Evidence) -> Tensor:
    return STRENGTH * signs[:, :, KINDS.index(kind)]


def _restated(beside: Tensor, labels: Tensor) -> float:
    """Return how often a discriminant of one half of the images repeats the other's labels."""
    right = 0
    for held in (0, 1):
        found = _Linear.discriminant(beside[1 - held :: 2], labels[1 - held :: 2])
        told = found(beside[held::2]).argmax(1)
        right += int((told == labels[held::2].argmax(1)).sum())
    return right / len(labels)
