"""The weighting maths: properties of the method, its closed-form gradient, and the loop written from the paper."""
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.testing import assert_close

import etw

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)


@st.composite
def masked(draw, low=0.0, high=1.0):
    """(values (B, T) float64, mask (B, T) bool with at least one True)."""
    shape = draw(SHAPES)
    number = st.floats(low, high, allow_nan=False, width=32)
    values = torch.tensor(draw(arrays("float64", shape, elements=number)))
    mask = torch.tensor(draw(arrays("bool", shape)))
    assume(mask.any())
    return values, mask


@st.composite
def problems(draw, size=20.0):
    """hidden (N, D), head (V, D), targets (N,): one prediction task in float64."""
    n, d, v = draw(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 9)))
    number = st.floats(-size, size, allow_nan=False, width=32)
    hidden, head = (torch.tensor(draw(arrays("float64", (rows, d), elements=number))) for rows in (n, v))
    return hidden, head, torch.tensor(draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))


def every_weighting(logprobs, mask, entropy=None):
    """{name: weights} of all methods on the same tokens, with made-up reference and spans."""
    known = {"reference": logprobs * 0.5, "spans": mask & (torch.arange(mask.shape[1]) % 2 == 0)}
    entropy = logprobs.exp() if entropy is None else entropy
    return {name: weigh(logprobs, entropy, mask, **known) for name, weigh in etw.WEIGHTINGS.items()}


# ---- token statistics


@given(problems(), st.floats(0.05, 20))
def test_entropy_lies_between_zero_and_log_vocab(problem, temperature):
    hidden, head, targets = problem
    logprobs, entropy = etw.token_stats(hidden, head, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    assert (entropy <= math.log(len(head)) * (1 + 1e-6)).all()


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


def test_temperature_changes_the_entropy_and_never_the_log_probability():
    hidden, head, targets = torch.eye(3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    (cold_logprobs, cold), (warm_logprobs, warm) = (etw.token_stats(hidden, head, targets, t) for t in (0.5, 2.0))
    assert_close(cold_logprobs, warm_logprobs, rtol=0, atol=0)
    assert (cold < warm).all()


def test_entropy_goes_to_zero_as_temperature_does_and_to_log_vocab_as_it_grows():
    hidden, head, targets = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0])
    assert etw.token_stats(hidden, head, targets, 1e-30)[1].item() == 0
    assert etw.token_stats(hidden, head, targets, 1e30)[1].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        etw.token_stats(torch.ones(1, 1), torch.ones(2, 1), torch.tensor([0]), temperature)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("gap", [1.0, 30.0, 104.0, 1e4, 1e30, 3e38])
def test_values_and_gradients_are_finite_at_any_logit_gap(gap, temperature):
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = torch.tensor([[gap], [-gap], [0.0]], requires_grad=True)
    logprobs, entropy = etw.token_stats(hidden, head, torch.tensor([0]), temperature)
    logprobs.sum().backward()
    for numbers in (logprobs, entropy, hidden.grad, head.grad):
        assert numbers.isfinite().all()


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
    assert entropy.item() == pytest.approx(math.log(32_000), rel=1e-5)
    assert logprobs.item() == pytest.approx(-math.log(32_000), rel=1e-5)


# ---- ETW weights


@given(masked())
def test_weights_sum_to_the_number_of_answer_tokens_of_each_sequence(case):
    entropy, mask = case
    assert_close(etw.etw_weights(entropy, mask).sum(1), mask.sum(1).double())


@given(masked())
def test_weights_equal_the_loop_written_from_the_paper(case):
    entropy, mask = case
    weights = etw.etw_weights(entropy, mask)
    for b in range(len(mask)):
        inside = [t for t in range(mask.shape[1]) if mask[b, t]]
        total = math.fsum(entropy[b, t].item() for t in inside)
        for t in range(mask.shape[1]):
            expected = 0.0 if t not in inside else len(inside) * entropy[b, t].item() / total if total else 1.0
            assert weights[b, t].item() == pytest.approx(expected)


