"""The lean form of the loss: equal to the definition for any chunk, no less exact, and never more
than a chunk of logits."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import etw
from lean import lean_loss


def plain_loss(hidden, head, targets, lengths, loss_of, temperature):
    """The definition: token_stats on everything at once, the loss on the padded (B, T), one
    autograd pass."""
    logprobs, entropy = etw.token_stats(hidden, head, targets, temperature)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = [torch.zeros(mask.shape).masked_scatter(mask, s) for s in (logprobs, entropy)]
    return loss_of(slice(0, len(lengths)), *padded, mask)


def etw_and_retain(lengths):
    """L_r + 0.3 L_f with every other sequence a forget sequence."""
    forget, n = torch.arange(len(lengths)) % 2 == 0, torch.tensor(lengths)
    n_forget, n_retain = n[forget].sum(), n[~forget].sum().clamp_min(1)

    def loss_of(rows, logprobs, entropy, mask):
        forgets, retains = mask & forget[rows, None], mask & ~forget[rows, None]
        loss = etw.retain_loss(logprobs, retains, n_retain)
        if forgets.any():
            weights = etw.etw_weights(entropy, forgets)
            loss = loss + 0.3 * etw.forget_loss(logprobs, weights, forgets, n_forget)
        return loss

    return loss_of


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6),
       st.integers(1, 12),
       st.sampled_from([1.0, 0.5, 2.0]))
def test_lean_loss_equals_its_definition_for_any_chunk(lengths, chunk, temperature):
    g, n = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    hidden, head = (torch.randn(rows, 4, generator=g).requires_grad_() for rows in (n, 11))
    common = (hidden, head, torch.randint(0, 11, (n,), generator=g),
              lengths, etw_and_retain(lengths), temperature)
    lean, plain = lean_loss(*common, chunk), plain_loss(*common)
    assert_close(lean, plain, rtol=1e-5, atol=1e-6)
    lean, plain = (torch.autograd.grad(2 * loss, (hidden, head)) for loss in (lean, plain))
    assert_close(lean, plain, rtol=1e-4, atol=1e-6)


def test_lean_loss_in_bfloat16_is_no_further_from_float64_than_the_plain_form():
    g, lengths = torch.Generator().manual_seed(0), [30, 20, 40, 10]
    exact = [torch.randn(rows, 32, generator=g).bfloat16().double() for rows in (100, 500)]
    targets = torch.randint(0, 500, (100,), generator=g)

    def found(f, dtype, *rest):
        hidden, head = (t.to(dtype).requires_grad_() for t in exact)
        loss = f(hidden, head, targets, lengths, etw_and_retain(lengths), 1.0, *rest)
        return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (hidden, head)))]

    lean, plain = found(lean_loss, torch.bfloat16, 50), found(plain_loss, torch.bfloat16)
    for ours, theirs, truth in zip(lean, plain, found(plain_loss, torch.float64), strict=True):
        assert (ours - truth).abs().max() <= 1.1 * (theirs - truth).abs().max() + 1e-5


def test_lean_loss_never_holds_more_than_a_chunk_of_logits():
    class Biggest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                self.numbers = max(self.numbers, t.numel() if isinstance(t, torch.Tensor) else 0)
            return result

    lengths, vocabulary, chunk = [50] * 20, 3000, 100  # 1000 tokens
    hidden, head = (torch.randn(rows, 4, requires_grad=True) for rows in (1000, vocabulary))
    targets = torch.zeros(1000, dtype=torch.long)
    with Biggest() as seen:
        lean_loss(hidden, head, targets, lengths, etw_and_retain(lengths), chunk=chunk).backward()
    assert seen.numbers == chunk * vocabulary


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="answer tokens"):
        lean_loss(torch.ones(1, 2), torch.ones(1, 2), [0], [2], None)


def test_a_loss_of_whole_sequences_that_is_no_weighted_sum_gets_its_own_gradient():
    """The true NPO, −2/β log σ(−β Σ_j (log p_j − log p_ref,j)): a new loss is one function."""
    g, lengths = torch.Generator().manual_seed(0), [3, 5, 2]
    hidden, head = (torch.randn(rows, 4, generator=g).requires_grad_() for rows in (10, 9))
    reference = -torch.rand(3, 5, generator=g)

    def npo(rows, logprobs, entropy, mask):
        gap = torch.where(mask, logprobs - reference[rows, :mask.shape[1]], 0).sum(1)
        return -20 * torch.nn.functional.logsigmoid(-0.1 * gap).sum()

    common = hidden, head, torch.randint(0, 9, (10,), generator=g), lengths, npo, 1.0
    lean, plain = (torch.autograd.grad(loss, (hidden, head))
                   for loss in (lean_loss(*common, 6), plain_loss(*common)))
    assert_close(lean, plain, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_not_trained_changes_no_gradient_of_the_hidden_states():
    g, lengths = torch.Generator().manual_seed(0), [3, 4]
    hidden, head = (torch.randn(rows, 4, generator=g).requires_grad_() for rows in (7, 9))
    rest = torch.randint(0, 9, (7,), generator=g), lengths, etw_and_retain(lengths)
    trained = torch.autograd.grad(lean_loss(hidden, head, *rest), hidden)
    frozen = torch.autograd.grad(lean_loss(hidden, head.detach(), *rest), hidden)
    assert_close(frozen, trained)
