"""What the numbers read off a model amount to: metrics, pure functions, and columns of them.

Per-token means are in nats and include the end token unless said otherwise. Scores is measure.py's.
"""
import math
import re

import numpy as np
import torch
from scipy.stats import ks_2samp, rankdata

import etw

OU_EPSILON = 1e-10  # what OpenUnlearning adds to the correct answer's probability in a truth ratio


# ---- Metrics: float64 numpy in, float64 numpy out


def probability(nll, wrong_nll=None):
    """exp(−nll), (n,); with options, wrong_nll (n, k), p / (p + Σ p_wrong) (TOFU)."""
    p = np.exp(-np.asarray(nll, np.float64))
    return p if wrong_nll is None else p / (p + np.exp(-np.asarray(wrong_nll, np.float64)).sum(-1))


def truth_ratio(paraphrased_nll, perturbed_nll, epsilon=0.0):
    """Wrong over correct, (n,): exp(nll of the correct answer − mean nll of the k wrong ones).

    paraphrased_nll (n,), perturbed_nll (n, k), nats a token. The wrong ones' mean is geometric, as
    in TOFU's code; equation 1 of its paper, arXiv 2401.06121, has the arithmetic one.
    epsilon: added to the probability of the correct answer, as OpenUnlearning does.
    """
    correct = np.asarray(paraphrased_nll, np.float64)
    wrong = np.asarray(perturbed_nll, np.float64).mean(-1)
    with np.errstate(over="ignore"):  # a model that fell apart: infinity says so
        return np.exp(-wrong) / (np.exp(-correct) + epsilon) if epsilon else np.exp(correct - wrong)


def forget_quality(ratios, reference_ratios):
    """p-value of the Kolmogorov-Smirnov test between truth ratios of two models (TOFU)."""
    samples = np.asarray(ratios, np.float64), np.asarray(reference_ratios, np.float64)
    return np.float64(ks_2samp(*samples).pvalue)


def model_utility(values):
    """Harmonic mean of probability, ROUGE and truth ratio over the utility sets; 0 if one is 0."""
    values = np.asarray(values, np.float64)
    return np.float64(0) if (values <= 0).any() else len(values) / (1 / values).sum()


def rouge_l_recall(prediction, reference):
    """Longest common subsequence of words over the reference's words.

    Words are the matches of \\w+ in lower case; they are not stemmed (TOFU stems).
    """
    predicted, words = (re.findall(r"\w+", s.lower()) for s in (prediction, reference))
    best = [0] * (len(predicted) + 1)  # best[j]: of the words so far and predicted[:j]
    for word in words:
        diagonal = 0
        for j, other in enumerate(predicted, 1):
            longer = diagonal + 1 if word == other else max(best[j], best[j - 1])
            diagonal, best[j] = best[j], longer
    return np.float64(best[-1] / len(words) if words else 0)


def extraction_strength(hits):
    """1 − k/n, k the first token from which argmax gets the rest right; 0 if there is none."""
    misses = np.flatnonzero(~np.asarray(hits, bool))
    return np.float64(1 - (misses[-1] + 1) / len(hits) if len(misses) else 1)


def min_k(logprobs, share=0.4):
    """Min-K membership score: −mean of the lowest max(1, ⌊share · n⌋) log-probabilities."""
    return -np.sort(np.asarray(logprobs, np.float64))[:max(1, int(share * len(logprobs)))].mean()


def roc_auc(positive, negative):
    """Probability that a positive's score is above a negative's, ties counting half."""
    n, m = len(positive), len(negative)
    if not n * m:
        return np.float64(np.nan)
    ranks = rankdata(np.concatenate([positive, negative]).astype(np.float64))
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def priv_leak(auc, reference_auc):
    """((1 − AUC) − (1 − AUC_ref)) / (1 − AUC_ref) · 100 (arXiv 2407.06460); 0: as if never seen."""
    if reference_auc == 1:
        return np.float64(np.nan)
    return 100 * (reference_auc - auc) / (1 - reference_auc)


