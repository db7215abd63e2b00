"""The weighting maths: properties of the method, its closed-form gradient, and the loop
written from the paper."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.testing import assert_close

import etw

ROOT = Path(etw.__file__).parent


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
    hidden, head = (torch.tensor(draw(arrays("float64", (rows, d), elements=number)))
                    for rows in (n, v))
    return hidden, head, torch.tensor(draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))


def every_weighting(logprobs, mask, entropy):
    """{name: weights} of all methods on the same tokens, with made-up reference and spans."""
    spans = mask & (torch.arange(mask.shape[1]) % 2 == 0)
    tokens = etw.Tokens(logprobs, entropy, mask, logprobs.detach() * 0.5, spans, entropy**2)
    return {name: etw.weigh(name, tokens) for name in etw.WEIGHTINGS}


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
        z = [math.fsum(h * w for h, w in zip(hidden[i].tolist(), row, strict=True))
             for row in head.tolist()]
        top = max(z)
        log_norm = top + math.log(math.fsum(math.exp(x - top) for x in z))
        assert logprobs[i].item() == pytest.approx(z[target] - log_norm, rel=1e-4, abs=1e-4)
        scaled = [math.exp((x - top) / temperature) for x in z]
        q = [s / math.fsum(scaled) for s in scaled]
        assert entropy[i].item() == pytest.approx(
            -math.fsum(p * math.log(p) for p in q if p > 0), rel=1e-3, abs=1e-4)


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
    hidden, head = (torch.ones(1, 1, dtype=torch.bfloat16),
                    torch.zeros(32_000, 1, dtype=torch.bfloat16))
    logprobs, entropy = etw.token_stats(hidden, head, torch.tensor([0]))
    assert [entropy.item(), -logprobs.item()] == pytest.approx([math.log(32_000)] * 2, rel=1e-4)


@given(problems(), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_numbers_from_logits_are_those_from_hidden_states(problem, temperature):
    hidden, head, targets = problem
    expected = etw.token_stats(hidden, head, targets, temperature)
    assert_close(etw.logit_stats(hidden @ head.T, targets, temperature), expected, rtol=0, atol=0)


def test_logits_of_more_rows_than_a_piece_give_the_same_numbers_and_gradients_as_each_row_alone():
    logits = torch.randn(600, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(600) % 7
    alone = [etw.logit_stats(logits[i:i + 1], targets[i:i + 1]) for i in range(600)]
    for together, single in zip(
            etw.logit_stats(logits, targets), zip(*alone, strict=True), strict=True):
        assert_close(together, torch.cat(single))
    expected = torch.nn.functional.one_hot(targets, 7) - torch.softmax(logits, -1)
    grad = torch.autograd.grad(etw.logit_stats(logits, targets)[0].sum(), logits)[0]
    assert_close(grad, expected.detach(), atol=1e-6, rtol=1e-5)


def test_labels_of_other_trainers_are_shifted_once_and_minus_100_is_no_token():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
    logprobs, entropy, mask = etw.label_stats(logits, labels)
    assert mask.tolist() == [[False, True, True], [True, False, False]]
    for b, t, target in ((0, 1, 3), (0, 2, 1), (1, 0, 2)):
        expected = etw.logit_stats(logits[b, t][None], torch.tensor([target]))
        assert_close((logprobs[b, t], entropy[b, t]), (expected[0][0], expected[1][0]))
    assert not logprobs[~mask].any() and not entropy[~mask].any()


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
    """Two tokens with p = 0.5: one alternative, or a thousand. No weight made of p can see the
    difference."""
    sharp, flat = torch.zeros(1001), torch.full((1001,), 0.5 / 1000)
    sharp[:2], flat[0] = 0.5, 0.5
    logits = torch.stack([sharp, flat]).log().clamp_min(-1e4)
    logprobs, entropy = etw.token_stats(torch.eye(2), logits.T, torch.tensor([0, 0]))
    weights = every_weighting(logprobs[None], torch.ones(1, 2, dtype=torch.bool), entropy[None])
    assert weights["etw"][0, 1] > 4 * weights["etw"][0, 0]
    for name in ("wga", "imp", "satimp", "uniform"):
        assert_close(weights[name][0, 0], weights[name][0, 1], msg=name)


@given(masked(50))
def test_every_weighting_is_finite_and_zero_outside_the_mask_and_only_keep_is_ever_negative(case):
    nll, mask = case
    for name, weights in every_weighting(-nll, mask, nll).items():
        assert weights.shape == mask.shape and weights.isfinite().all(), name
        assert name == "keep" or (weights >= 0).all(), name
        assert (weights[~mask] == 0).all(), name


@given(masked(), st.integers(1, 4))
def test_padding_changes_nothing_even_if_it_holds_nan(case, width):
    values, mask = case
    wide, wide_mask = (torch.nn.functional.pad(t, (0, width), value=v)
                       for t, v in ((values, math.nan), (mask, False)))
    for name, weights in every_weighting(-values, mask, values).items():
        padded = every_weighting(-wide, wide_mask, wide)[name]
        assert_close(padded, torch.nn.functional.pad(weights, (0, width)), msg=name)
    assert_close(etw.forget_loss(-wide, wide_mask.double(), wide_mask),
                 etw.forget_loss(-values, mask.double(), mask))
    assert_close(etw.retain_loss(-wide, wide_mask), etw.retain_loss(-values, mask))


# Weights of two tokens with p = 1/2 and 1/4, p_ref = 1/4 twice, H = 1 and 3 (before: 1 and 7), the
# second in a span.
FORMULAS = [
    ("keep", (0.0, 1.0, 8.0), [0.25 * 2 / 3 - 8 * 0.75, 1.75 * 0.4]),
    ("keep", (math.log(2), 4.0, 0.0), [0.25, 1.75 * 2 / 17]),
    ("etw", (), [0.5, 1.5]), ("uniform", (), [1, 1]), ("spans", (), [0, 2]),
    ("wga", (), [0.5, 0.25]), ("wga", (2.0,), [0.25, 0.0625]),
    ("imp", (), [0.5, 0.75]), ("imp", (2.0,), [0.25, 0.5625]),
    ("satimp", (), [0.5**5 * 0.5**0.1, 0.25**5 * 0.75**0.1]),
    ("satimp", (1.0, 1.0), [0.25, 0.1875]),
    ("tnpo", (), [2 * 0.5**4 / (0.5**4 + 0.25**4), 1]), ("tnpo", (1.0,), [4 / 3, 1]),
    ("npo", (), [2 * 0.5**0.1 / (0.5**0.1 + 0.25**0.1)] * 2), ("npo", (1.0,), [4 / 3, 4 / 3]),
]


@pytest.mark.parametrize("name, beta, expected", FORMULAS)
def test_weights_are_those_of_the_table_of_formulas(name, beta, expected):
    logprobs, entropy = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1.0, 3.0]])
    reference, spans = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[False, True]])
    mask, before = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 7.0]])
    tokens = etw.Tokens(logprobs, entropy, mask, reference, spans, before)
    assert etw.weigh(name, tokens, *beta).tolist() == [pytest.approx(expected)]


def test_every_method_of_the_paper_has_its_formula_tested():
    assert {"etw", "uniform", "wga", "tnpo", "npo", "imp", "satimp", "spans"} <= {
        row[0] for row in FORMULAS}


def test_keep_stops_pushing_a_token_that_is_surprising_enough_and_trains_the_others_to_stay():
    """What plain ascent lacks: an end to the push, and a hold on the words around the facts."""
    logprobs = torch.tensor([[-0.001, -0.001, -9.0]])
    tokens = etw.Tokens(logprobs, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool),
                        reference_entropy=torch.tensor([[0.0, 1.5, 1.5]]))
    structural, known, forgotten = etw.weigh("keep", tokens)[0].tolist()
    assert structural < 0 < forgotten < 1e-9 < 1 < known


def test_where_no_token_is_labelled_the_span_weights_are_zeros():
    assert not etw.weigh("spans", etw.ONE._replace(spans=torch.tensor([[False]]))).any()


def test_tnpo_survives_probabilities_that_underflow():
    logprobs, reference = torch.tensor([[-400.0, -1.0]]), torch.tensor([[-399.0, -900.0]])
    tokens = etw.Tokens(logprobs, logprobs, torch.ones(1, 2, dtype=torch.bool), reference)
    assert etw.weigh("tnpo", tokens).tolist() == [pytest.approx([2 / (1 + math.exp(4)), 2.0])]


def test_npo_weight_is_the_gradient_of_the_npo_loss():
    beta, logprobs = 0.1, torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    reference, mask = torch.tensor([[-0.1, -0.2, -0.3]]), torch.ones(1, 3, dtype=torch.bool)
    loss = -2 / beta * torch.nn.functional.logsigmoid(-beta * (logprobs - reference).sum())
    weights = etw.weigh("npo", etw.Tokens(logprobs, logprobs, mask, reference))
    assert_close(torch.autograd.grad(loss, logprobs)[0], weights)


def test_what_a_formula_reads_beside_the_two_numbers_is_found_out():
    def readers(field):
        return {name for name in etw.WEIGHTINGS if etw.needs(name, field)}

    assert readers("reference") == {"tnpo", "npo"} and readers("reference_entropy") == {"keep"}
    assert readers("spans") == {"spans"}


def test_the_readme_recipe_pasted_into_etw_passes_all_tests_of_the_weighting_maths(tmp_path):
    """A fork touches one place: the recipe stands at the end of etw.py, and nothing else knows of
    it."""
    readme = (ROOT / "README.md").read_text("utf-8")
    recipe = next(b
                  for b in re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
                  if "def mine" in b)
    (tmp_path / "tests").mkdir()
    (tmp_path / "etw.py").write_text(
        (ROOT / "etw.py").read_text("utf-8") + "\n\n" + recipe, "utf-8")
    (tmp_path / "tests/test_etw.py").write_bytes(Path(__file__).read_bytes())
    (tmp_path / "README.md").write_text(readme, "utf-8")
    (tmp_path / "conftest.py").write_text(
        "from hypothesis import settings\n"
        "settings.register_profile('x', deadline=None, max_examples=10, derandomize=True)\n"
        "settings.load_profile('x')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "--rootdir", str(tmp_path), "-k", "not pasted"]
    done = subprocess.run([*command, str(tmp_path / "tests")],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


ONE, EMPTY = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)


def two(**more):
    return etw.Tokens(ONE, ONE, ~EMPTY)._replace(**more)


@pytest.mark.parametrize("call, message", [
    (lambda: etw.etw_weights(ONE, EMPTY), "mask is empty"),
    (lambda: etw.retain_loss(ONE, EMPTY), "mask is empty"),
    (lambda: etw.forget_loss(ONE, ONE, EMPTY), "mask is empty"),
    (lambda: etw.weigh("wga", two(mask=EMPTY)), "mask is empty"),
    (lambda: etw.etw_weights(ONE.T, ~EMPTY), "shapes"),
    (lambda: etw.weigh("wga", two(entropy=ONE.T)), "shapes"),
    (lambda: etw.weigh("tnpo", two()), "tnpo needs `reference`"),
    (lambda: etw.weigh("npo", two()), "npo needs `reference`"),
    (lambda: etw.weigh("spans", two()), "spans needs `spans`"),
    (lambda: etw.weigh("etw", two(), 2.0), "etw takes 0 β's"),
    (lambda: etw.weigh("wga", two(), 1.0, 2.0), "wga takes 1 β"),
    (lambda: etw.weigh("satimp", two(), 1.0), "satimp takes 2 β's"),
    *((lambda t=t: etw.token_stats(ONE, ONE, torch.tensor([0]), t), "temperature")
      for t in (0, -1.0, math.nan)),
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
    """The closed form. A flipped sign passes every invariance, weights that carry a gradient pass
    even the slow loop; neither passes here."""
    hidden, head, targets = problem
    hidden.requires_grad_()
    logprobs, entropy = etw.token_stats(hidden, head, targets)
    logprobs, entropy, mask = (logprobs[None], entropy[None],
                               torch.ones(1, len(targets), dtype=torch.bool))
    softmax, onehot = (torch.softmax(hidden @ head.T, -1),
                       torch.nn.functional.one_hot(targets, len(head)))
    for name, weights in every_weighting(logprobs, mask, entropy).items():
        assert not weights.requires_grad, name
        carrying = weights + logprobs - logprobs.detach()  # even if a weighting forgets to detach
        grad = torch.autograd.grad(etw.forget_loss(logprobs, carrying, mask), hidden,
                                   retain_graph=True)[0]
        expected = weights[0, :, None] / len(targets) * (onehot - softmax) @ head
        assert_close(grad, expected.detach(), atol=1e-5, rtol=1e-4, msg=name)


@given(masked(20), st.integers(1, 6))
def test_losses_of_the_parts_of_a_step_add_up_to_the_loss_of_the_whole(case, cut):
    """The mean of means would be another number."""
    nll, mask = case
    parts = [slice(start, start + cut) for start in range(0, len(mask), cut)]
    count = int(mask.sum())
    retain = sum(etw.retain_loss(-nll[rows], mask[rows], count) for rows in parts)
    forget = sum(etw.forget_loss(-nll[rows], nll[rows], mask[rows], count) for rows in parts)
    assert_close(retain, etw.retain_loss(-nll, mask))
    assert_close(forget, etw.forget_loss(-nll, nll, mask))
