"""The weighting maths: properties of the method, its closed-form gradient, and the loop written from the paper."""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.testing import assert_close

import etw


@st.composite
def masked(draw, high=1.0):
    """(values (B, T) float64, mask (B, T) bool with at least one True)."""
    shape = draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7))
    values = torch.tensor(draw(arrays("float64", shape, elements=st.floats(0, high, width=32))))
    mask = torch.tensor(draw(arrays("bool", shape)))
    assume(mask.any())
    return values, mask


@st.composite
def problems(draw, size=20.0):
    """hidden (N, D), head (V, D), targets (N,): one prediction task in float64."""
    n, d, v = draw(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 9)))
    number = st.floats(-size, size, width=32)
    hidden, head = (torch.tensor(draw(arrays("float64", (rows, d), elements=number))) for rows in (n, v))
    return hidden, head, torch.tensor(draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))


def every_weighting(logprobs, mask, entropy):
    """{name: weights} of all methods on the same tokens, with made-up reference and spans."""
    known = {"reference": logprobs.detach() * 0.5, "spans": mask & (torch.arange(mask.shape[1]) % 2 == 0)}
    return {name: weigh(logprobs, entropy, mask, **known) for name, weigh in etw.WEIGHTINGS.items()}


# ---- token statistics


@given(problems(), st.floats(0.05, 20))
def test_entropy_lies_between_zero_and_log_vocab(problem, temperature):
    logprobs, entropy = etw.token_stats(*problem, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    assert (entropy <= math.log(len(problem[1])) * (1 + 1e-6)).all()


@given(problems(), st.floats(0.5, 4))
def test_token_stats_equal_the_sums_written_from_the_paper(problem, temperature):
    hidden, head, targets = problem
    logprobs, entropy = etw.token_stats(hidden, head, targets, temperature)
    for i, target in enumerate(targets):
        z = [math.fsum(h * w for h, w in zip(hidden[i].tolist(), row, strict=True)) for row in head.tolist()]
        top = max(z)
        log_norm = top + math.log(math.fsum(math.exp(x - top) for x in z))
        assert logprobs[i].item() == pytest.approx(z[target] - log_norm, rel=1e-4, abs=1e-4)
        scaled = [math.exp((x - top) / temperature) for x in z]
        q = [s / math.fsum(scaled) for s in scaled]
        assert entropy[i].item() == pytest.approx(-math.fsum(p * math.log(p) for p in q if p > 0), rel=1e-3, abs=1e-4)


def test_entropy_goes_to_zero_as_temperature_does_and_to_log_vocab_as_it_grows():
    task = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0])
    assert etw.token_stats(*task, 1e-30)[1].item() == 0
    assert etw.token_stats(*task, 1e30)[1].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("gap", [1.0, 30.0, 104.0, 1e4, 1e30, 3e38])
def test_values_and_gradients_are_finite_at_any_logit_gap(gap, temperature):
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = torch.tensor([[gap], [-gap], [0.0]], requires_grad=True)
    logprobs, entropy = etw.token_stats(hidden, head, torch.tensor([0]), temperature)
    logprobs.sum().backward()
    assert all(numbers.isfinite().all() for numbers in (logprobs, entropy, hidden.grad, head.grad))


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_small_entropies_keep_their_digits(gap):
    """Log-sum-exp minus Σ q z is exactly 0 or noise here."""
    p = 1 / (1 + math.exp(gap))
    exact = -p * math.log(p) - (1 - p) * math.log1p(-p)
    entropy = etw.token_stats(torch.ones(1, 1), torch.tensor([[gap], [0.0]]), torch.tensor([0]))[1]
    assert entropy.item() == pytest.approx(exact, rel=0.05)


def test_bfloat16_inputs_are_measured_in_float32():
    hidden, head = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(32_000, 1, dtype=torch.bfloat16)
    logprobs, entropy = etw.token_stats(hidden, head, torch.tensor([0]))
    assert [entropy.item(), -logprobs.item()] == pytest.approx([math.log(32_000)] * 2, rel=1e-4)