# ---- Columns


def summarise(scores, target=None, reference=None):
    """The measurements of one model, {column: float or None}, from {set: Scores}. And inside()'s.

    Sets: forget, holdout (never taught), and any others, the utility sets. target: the measurements
    of the model that unlearning started from; reference: {set: Scores} of the retrained model. A
    column is absent where its set, target or reference is; None where the rows do not allow it.

    SET probability     exp(−mean NLL) a row; where wrong answers are options, its share among them
    SET rouge           ROUGE-L recall of the greedy answer
    SET truth_ratio     R, wrong over correct: mean min(R, 1/R) of forget, else mean max(0, 1 − R)
    forget memorised    share of answer tokens that greedy argmax gets right; no end token
    forget extraction   1 − k/n, k the first token from which the rest is right; no end token
    model utility       harmonic mean of the three columns of every utility set
    utility lost        model utility lost against the target, in points (× 100)
    forget quality      p-value of the Kolmogorov-Smirnov test between R and the retrained model's R
    -log10 FQ           0 is best
    FQ (OU)             the same where R is OpenUnlearning's: 1e-10 added to the correct probability
    Min-K AUC           ROC-AUC with which Min-K tells the holdout from the forget set; no end token
    PrivLeak            that AUC against the retrained model's, relative, in percent
    weights AUC         ROC-AUC with which ETW's weights tell informative tokens from the others
    """
    result, utility = {}, []
    for name, own in scores.items():
        if name == "holdout":
            continue
        ratios = np.array(there(own.truth_ratio), np.float64)
        with np.errstate(divide="ignore"):
            good = np.minimum(ratios, 1 / ratios) if name == "forget" else (1 - ratios).clip(0)
        means = {"probability": average(own.probability), "rouge": average(own.rouge),
                 "truth_ratio": average(good)}
        if name == "forget":
            means |= {"memorised": average(own.memorised), "extraction": average(own.extraction)}
        else:
            utility += there(means.values())
        result |= {f"{name} {key}": value for key, value in means.items()}
    result["model utility"] = float(model_utility(utility)) if utility else None
    if target and utility:
        result["utility lost"] = 100 * (target["model utility"] - result["model utility"])
    if "forget" in scores:
        result |= against_retrained(scores, reference or {})
        result["weights AUC"] = weights_auc(scores["forget"], names=["etw"])["etw"]
    return result | inside(scores, reference or {})


def against_retrained(scores, reference):
    """Forget quality, its two forms, and membership inference."""
    result = {}
    if "forget" in reference:
        pairs = scores["forget"], reference["forget"]
        ratios = [there(own.truth_ratio) for own in pairs]
        if all(ratios):
            result["forget quality"] = float(forget_quality(*ratios))
            result["-log10 FQ"] = -math.log10(max(result["forget quality"], 5e-324)) + 0.0
            wrong = [np.reshape(there(own.wrong_nll), (-1, 1)) for own in pairs]
            ratios = [truth_ratio(there(own.correct_nll), nll, OU_EPSILON)
                      for own, nll in zip(pairs, wrong, strict=True)]
            result["FQ (OU)"] = float(forget_quality(*ratios))
    if "holdout" in scores:
        result["Min-K AUC"] = membership_auc(scores)
        if "holdout" in reference:
            result["PrivLeak"] = float(priv_leak(result["Min-K AUC"], membership_auc(reference)))
    return result


def membership_auc(scores):
    """ROC-AUC of Min-K, holdout (label 1) against forget set: 1 if every forget row looks known."""
    return float(roc_auc(there(scores["holdout"].min_k), there(scores["forget"].min_k)))