@given(masked(), st.floats(1e-30, 1e30))
def test_weights_do_not_depend_on_the_unit_of_entropy(case, scale):
    entropy, mask = case
    assume(entropy[entropy > 0].numel() == 0 or entropy[entropy > 0].min() > 1e-200)
    assert_close(etw.etw_weights(entropy * scale, mask), etw.etw_weights(entropy, mask))


@given(masked(low=0.125), st.floats(0.1, 1e6))
def test_a_constant_added_to_every_entropy_moves_the_weights_towards_uniform(case, shift):
    entropy, mask = case
    before, after = (etw.etw_weights(e, mask)[mask] - 1 for e in (entropy, entropy + shift))
    assert (after.abs() <= before.abs() + 1e-9).all()


@given(problems(size=5), st.floats(-1e3, 1e3))
def test_a_constant_added_to_every_logit_changes_nothing(problem, shift):
    hidden, head, targets = problem
    ones = torch.ones(len(hidden), 1, dtype=hidden.dtype)
    shifted = torch.cat([head, torch.full((len(head), 1), shift, dtype=head.dtype)], 1)
    for a, b in zip(etw.token_stats(hidden, head, targets),
                    etw.token_stats(torch.cat([hidden, ones], 1), shifted, targets), strict=True):
        assert_close(a, b, atol=1e-3, rtol=1e-3)