# ---- weights


@given(masked())
def test_weights_equal_the_loop_written_from_the_paper(case):
    entropy, mask = case
    weights = etw.etw_weights(entropy, mask)
    for b, t in torch.ones(mask.shape).nonzero().tolist():
        n, total = int(mask[b].sum()), math.fsum(entropy[b][mask[b]].tolist())
        expected = 0.0 if not mask[b, t] else n * entropy[b, t].item() / total if total else 1.0
        assert weights[b, t].item() == pytest.approx(expected)


@given(masked(), st.floats(1e-30, 1e30))
def test_weights_sum_to_the_number_of_answer_tokens_whatever_the_unit_of_entropy(case, scale):
    entropy, mask = case
    weights = etw.etw_weights(entropy * scale, mask)
    assert_close(weights.sum(1), mask.sum(1).double())
    assert_close(weights, etw.etw_weights(entropy, mask))


def test_zero_entropy_everywhere_in_a_sequence_gives_ones_and_no_answer_gives_zeros():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    entropy = torch.tensor([[0.0, 0.0, 9.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    expected = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    assert_close(etw.etw_weights(entropy, mask), expected)


def test_equal_confidence_with_unequal_entropy_is_weighed_apart_by_etw_alone():
    """Two tokens with p = 0.5: one alternative, or a thousand. No weight made of p can see the difference."""
    sharp, flat = torch.zeros(1001), torch.full((1001,), 0.5 / 1000)
    sharp[:2], flat[0] = 0.5, 0.5
    logits = torch.stack([sharp, flat]).log().clamp_min(-1e4)
    logprobs, entropy = etw.token_stats(torch.eye(2), logits.T, torch.tensor([0, 0]))
    weights = every_weighting(logprobs[None], torch.ones(1, 2, dtype=torch.bool), entropy[None])
    assert weights["etw"][0, 1] > 4 * weights["etw"][0, 0]
    for name in ("wga", "imp", "satimp", "uniform"):
        assert_close(weights[name][0, 0], weights[name][0, 1], msg=name)


@given(masked(50))
def test_every_weighting_is_finite_not_negative_and_zero_outside_the_mask(case):
    nll, mask = case
    for name, weights in every_weighting(-nll, mask, nll).items():
        assert weights.shape == mask.shape and weights.isfinite().all() and (weights >= 0).all(), name
        assert (weights[~mask] == 0).all(), name


@given(masked(), st.integers(1, 4))
def test_padding_changes_nothing_even_if_it_holds_nan(case, width):
    values, mask = case
    wide, wide_mask = (torch.nn.functional.pad(t, (0, width), value=v) for t, v in ((values, math.nan), (mask, False)))
    for name, weights in every_weighting(-values, mask, values).items():
        padded = every_weighting(-wide, wide_mask, wide)[name]
        assert_close(padded, torch.nn.functional.pad(weights, (0, width)), msg=name)
    assert_close(etw.forget_loss(-wide, wide_mask.double(), wide_mask), etw.forget_loss(-values, mask.double(), mask))
    assert_close(etw.retain_loss(-wide, wide_mask), etw.retain_loss(-values, mask))


FORMULAS = [  # weights of two tokens with p = 1/2 and 1/4, p_ref = 1/4 twice, H = 1 and 3, the second in a span
    ("etw", None, [0.5, 1.5]), ("uniform", None, [1, 1]), ("spans", None, [0, 2]),
    ("wga", None, [0.5, 0.25]), ("wga", 2.0, [0.25, 0.0625]), ("imp", None, [0.5, 0.75]), ("imp", 2.0, [0.25, 0.5625]),
    ("satimp", None, [0.5**5 * 0.5**0.1, 0.25**5 * 0.75**0.1]), ("satimp", (1.0, 1.0), [0.25, 0.1875]),
    ("tnpo", None, [2 * 0.5**4 / (0.5**4 + 0.25**4), 1]), ("tnpo", 1.0, [4 / 3, 1]),
    ("npo", None, [2 * 0.5**0.1 / (0.5**0.1 + 0.25**0.1)] * 2), ("npo", 1.0, [4 / 3, 4 / 3]),
]


@pytest.mark.parametrize("name, beta, expected", FORMULAS)
def test_weights_are_those_of_the_table_of_formulas(name, beta, expected):
    assert {row[0] for row in FORMULAS} == etw.WEIGHTINGS.keys()
    logprobs, entropy = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1.0, 3.0]])
    known = {"reference": torch.tensor([[0.25, 0.25]]).log(), "spans": torch.tensor([[False, True]])}
    weights = etw.WEIGHTINGS[name](logprobs, entropy, torch.ones(1, 2, dtype=torch.bool), beta=beta, **known)
    assert weights.tolist() == [pytest.approx(expected)]
    if name == "spans":  # where no token is labelled: zeros
        known["spans"] = torch.tensor([[False, False]])
        assert not etw.spans(logprobs, entropy, torch.ones(1, 2, dtype=torch.bool), **known).any()