def inside(scores, reference):
    """What is left inside a forgotten answer, {column: float or None}: means over a set's tokens.

    forget NLL              −log p of the answer tokens, in nats
    forget informative NLL  of those inside spans: the facts
    forget other NLL        of all others, the end token included: the words around the facts
    holdout ...             the same three of rows that were never taught
    talk                    NLL of the model's own greedy forget answers, end token included, under
                            the retrained model, or where there is none under the target
    endless                 share of those answers that end only at 200 tokens or the context
    distance                |log p − log p of the retrained model| of forget answers: 0 only for it
    distance informative    the same inside spans
    distance other          and outside
    """
    result = {}
    for name in ("forget", "holdout"):
        if name in scores:
            own = scores[name]
            names = f"{name} NLL", f"{name} informative NLL", f"{name} other NLL"
            means = token_means(own.sequences, [-t[0] for t in own.tokens])
            result |= zip(names, means, strict=True)
    forget = scores.get("forget")
    if forget:
        spoken = there(forget.talk)
        result["talk"] = float(-np.concatenate(spoken).mean()) if spoken else None
        result["endless"] = average(forget.endless)
    if forget and "forget" in reference:
        gaps = distances(forget, reference["forget"])
        means = token_means(forget.sequences, gaps) if gaps else (None, None, None)
        result |= zip(("distance", "distance informative", "distance other"), means, strict=True)
    return result


def distances(scores, reference):
    """|log p − log p of the retrained model|, an array a Sequence; None for another tokenizer."""
    theirs = scores.matched(reference)
    if theirs is None:
        return None
    return [np.abs(own[0] - other[0]) for own, other in zip(scores.tokens, theirs, strict=True)]


def weights_auc(scores, start=None, names=tuple(etw.WEIGHTINGS)):
    """ROC-AUC with which each weighting tells informative from other tokens, {name: AUC or None}.

    scores: of a set with spans; start: the starting model's, for the methods that read it (where
    there is none, or it has another tokenizer, the model itself).
    """
    starting = start and scores.matched(start)
    rows = zip(scores.sequences, scores.tokens, starting or scores.tokens, strict=True)
    rows = [row for row in rows if row[0].informative is not None]
    inside_spans = np.concatenate([np.zeros(0, bool), *(s.informative for s, _, _ in rows)])
    aucs = {}
    for name in names:
        weights = np.concatenate([np.zeros(0), *(token_weights(name, *row) for row in rows)])
        auc = float(roc_auc(weights[inside_spans], weights[~inside_spans]))
        aucs[name] = None if math.isnan(auc) else auc
    return aucs


def there(values):
    return [v for v in values if v is not None]


def average(values):
    """Mean of what is there, as a float; None if nothing is."""
    values = there(values)
    return float(np.mean(values)) if values else None


def token_weights(method, sequence, tokens, start=None, beta=()):
    """The weights (n,) that a method of etw.WEIGHTINGS gives the answer tokens of one Sequence.

    tokens, start: arrays of log p and entropy, (2 or more, n), of the model and of the one that
    unlearning started from.
    """
    logprobs, entropy = torch.from_numpy(tokens[:2])[:, None]  # (1, n) each
    known = (None, None) if start is None else torch.from_numpy(start[:2])[:, None]
    spans = None if sequence.informative is None else torch.tensor([sequence.informative])
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    row = etw.Tokens(logprobs, entropy, mask, known[0], spans, known[1])
    return etw.weigh(method, row, *beta)[0].numpy()


def token_means(sequences, values):
    """Means over all answer tokens, over those inside spans, over all others: [float or None] * 3.

    values: an array a Sequence. The last two are of the sequences that have spans.
    """
    pairs = zip(sequences, values, strict=True)
    labelled = [(s.informative, v) for s, v in pairs if s.informative is not None]
    informative = np.concatenate([np.zeros(0, bool), *(inside for inside, _ in labelled)])
    split = np.concatenate([np.zeros(0), *(v for _, v in labelled)])
    parts = np.concatenate([np.zeros(0), *values]), split[informative], split[~informative]
    return [float(part.mean()) if part.size else None for part in parts]
