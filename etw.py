"""Entropy-guided Token Weighting (ETW): forget what matters, keep the rest.

A model forgets an answer by gradient ascent on its tokens. Ascent on every token alike ruins "was
born in" together with the birthplace. ETW weighs each token by the entropy of the model's own
prediction: where only one continuation is possible it is near zero, where the answer carries
information it is high. The equations (arXiv 2604.17785), each beside the function that computes it:

    L   = L_r + λ L_f                                              train.step_loss
    L_r = − mean_i log p(y_i | x, y_<i)   over the retain set      retain_loss
    L_f =   mean_i ω_i log p(y_i | x, y_<i)   over the forget set  forget_loss
    ω_i = n H_i / Σ_j H_j                                          etw_weights
    H_i = − Σ_v q_v log q_v,   q = softmax(z_i / T)                entropy_of

    z        logits        (N, V)  hidden @ head.T, always in float32 before a softmax
    log p_i  logprobs      (B, T)  log-probability of the true token, ≤ 0, in nats
    H_i      entropy       (B, T)  of the predictive distribution, ≥ 0, in nats
    ω_i      weights       (B, T)  no gradient, zero outside the mask; etw: mean 1 over a sequence
    n        mask.sum(1)   (B,)    answer tokens of a sequence, its end token included

What the paper leaves open, and what we choose: H is the current model's, at every step, from the
logits of the loss; both losses are means over all answer tokens of the step, so that λ depends on
neither length nor batch size; ω is normalised per sequence; the end token is an answer token; where
all entropies of a sequence are zero, ω = 1. lean.py runs these losses in little memory.
"""
import inspect
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

# ---- Two numbers a token: all that a weighting needs from the vocabulary


def token_stats(hidden, head, targets, temperature=1.0):
    """log p of each true token and entropy H of each prediction, (N,) float32 in nats.

    hidden (N, D), head (V, D), targets (N,) of valid ids; temperature T > 0, else ValueError.
    log p has gradient to hidden and head and no T; H, in [0, log V], has T and no gradient.
    """
    return logit_stats(hidden @ head.T, targets, temperature)


def logit_stats(logits, targets, temperature=1.0):
    """token_stats from logits (N, V) of any float type; no float32 copy of all of them is kept."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    pieces = zip(logits.split(256), targets.split(256), strict=True)
    parts = [checkpoint(_stats, *piece, temperature, use_reentrant=False) for piece in pieces]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def label_stats(logits, labels, temperature=1.0):
    """(logprobs, entropy, mask), (B, T − 1), from what other trainers have: shifted here, once.

    logits (B, T, V), labels (B, T) with −100 where there is none. Zero outside the mask.
    """
    targets, mask = labels[:, 1:], labels[:, 1:] != -100
    stats = logit_stats(logits[:, :-1][mask], targets[mask], temperature)
    return *(s.new_zeros(mask.shape).masked_scatter(mask, s) for s in stats), mask


def _stats(logits, targets, temperature):
    all_logprobs = torch.log_softmax(logits.float(), dim=-1)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    return logprobs, entropy_of(all_logprobs.detach(), temperature)


def entropy_of(all_logprobs, temperature=1.0, probs=None):
    """−Σ q log q (N,) of log-softmax (N, V); probs: its exp, where that is at hand.

    Not as log-sum-exp minus Σ q z, which loses the digits of a small H.
    """
    if temperature != 1:  # softmax(z/T) = softmax(log p / T); less the maximum, T → 0 stays finite
        shifted = (all_logprobs - all_logprobs.amax(-1, keepdim=True)) / temperature
        all_logprobs, probs = torch.log_softmax(shifted, dim=-1), None
    probs = all_logprobs.exp() if probs is None else probs
    entropy = -torch.einsum("nv,nv->n", probs, all_logprobs)
    if not entropy.isfinite().all():  # 0 · −inf, where logits differ by more than float32 can hold
        lowest = torch.finfo(all_logprobs.dtype).min
        entropy = -torch.einsum("nv,nv->n", probs, all_logprobs.clamp_min(lowest))
    return entropy.clamp_min(0)


# ---- Weightings: each a formula of the tokens and its own β's. p: probability of the true token.


class Tokens(NamedTuple):
    """What a weighting sees of some whole sequences, all (B, T); reference: of the starting model.

    How many at once is decided by memory: a formula may mix the tokens of a row, not rows.
    """
    logprobs: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor  # bool: answer tokens
    reference: torch.Tensor | None = None  # log p
    spans: torch.Tensor | None = None  # bool: inside a labelled span
    reference_entropy: torch.Tensor | None = None


def etw_weights(entropy, mask):
    """ω_i = n H_i / Σ_j H_j over the answer tokens of each sequence (arXiv 2604.17785).

    entropy (B, T) ≥ 0, mask (B, T) bool. Returns (B, T): each row sums to its number of answer
    tokens, is zero outside the mask and the same for any multiple of H. ValueError: empty mask.
    """
    _check(mask, entropy)
    entropy = torch.where(mask, entropy, 0).detach()
    peak = entropy.amax(1, keepdim=True).clamp_min(torch.finfo(entropy.dtype).tiny)
    entropy = entropy / peak  # the sum neither over- nor underflows
    total, n = entropy.sum(1, keepdim=True), mask.sum(1, keepdim=True)
    return torch.where(mask, torch.where(total > 0, n * entropy / total, 1), 0)


def by_entropy(tokens):
    """n H / Σ H: the entropy of the prediction (ETW, arXiv 2604.17785)."""
    return etw_weights(tokens.entropy, tokens.mask)


def uniform(tokens):
    """1: plain gradient ascent beside a retain term (GradDiff)."""
    return torch.ones_like(tokens.logprobs)


def wga(tokens, beta=1.0):
    """p^β: slows where a token is already forgotten (arXiv 2502.19301)."""
    return torch.exp(beta * tokens.logprobs)


def tnpo(tokens, beta=4.0):
    """2 p^β / (p^β + p_ref^β) (arXiv 2502.19301), in the form that cannot over- or underflow."""
    return 2 * torch.sigmoid(beta * (tokens.logprobs - tokens.reference))


def npo(tokens, beta=0.1):
    """2 σ(β Σ_j (log p_j − log p_ref,j)) for all tokens: NPO's gradient (arXiv 2404.05868)."""
    gap = torch.where(tokens.mask, tokens.logprobs - tokens.reference, 0).sum(1, keepdim=True)
    return 2 * torch.sigmoid(beta * gap).expand_as(tokens.logprobs)


