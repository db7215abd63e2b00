"""Entropy-guided Token Weighting (ETW): forget what matters, keep the rest.

A model forgets an answer by gradient ascent on its tokens. Ascent on every token alike ruins "was born in" together
with the birthplace. ETW weighs each token by the entropy of the model's own prediction at that place: where only one
continuation is possible the entropy is near zero, where the answer carries information it is high.

The equations (Koh, Baek, Kim, Kim, ACL 2026, arXiv 2604.17785), each beside the function that computes it:

    L   = L_r + λ L_f                                              train.py, one step
    L_r = − mean_i log p(y_i | x, y_<i)   over the retain set      retain_loss
    L_f =   mean_i ω_i log p(y_i | x, y_<i)   over the forget set  forget_loss
    ω_i = n H_i / Σ_j H_j                                          etw_weights
    H_i = − Σ_v q_v log q_v,   q = softmax(z_i / T)                token_stats

    symbol   name           shape    what it is
    z        logits         (N, V)   hidden @ head.T, always in float32 before a softmax
    log p_i  logprobs       (B, T)   log-probability of the true token, ≤ 0, in nats
    H_i      entropy        (B, T)   of the predictive distribution, ≥ 0, in nats
    ω_i      weights        (B, T)   no gradient, zero outside the mask; etw: mean 1 over each sequence
    n        mask.sum(1)    (B,)     answer tokens of a sequence, its end token included
    T, λ     temperature, --lambda

What the paper leaves open, and what we choose:
    which model gives H        the current one, at every step, detached, from the same logits as the loss
    sum or mean over tokens    mean over all answer tokens of the step: λ depends on neither length nor batch size
    normalisation of ω         per sequence
    end-of-sequence token      an answer token like any other: it has a weight and counts in n
    Σ H = 0 in a sequence      ω = 1 (the limit of equal entropies); no answer token in a row: zeros

All that any weighting needs from the vocabulary is two numbers a token: log p and H. On one side of that seam is the
model with its head (token_stats, lean_loss), on the other are formulas of one line. To try your own, write one such
function and add it to WEIGHTINGS.
"""
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Two numbers a token


def token_stats(hidden, head, targets, temperature=1.0):
    """Log-probability of each true token and entropy of each prediction: the definition that lean_loss is tested against.

    hidden (N, D), head (V, D), targets (N,) of valid ids, temperature T > 0.
    Returns logprobs (N,) float32, nats, with gradient to hidden and head (T does not touch it), and entropy (N,)
    float32, nats, in [0, log V], of softmax(z / T), without gradient. ValueError if T is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    all_logprobs = torch.log_softmax((hidden @ head.T).float(), dim=-1)  # (N, V)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    return logprobs, _entropy(all_logprobs.detach(), temperature)


def _entropy(all_logprobs, temperature, probs=None):
    """−Σ q log q from log-softmax (N, V), which keeps the digits of a small H; log-sum-exp minus Σ q z loses them all."""
    if temperature != 1:  # softmax(z/T) = softmax(log p / T); taking the maximum off first keeps T → 0 finite
        shifted = (all_logprobs - all_logprobs.amax(-1, keepdim=True)) / temperature
        all_logprobs, probs = torch.log_softmax(shifted, dim=-1), None
    probs = all_logprobs.exp() if probs is None else probs
    entropy = -torch.einsum("nv,nv->n", probs, all_logprobs)
    if not entropy.isfinite().all():  # 0 · −inf, where logits differ by more than float32 can hold
        entropy = -torch.einsum("nv,nv->n", probs, all_logprobs.clamp_min(torch.finfo(all_logprobs.dtype).min))
    return entropy.clamp_min(0)


# ---------------------------------------------------------------------------------------------------------------------
# Weightings: (B, T) numbers in, (B, T) weights out. p is the probability of the true token.


def etw_weights(entropy, mask):
    """ω_i = n H_i / Σ_j H_j over the answer tokens of each sequence (ETW, arXiv 2604.17785).

    entropy (B, T) ≥ 0, mask (B, T) bool. Returns (B, T): each row sums to its number of answer tokens, is zero outside
    the mask, and is the same for any multiple of the entropies. ValueError if the mask is empty or shapes differ.
    """
    _check(mask, entropy)
    entropy = _masked(entropy, mask)
    entropy = entropy / entropy.amax(1, keepdim=True).clamp_min(torch.finfo(entropy.dtype).tiny)  # no over- or underflow
    total = entropy.sum(1, keepdim=True)
    share = torch.where(total > 0, entropy / total, 1 / mask.sum(1, keepdim=True))  # ΣH = 0: equal shares
    return _masked(share * mask.sum(1, keepdim=True), mask)


def etw(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """n H_i / Σ_j H_j: the entropy of the prediction (ETW, arXiv 2604.17785)."""
    return etw_weights(entropy, mask)


def uniform(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """1: plain gradient ascent beside a retain term (GradDiff)."""
    return _masked(torch.ones_like(logprobs), mask)


def wga(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """p^β, β = 1: weighted gradient ascent, which slows where a token is already forgotten (arXiv 2502.19301)."""
    return _masked(torch.exp((1.0 if beta is None else beta) * logprobs), mask)


def tnpo(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """2 p^β / (p^β + p_ref^β), β = 4: token-wise NPO (arXiv 2502.19301). reference (B, T): log p of the starting model.

    Written as 2 σ(β (log p − log p_ref)), the only form of it that neither over- nor underflows.
    """
    _need(reference, "tnpo needs the starting model's log-probabilities")
    return _masked(2 * torch.sigmoid((4.0 if beta is None else beta) * (logprobs - reference)), mask)


def npo(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """2 σ(β Σ_j (log p_j − log p_ref,j)) for every token, β = 0.1: the weight in NPO's gradient (arXiv 2404.05868)."""
    _need(reference, "npo needs the starting model's log-probabilities")
    gap = _masked(logprobs - reference, mask).sum(1, keepdim=True)
    return _masked((2 * torch.sigmoid((0.1 if beta is None else beta) * gap)).expand_as(logprobs), mask)