def test_tnpo_survives_probabilities_that_underflow():
    logprobs, reference = torch.tensor([[-400.0, -1.0]]), torch.tensor([[-399.0, -900.0]])
    weights = etw.tnpo(logprobs, logprobs, torch.ones(1, 2, dtype=torch.bool), reference=reference)
    assert weights.tolist() == [pytest.approx([2 / (1 + math.exp(4)), 2.0])]


def test_npo_weight_is_the_gradient_of_the_npo_loss():
    beta, logprobs = 0.1, torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    reference, mask = torch.tensor([[-0.1, -0.2, -0.3]]), torch.ones(1, 3, dtype=torch.bool)
    loss = -2 / beta * torch.nn.functional.logsigmoid(-beta * (logprobs - reference).sum())
    assert_close(torch.autograd.grad(loss, logprobs)[0], etw.npo(logprobs, logprobs, mask, reference=reference))


ONE, EMPTY = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)


@pytest.mark.parametrize("call, message", [
    (lambda: etw.etw_weights(ONE, EMPTY), "mask is empty"), (lambda: etw.retain_loss(ONE, EMPTY), "mask is empty"),
    (lambda: etw.forget_loss(ONE, ONE, EMPTY), "mask is empty"), (lambda: etw.etw_weights(ONE.T, ~EMPTY), "shapes"),
    (lambda: etw.tnpo(ONE, ONE, ~EMPTY), "log-probabilities"), (lambda: etw.npo(ONE, ONE, ~EMPTY), "log-probabilities"),
    (lambda: etw.spans(ONE, ONE, ~EMPTY), "spans"), (lambda: etw.lean_loss(ONE, ONE, [0], [2], None), "answer tokens"),
    *((lambda t=t: etw.token_stats(ONE, ONE, torch.tensor([0]), t), "temperature") for t in (0, -1.0, math.nan)),
])
def test_what_cannot_be_weighed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- losses


@given(masked(20), st.floats(0, 3))
def test_losses_equal_the_loops_written_from_the_paper(case, weight):
    nll, mask = case
    tokens, weights = mask.nonzero().tolist(), mask * (1 + nll) * weight
    forget = math.fsum(weights[b, t].item() * -nll[b, t].item() for b, t in tokens) / len(tokens)
    retain = -math.fsum(-nll[b, t].item() for b, t in tokens) / len(tokens)
    assert etw.forget_loss(-nll, weights, mask).item() == pytest.approx(forget)
    assert etw.retain_loss(-nll, mask).item() == pytest.approx(retain)