@given(masked(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_every_weighting(case, random):
    values, mask = case
    order = list(range(mask.shape[1]))
    random.shuffle(order)
    known = {"reference": -values, "spans": values > 0.5}
    for weigh in etw.WEIGHTINGS.values():
        direct = weigh(-values, values, mask, **known)
        moved = weigh(-values[:, order], values[:, order], mask[:, order], **{k: v[:, order] for k, v in known.items()})
        assert_close(moved, direct[:, order])


@given(masked(), st.integers(1, 4))
def test_padding_changes_nothing_even_if_it_holds_nan(case, width):
    values, mask = case
    junk = torch.full((len(mask), width), float("nan"), dtype=values.dtype)
    wide = torch.cat([values, junk], 1)
    wide_mask = torch.cat([mask, torch.zeros_like(junk, dtype=torch.bool)], 1)
    for name, weights in every_weighting(-values, mask, values).items():
        padded = every_weighting(-wide, wide_mask, wide)[name]
        assert_close(padded[:, :mask.shape[1]], weights, msg=name)
        assert (padded[:, mask.shape[1]:] == 0).all(), name
    assert_close(etw.forget_loss(-wide, wide_mask.double(), wide_mask), etw.forget_loss(-values, mask.double(), mask))
    assert_close(etw.retain_loss(-wide, wide_mask), etw.retain_loss(-values, mask))


def test_zero_entropy_everywhere_in_a_sequence_gives_ones_and_no_answer_gives_zeros():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    entropy = torch.tensor([[0.0, 0.0, 9.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    assert_close(etw.etw_weights(entropy, mask), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))


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


# ---- all weightings


@given(masked(0, 50))
def test_every_weighting_is_finite_not_negative_and_zero_outside_the_mask(case):
    nll, mask = case
    for name, weights in every_weighting(-nll, mask).items():
        assert weights.shape == mask.shape and weights.isfinite().all() and (weights >= 0).all(), name
        assert (weights[~mask] == 0).all(), name


def test_formulas_of_the_table_at_p_one_half():
    logprobs, entropy, mask = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    reference, spans = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[False, True]])
    expected = {
        "etw": [0.5, 1.5], "uniform": [1, 1], "wga": [0.5, 0.25], "imp": [0.5, 0.75], "spans": [0, 2],
        "tnpo": [2 * 0.5**4 / (0.5**4 + 0.25**4), 1], "npo": [2 * 0.5**0.1 / (0.5**0.1 + 0.25**0.1)] * 2,
        "satimp": [0.5**5 * 0.5**0.1, 0.25**5 * 0.75**0.1],
    }
    assert expected.keys() == etw.WEIGHTINGS.keys()
    for name, weigh in etw.WEIGHTINGS.items():
        weights = weigh(logprobs, entropy, mask, reference=reference, spans=spans)
        assert_close(weights, torch.tensor([expected[name]], dtype=torch.float32), msg=name)


def test_beta_reaches_the_formula():
    logprobs, mask = torch.tensor([[0.5]]).log(), torch.ones(1, 1, dtype=torch.bool)
    known = {"reference": torch.tensor([[0.25]]).log()}
    found = [etw.WEIGHTINGS[n](logprobs, logprobs, mask, beta=b, **known).item()
             for n, b in (("wga", 2.0), ("imp", 3.0), ("satimp", (1.0, 1.0)), ("tnpo", 1.0), ("npo", 1.0))]
    assert found == pytest.approx([0.25, 0.125, 0.25, 4 / 3, 4 / 3])


def test_tnpo_survives_probabilities_that_underflow():
    logprobs, reference = torch.tensor([[-400.0, -1.0]]), torch.tensor([[-399.0, -900.0]])
    weights = etw.tnpo(logprobs, logprobs, torch.ones(1, 2, dtype=torch.bool), reference=reference)
    assert_close(weights, torch.tensor([[2 * torch.sigmoid(torch.tensor(-4.0)), 2.0]]))


def test_npo_weight_is_the_gradient_of_the_npo_loss():
    beta, logprobs = 0.1, torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    reference, mask = torch.tensor([[-0.1, -0.2, -0.3]]), torch.ones(1, 3, dtype=torch.bool)
    loss = -2 / beta * torch.nn.functional.logsigmoid(-beta * (logprobs - reference).sum())
    assert_close(torch.autograd.grad(loss, logprobs)[0], etw.npo(logprobs, logprobs, mask, reference=reference))


def test_spans_without_a_labelled_token_give_zeros():
    mask = torch.ones(2, 4, dtype=torch.bool)
    inside = torch.tensor([[False] * 4, [True, False, False, False]])
    assert_close(etw.spans(mask.float(), mask.float(), mask, spans=inside), torch.tensor([[0.0] * 4, [4.0, 0, 0, 0]]))


@pytest.mark.parametrize("name, missing", [("tnpo", "log-probabilities"), ("npo", "log-probabilities"), ("spans", "spans")])
def test_a_weighting_says_what_it_lacks(name, missing):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=missing):
        etw.WEIGHTINGS[name](-one, one, one.bool())


def test_an_empty_mask_and_unequal_shapes_are_refused():
    one, empty = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    for call in (lambda: etw.etw_weights(one, empty), lambda: etw.forget_loss(one, one, empty), lambda: etw.retain_loss(one, empty)):
        with pytest.raises(ValueError, match="mask is empty"):
            call()
    with pytest.raises(ValueError, match="shapes"):
        etw.etw_weights(torch.ones(2, 1), ~empty)


# ---- losses


@given(masked(0, 20), st.floats(0, 3))
def test_losses_equal_the_loops_written_from_the_paper(case, weight):
    nll, mask = case
    tokens = [(b, t) for b, t in mask.nonzero().tolist()]
    weights = mask * (1 + nll) * weight
    expected = math.fsum(weights[b, t].item() * -nll[b, t].item() for b, t in tokens) / len(tokens)
    assert etw.forget_loss(-nll, weights, mask).item() == pytest.approx(expected)
    assert etw.retain_loss(-nll, mask).item() == pytest.approx(math.fsum(nll[b, t].item() for b, t in tokens) / len(tokens))


@given(problems(size=5))
def test_gradient_is_weight_times_onehot_minus_softmax(problem):
    """The closed form. A flipped sign passes every invariance, weights that carry a gradient pass even the slow loop; neither
    passes here."""
    hidden, head, targets = problem
    hidden.requires_grad_()
    logprobs, entropy = etw.token_stats(hidden, head, targets)
    logprobs, mask = logprobs[None], torch.ones(1, len(targets), dtype=torch.bool)
    known = {"reference": logprobs.detach() * 0.5, "spans": torch.arange(len(targets))[None] % 2 == 0}
    for name, weigh in etw.WEIGHTINGS.items():
        weights = weigh(logprobs, entropy[None], mask, **known)
        grad = torch.autograd.grad(etw.forget_loss(logprobs, weights, mask), hidden, retain_graph=True)[0]
        softmax = torch.softmax((hidden @ head.T).float(), -1)
        onehot = torch.nn.functional.one_hot(targets, len(head))
        expected = weights[0, :, None] / len(targets) * (onehot - softmax)
        assert_close(grad, (expected.double() @ head).detach(), atol=1e-5, rtol=1e-4, msg=name)


def test_descending_the_loss_makes_the_forget_tokens_less_likely_and_the_retain_tokens_more():
    logits = torch.zeros(2, 3, requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)[:, 0]
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = etw.forget_loss(logprobs[None, :1], mask.float(), mask) + etw.retain_loss(logprobs[None, 1:], mask)
    loss.backward()
    stepped = torch.log_softmax(logits - logits.grad, -1)[:, 0]
    assert stepped[0] < logprobs[0] and stepped[1] > logprobs[1]


# ---- the lean form


def plain_loss(hidden, head, targets, lengths, coefficients, temperature):
    """The definition: token_stats on everything at once, the coefficients on the padded (B, T), one autograd pass."""
    logprobs, entropy = etw.token_stats(hidden, head, targets, temperature)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = [torch.zeros(mask.shape, device=s.device).masked_scatter(mask, s) for s in (logprobs, entropy)]
    c = coefficients(slice(0, len(lengths)), *(p.detach() for p in padded), mask)
    return (c * padded[0])[mask].sum(), logprobs, entropy


def etw_and_retain(lengths):
    """Coefficients of L_r + 0.3 L_f with every other sequence a forget sequence."""
    forget = torch.arange(len(lengths))[:, None] % 2 == 0
    n = torch.tensor(lengths)
    n_forget, n_retain = n[forget[:, 0]].sum(), n[~forget[:, 0]].sum().clamp_min(1)
    return lambda rows, logprobs, entropy, mask: torch.where(
        forget[rows], 0.3 * etw.etw_weights(entropy, mask) / n_forget, -1 / n_retain)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.sampled_from([1.0, 0.5, 2.0]))