def imp(tokens, beta=1.0):
    """(1 − p)^β: importance, the tokens not yet certain (arXiv 2505.11953)."""
    return (-torch.expm1(tokens.logprobs)).clamp_min(0) ** beta


def satimp(tokens, beta1=5.0, beta2=0.1):
    """p^β1 (1 − p)^β2: saturation times importance (arXiv 2505.11953)."""
    return wga(tokens, beta1) * imp(tokens, beta2)


def inside_spans(tokens):
    """n / m on the m labelled tokens, 0 elsewhere: stands for parser-made masks (SCN, SCE)."""
    inside = tokens.mask & tokens.spans
    return inside * tokens.mask.sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1)


def keep_the_rest(tokens, margin=2.5, sharpness=4.0, keep=10.0):
    """ω 2σ(s (log p + m)) − k max(0, 1 − ω), ω = n H / Σ H at the start. Ours, not the paper's.

    The push is 2ω on a known token and fades once its surprise passes the margin m, in nats, so
    that nothing is driven on without end; light tokens (ω below k / (k + 2)) weigh less than 0:
    they are trained to stay, the harder the larger k; the starting model says which is which, as
    the current one's entropy follows what is already broken.
    """
    weights = etw_weights(tokens.reference_entropy, tokens.mask)
    gate = 2 * torch.sigmoid(sharpness * (tokens.logprobs + margin))
    return weights * gate - keep * (1 - weights).clamp_min(0)


WEIGHTINGS = {"etw": by_entropy, "keep": keep_the_rest, "uniform": uniform, "wga": wga,
              "tnpo": tnpo, "npo": npo, "imp": imp, "satimp": satimp, "spans": inside_spans}


def weigh(name, tokens, *beta):
    """The weights (B, T) of a method: its formula, zero outside the mask, without gradient.

    beta: every β of the formula, or none for the defaults. ValueError if it does not take so many,
    if it reads a field that these tokens do not have, and if the mask is empty.
    """
    betas = list(inspect.signature(WEIGHTINGS[name]).parameters)[1:]
    if beta and len(beta) != len(betas):
        raise ValueError(f"{name} takes {len(betas)} β's ({', '.join(betas) or 'none'}), "
                         f"not {len(beta)}")
    _check(tokens.mask, tokens.logprobs, tokens.entropy)
    for field in Tokens._fields:
        if getattr(tokens, field) is None and needs(name, field):
            raise ValueError(f"{name} needs `{field}`, which these tokens do not have")
    logprobs = tokens.logprobs.detach().clamp_min(torch.finfo(torch.float32).min)  # −∞ − −∞ is NaN
    tokens = tokens._replace(logprobs=logprobs, entropy=tokens.entropy.detach())
    return torch.where(tokens.mask, WEIGHTINGS[name](tokens, *beta), 0).detach()


ZERO = torch.zeros(1, 1)
ONE = Tokens(ZERO, ZERO, ZERO == 0, ZERO, ZERO == 0, ZERO)  # a single token that has everything


def needs(name, field):
    """Whether a formula reads a field: it is tried on one token that lacks it.

    So a formula must work on a single token, and not test for None.
    """
    try:
        WEIGHTINGS[name](ONE._replace(**{field: None}))
    except (TypeError, AttributeError):
        return True
    return False


def needs_start(name):
    """Whether a formula reads numbers of the starting model: a pass over the forget set."""
    return needs(name, "reference") or needs(name, "reference_entropy")


# ---- Losses


def forget_loss(logprobs, weights, mask, count=None):
    """L_f = Σ_i ω_i log p_i / count: minimising it makes tokens of positive weight less likely.

    logprobs, weights, mask (B, T). count: the answer tokens to divide by, where these rows are a
    part of a step (the mask may then be empty); all of the mask by default. Returns a scalar,
    unbounded.
    """
    _check(mask, logprobs, weights, part=count is not None)
    weights = weights.detach()
    terms = weights * torch.where(mask & (weights != 0), logprobs, 0)  # where ω = 0, maybe 0 · −∞
    return terms.sum() / (mask.sum() if count is None else count)


def retain_loss(logprobs, mask, count=None):
    """L_r = − Σ_i log p_i / count, in nats a token: cross-entropy; count as in forget_loss."""
    _check(mask, logprobs, part=count is not None)
    return -torch.where(mask, logprobs, 0).sum() / (mask.sum() if count is None else count)


def _check(mask, *tensors, part=False):
    if any(t.shape != mask.shape for t in tensors):
        raise ValueError(f"shapes differ: mask {tuple(mask.shape)}, "
                         f"{[(*t.shape,) for t in tensors]}")
    if not part and not mask.any():
        raise ValueError("the mask is empty: no answer token to weigh")
