"""The loss of etw.py without ever holding more than a chunk of logits.

A language model's logits are its largest tensor: 16 + 16 answers of 60 tokens at V = 128,256 are
1 GB. A loss made of log p and H needs them only for a moment. The weight of a token is known once
the entropies of its sequence are, so a chunk made of whole sequences can turn its logits into
gradients at once: none is kept for the backward pass and none is computed twice (but for a sequence
longer than a chunk).
"""
from functools import partial

import torch

from etw import entropy_of


def lean_loss(hidden, head, targets, lengths, loss_of, temperature=1.0, chunk=256):
    """Σ over chunks of loss_of(rows, logprobs, entropy, mask), with gradient to hidden and head.

    hidden (N, D) of the answer tokens, sequence after sequence; head (V, D); targets (N,); lengths:
    a list, the answer tokens of each sequence; temperature as in etw.token_stats; chunk in tokens.
    loss_of gets `rows`, the slice of sequences in the chunk, and (b, t), right-padded; it returns a
    scalar that depends on logprobs alone (divide by the tokens of the whole step: chunks add up).
    Returns the scalar. ValueError if there is no answer token or the lengths do not add up to N.
    """
    if not 0 < len(hidden) == sum(lengths):
        raise ValueError(f"{len(hidden)} hidden states for {sum(lengths)} answer tokens")
    return _LeanLoss.apply(hidden, head, targets, lengths, loss_of, temperature, chunk)


class _LeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, lengths, loss_of, temperature, chunk):
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            work = _Workspace(hidden.to(dtype), head.to(dtype), targets, temperature, chunk)
            work.trains_head = ctx.needs_input_grad[1]
            loss = sum(_one_chunk(work, pieces, lengths[rows], partial(loss_of, rows))
                       for rows, pieces in chunks(lengths, chunk))
        grad_w = None if work.grad_w is None else work.grad_w.to(head.dtype)
        ctx.save_for_backward(work.grad_x.to(hidden.dtype), grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads = [g if g is None or grad_loss == 1 else g * grad_loss for g in ctx.saved_tensors]
        return *grads, *[None] * 5


def _one_chunk(work, pieces, lengths, loss_of):
    """The loss of a chunk of whole sequences; its gradients are added to the workspace's."""
    stats = []
    for piece in pieces:
        probs, *numbers = work.predict(piece)  # probs lies in a buffer, until the next
        stats.append(torch.stack(numbers))
    stats = torch.cat(stats, 1)  # (2, n): log p and H

    # The loss as etw.py writes it, on the small (b, t). Its gradient is each log p's coefficient.
    places = torch.arange(max(lengths), device=stats.device)
    mask = places < torch.tensor(lengths, device=stats.device)[:, None]  # (b, t)
    logprobs, entropy = (stats.new_zeros(mask.shape).masked_scatter(mask, s) for s in stats)
    with torch.enable_grad():
        loss = loss_of(logprobs.requires_grad_(), entropy, mask)
    coefficients = torch.autograd.grad(loss, logprobs)[0][mask]  # (n,)

    # Logits become gradients in place; of several pieces the buffers hold only the last.
    parts = coefficients.split([piece.stop - piece.start for piece in pieces])
    for piece, c in zip(pieces, parts, strict=True):
        work.push(piece, probs if len(pieces) == 1 else work.predict(piece)[0], c)
    return loss.detach()


class _Workspace:
    """Two float32 buffers (chunk, V), used again and again: fresh ones would cost page faults."""

    def __init__(self, x, w, targets, temperature, chunk):
        self.x, self.w, self.targets, self.temperature = x, w, targets, temperature
        size = min(chunk, len(x)), len(w)
        self.buffers = [x.new_empty(size, dtype=torch.float32) for _ in range(2)]
        self.grad_x, self.grad_w = torch.empty_like(x), None

    def predict(self, piece):
        """(softmax (n, V), log p (n,), H (n,)) of some rows; the softmax lies in a buffer."""
        logits, all_logprobs = (b[:piece.stop - piece.start] for b in self.buffers)
        if self.x.dtype == torch.float32:
            torch.mm(self.x[piece], self.w.T, out=logits)
        else:
            logits.copy_(self.x[piece] @ self.w.T)
        torch.log_softmax(logits, -1, out=all_logprobs)
        logprobs = all_logprobs.gather(1, self.targets[piece, None]).squeeze(1)
        probs = torch.exp(all_logprobs, out=logits)
        return probs, logprobs, entropy_of(all_logprobs, self.temperature, probs)

    def push(self, piece, probs, c):
        """Add the gradients of Σ c log p: d log p / dz = onehot − softmax."""
        grad_z = probs.mul_(-c[:, None])
        grad_z.scatter_add_(1, self.targets[piece, None], c[:, None])
        grad_z = grad_z.to(self.x.dtype)
        torch.mm(grad_z, self.w, out=self.grad_x[piece])
        if not self.trains_head:
            return
        if self.grad_w is None:
            self.grad_w = (grad_z.T @ self.x[piece]).float()
        elif self.x.dtype == torch.float32:
            self.grad_w.addmm_(grad_z.T, self.x[piece])
        else:
            self.grad_w += grad_z.T @ self.x[piece]


def chunks(lengths, chunk):
    """Yields consecutive whole sequences of at most `chunk` tokens: a slice of rows, and a list of
    slices of tokens: one, but for a sequence longer than a chunk, which stands alone in several."""
    first, start, size = 0, 0, 0
    for row, length in enumerate([*lengths, chunk + 1]):  # the last entry only flushes
        if row > first and size + length > chunk:
            stop = start + size
            pieces = [slice(a, min(a + chunk, stop)) for a in range(start, stop, chunk)]
            yield slice(first, row), pieces
            first, start, size = row, stop, 0
        size += length