def test_lean_loss_equals_its_definition_for_any_chunk(lengths, chunk, temperature):
    g = torch.Generator().manual_seed(sum(lengths))
    hidden, head = torch.randn(sum(lengths), 4, generator=g), torch.randn(11, 4, generator=g)
    targets = torch.randint(0, 11, (sum(lengths),), generator=g)
    hidden.requires_grad_(), head.requires_grad_()
    lean, plain = (f(hidden, head, targets, lengths, etw_and_retain(lengths), temperature, *rest)
                   for f, rest in ((etw.lean_loss, [chunk]), (plain_loss, [])))
    for a, b in zip(lean, plain, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(2 * lean[0], (hidden, head)), torch.autograd.grad(2 * plain[0], (hidden, head)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_lean_loss_in_bfloat16_is_no_further_from_float64_than_the_plain_form():
    g = torch.Generator().manual_seed(0)
    lengths = [30, 20, 40, 10]
    exact = [torch.randn(100, 32, generator=g).bfloat16().double(), torch.randn(500, 32, generator=g).bfloat16().double()]
    targets = torch.randint(0, 500, (100,), generator=g)

    def gradients(f, dtype, *rest):
        hidden, head = (t.to(dtype).requires_grad_() for t in exact)
        loss, _, entropy = f(hidden, head, targets, lengths, etw_and_retain(lengths), 1.0, *rest)
        return [t.double() for t in (loss.detach(), entropy, *torch.autograd.grad(loss, (hidden, head)))]

    truth = gradients(plain_loss, torch.float64)
    for name, t, lean, plain in zip(("loss", "entropy", "hidden", "head"), truth, gradients(etw.lean_loss, torch.bfloat16, 50),
                                    gradients(plain_loss, torch.bfloat16), strict=True):
        assert (lean - t).abs().max() <= 1.1 * (plain - t).abs().max() + 1e-5, name


def test_lean_loss_never_holds_more_than_a_chunk_of_logits():
    class Biggest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return result

    lengths, vocabulary, chunk = [50] * 20, 3000, 100  # 1000 tokens
    hidden, head = torch.randn(1000, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with Biggest() as seen:
        etw.lean_loss(hidden, head, torch.zeros(1000, dtype=torch.long), lengths, etw_and_retain(lengths), chunk=chunk)[0].backward()
    assert seen.numbers == chunk * vocabulary