@given(problems(size=5))
def test_gradient_is_weight_times_onehot_minus_softmax(problem):
    """The closed form. A flipped sign passes every invariance, weights that carry a gradient pass even the slow loop;
    neither passes here."""
    hidden, head, targets = problem
    hidden.requires_grad_()
    logprobs, entropy = etw.token_stats(hidden, head, targets)
    logprobs, entropy, mask = logprobs[None], entropy[None], torch.ones(1, len(targets), dtype=torch.bool)
    softmax, onehot = torch.softmax(hidden @ head.T, -1), torch.nn.functional.one_hot(targets, len(head))
    for name, weights in every_weighting(logprobs, mask, entropy).items():
        assert not weights.requires_grad, name
        carrying = weights + logprobs - logprobs.detach()  # even if a weighting forgets to detach
        grad = torch.autograd.grad(etw.forget_loss(logprobs, carrying, mask), hidden, retain_graph=True)[0]
        expected = weights[0, :, None] / len(targets) * (onehot - softmax) @ head
        assert_close(grad, expected.detach(), atol=1e-5, rtol=1e-4, msg=name)


# ---- the lean form


def plain_loss(hidden, head, targets, lengths, coefficients, temperature):
    """The definition: token_stats on everything at once, the coefficients on the padded (B, T), one autograd pass."""
    logprobs, entropy = etw.token_stats(hidden, head, targets, temperature)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = [torch.zeros(mask.shape).masked_scatter(mask, s) for s in (logprobs, entropy)]
    c = coefficients(slice(0, len(lengths)), *(p.detach() for p in padded), mask)
    return (c * padded[0])[mask].sum(), logprobs, entropy


def etw_and_retain(lengths):
    """Coefficients of L_r + 0.3 L_f with every other sequence a forget sequence."""
    forget, n = torch.arange(len(lengths))[:, None] % 2 == 0, torch.tensor(lengths)
    n_forget, n_retain = n[forget[:, 0]].sum(), n[~forget[:, 0]].sum().clamp_min(1)
    return lambda rows, logprobs, entropy, mask: torch.where(
        forget[rows], 0.3 * etw.etw_weights(entropy, mask) / n_forget, -1 / n_retain)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.sampled_from([1.0, 0.5, 2.0]))
def test_lean_loss_equals_its_definition_for_any_chunk(lengths, chunk, temperature):
    g, n = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    hidden, head = (torch.randn(rows, 4, generator=g).requires_grad_() for rows in (n, 11))
    common = hidden, head, torch.randint(0, 11, (n,), generator=g), lengths, etw_and_retain(lengths), temperature
    lean, plain = etw.lean_loss(*common, chunk), plain_loss(*common)
    assert_close(lean, plain, rtol=1e-5, atol=1e-6)
    lean, plain = (torch.autograd.grad(2 * found[0], (hidden, head)) for found in (lean, plain))
    assert_close(lean, plain, rtol=1e-4, atol=1e-6)


def test_lean_loss_in_bfloat16_is_no_further_from_float64_than_the_plain_form():
    g, lengths = torch.Generator().manual_seed(0), [30, 20, 40, 10]
    exact = [torch.randn(rows, 32, generator=g).bfloat16().double() for rows in (100, 500)]
    targets = torch.randint(0, 500, (100,), generator=g)

    def found(f, dtype, *rest):
        hidden, head = (t.to(dtype).requires_grad_() for t in exact)
        loss, _, entropy = f(hidden, head, targets, lengths, etw_and_retain(lengths), 1.0, *rest)
        return [t.double() for t in (loss.detach(), entropy, *torch.autograd.grad(loss, (hidden, head)))]

    lean, plain = found(etw.lean_loss, torch.bfloat16, 50), found(plain_loss, torch.bfloat16)
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
        etw.lean_loss(hidden, head, targets, lengths, etw_and_retain(lengths), chunk=chunk)[0].backward()
    assert seen.numbers == chunk * vocabulary