def imp(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """(1 − p)^β, β = 1: importance, the tokens not yet certain (arXiv 2505.11953)."""
    return _masked((-torch.expm1(logprobs)).clamp_min(0) ** (1.0 if beta is None else beta), mask)


def satimp(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """p^β1 (1 − p)^β2, β = (5, 0.1): saturation times importance (arXiv 2505.11953)."""
    saturation, importance = (5.0, 0.1) if beta is None else beta
    return _masked(torch.exp(saturation * logprobs) * (-torch.expm1(logprobs)).clamp_min(0) ** importance, mask)


def spans(logprobs, entropy, mask, *, reference=None, spans=None, beta=None):
    """n / m on the m tokens inside labelled spans, 0 elsewhere: stands for parser- or annotator-made masks (SCN, SCE)."""
    _need(spans, "the spans method needs labelled spans")
    inside = mask & spans
    n, m = mask.sum(1, keepdim=True), inside.sum(1, keepdim=True)
    return _masked((n / m.clamp_min(1)).to(logprobs.dtype).expand_as(logprobs), inside)


# Every weighting has one signature: (logprobs, entropy, mask, *, reference, spans, beta) -> weights, all (B, T).
WEIGHTINGS = {w.__name__: w for w in (etw, uniform, wga, tnpo, npo, imp, satimp, spans)}
NEED_REFERENCE = ("tnpo", "npo")  # these get the starting model's log p, which costs a pass over the forget set


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def forget_loss(logprobs, weights, mask):
    """L_f = mean_i ω_i log p_i over all answer tokens: minimising it makes the weighted tokens less likely.

    logprobs, weights, mask (B, T). Returns a scalar, unbounded below. ValueError if the mask is empty.
    """
    _check(mask, logprobs, weights)
    weights = weights.detach()  # where ω is zero, log p may be −∞
    return (weights * torch.where(mask & (weights != 0), logprobs, 0)).sum() / mask.sum()


def retain_loss(logprobs, mask):
    """L_r = − mean_i log p_i over all answer tokens, in nats a token: plain cross-entropy. ValueError if none."""
    _check(mask, logprobs)
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


def lean_loss(hidden, head, targets, lengths, coefficients, temperature=1.0, chunk=256):
    """Σ_i c_i log p_i and its gradients in one pass, never holding more than a chunk of logits.

    Both losses are such sums with detached c: λ ω_i / N_f on forget tokens, −1 / N_r on retain tokens. The weight of a
    token is known once the entropies of its sequence are, so a chunk made of whole sequences can turn its logits into
    gradients at once: no logits kept for the backward pass and none computed twice (but for a sequence longer than a
    chunk, whose logits are).

    hidden (N, D) of the answer tokens, sequence after sequence; head (V, D); targets (N,); lengths: a list, the number
    of answer tokens of each sequence; coefficients(rows, logprobs, entropy, mask) -> c, where rows is the slice of
    sequences in the chunk and the rest is (b, t), right-padded. temperature as in token_stats; chunk in tokens.
    Returns (loss, logprobs (N,), entropy (N,)): the loss with gradient to hidden and head, the others without.
    ValueError if there is no answer token or the lengths do not add up to N.
    """
    if not 0 < len(hidden) == sum(lengths):
        raise ValueError(f"{len(hidden)} hidden states for sequences of {sum(lengths)} answer tokens in all")
    return _LeanLoss.apply(hidden, head, targets, lengths, coefficients, temperature, chunk)


class _LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, lengths, coefficients, temperature, chunk):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            x, w = hidden.to(dtype), head.to(dtype)
            grad_x, grad_w = torch.empty_like(x), None
            logprobs, entropy, c = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))

            size = min(chunk, len(x)), len(head)
            buffers = [x.new_empty(size, dtype=torch.float32) for _ in range(2)]

            def predict(piece):  # softmax of some rows, all in the same two buffers: fresh ones would cost page faults
                logits, probs = (b[:piece.stop - piece.start] for b in buffers)
                if dtype == torch.float32:
                    torch.mm(x[piece], w.T, out=logits)
                else:
                    logits.copy_(x[piece] @ w.T)
                all_logprobs = torch.log_softmax(logits, -1, out=probs)
                logprobs[piece] = all_logprobs.gather(1, targets[piece, None]).squeeze(1)
                probs = torch.exp(all_logprobs, out=logits)
                entropy[piece] = _entropy(all_logprobs, temperature, probs)
                return probs

            for rows, pieces in _chunks(lengths, chunk):
                for piece in pieces:
                    probs = predict(piece)
                tokens = slice(pieces[0].start, pieces[-1].stop)
                mask = torch.arange(max(lengths[rows])) < torch.tensor(lengths[rows])[:, None]
                mask = mask.to(hidden.device)
                padded = [torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, s[tokens])
                          for s in (logprobs, entropy)]
                c[tokens] = coefficients(rows, *padded, mask)[mask].float()
                for piece in pieces:
                    probs = predict(piece) if len(pieces) > 1 else probs
                    grad_z = probs.mul_(-c[piece, None])  # d(c log p)/dz = c (onehot − softmax)
                    grad_z.scatter_add_(1, targets[piece, None], c[piece, None])
                    grad_z = grad_z.to(dtype)
                    torch.mm(grad_z, w, out=grad_x[piece])
                    if grad_w is None:
                        grad_w = (grad_z.T @ x[piece]).float()
                    elif dtype == torch.float32:
                        grad_w.addmm_(grad_z.T, x[piece])
                    else:
                        grad_w += grad_z.T @ x[piece]
        ctx.save_for_backward(grad_x.to(hidden.dtype), grad_w.to(head.dtype))
        ctx.mark_non_differentiable(logprobs, entropy)
        return torch.dot(c, logprobs), logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *(g if grad_loss == 1 else g * grad_loss for g in ctx.saved_tensors), *[None] * 5


def _chunks(lengths, chunk):
    """Consecutive whole sequences of at most `chunk` tokens together: (slice of rows, [slice of tokens]).

    A sequence longer than that stands alone, in several pieces."""
    first, start, size = 0, 0, 0
    for row, length in enumerate([*lengths, chunk + 1]):  # the last entry only flushes
        if row > first and size + length > chunk:
            yield slice(first, row), [slice(a, min(a + chunk, start + size)) for a in range(start, start + size, chunk)]
            first, start, size = row, start + size, 0
        size += length


def _masked(values, mask):
    return torch.where(mask, values, 0).detach()


def _check(mask, *tensors):
    if any(t.shape != mask.shape for t in tensors):
        raise ValueError(f"shapes differ: mask {tuple(mask.shape)}, {[tuple(t.shape) for t in tensors]}")
    if not mask.any():
        raise ValueError("the mask is empty: no answer token to weigh")


def _need(value, message):
    if value is None:
        raise ValueError(message)
