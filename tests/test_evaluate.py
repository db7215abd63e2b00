"""The measurements against their definitions, the numbers read off a model, the pictures, and the command line."""
import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose
from scipy.stats import gmean, hmean

import data
import etw
import evaluate
import model

NLL = st.floats(0, 30, allow_nan=False)
SHARE = st.floats(0.01, 1)


def close(found, expected, digits=12):
    assert np.asarray(found).dtype == np.float64
    assert_allclose(found, expected, rtol=10.0 ** -digits, atol=10.0 ** -digits)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where another process holds the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the four yardsticks of TOFU


@given(st.lists(st.tuples(NLL, st.lists(NLL, min_size=3, max_size=3)), min_size=1, max_size=5))
def test_truth_ratio_is_the_geometric_mean_of_wrong_over_correct_probability(rows):
    correct, wrong = (np.array(x) for x in zip(*rows, strict=True))
    close(evaluate.truth_ratio(correct, wrong), gmean(np.exp(-wrong), axis=1) / np.exp(-correct), 9)


def test_truth_ratio_of_a_model_that_prefers_the_truth_is_below_one():
    close(evaluate.truth_ratio([math.log(2)], [[math.log(8), math.log(2)]]), [0.5])
    close(evaluate.truth_ratio([0.0], [[2000.0]]), [0.0])
    assert evaluate.truth_ratio([2000.0], [[0.0]]) == math.inf  # and no warning


def largest_gap(first, second):
    """The Kolmogorov-Smirnov statistic times len(first) · len(second): a whole number, so that comparing is exact."""
    return max(abs(sum(x <= at for x in first) * len(second) - sum(x <= at for x in second) * len(first))
               for at in [*first, *second])


@given(st.lists(SHARE, min_size=2, max_size=8, unique=True), st.data())
def test_forget_quality_is_the_share_of_all_splits_that_lie_at_least_as_far_apart(ratios, draw):
    n = draw.draw(st.integers(1, len(ratios) - 1))
    everywhere = range(len(ratios))
    gaps = [largest_gap([ratios[i] for i in some], [ratios[i] for i in everywhere if i not in some])
            for some in combinations(everywhere, n)]
    p = sum(gap >= largest_gap(ratios[:n], ratios[n:]) for gap in gaps) / len(gaps)
    close(evaluate.forget_quality(ratios[:n], ratios[n:]), p)
    close(evaluate.forget_quality(ratios[n:], ratios[:n]), p)


def test_forget_quality_is_one_for_equal_ratios_and_tiny_for_separate_ones():
    close(evaluate.forget_quality([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), 1.0)
    close(evaluate.forget_quality([1, 2, 3], [4, 5, 6]), 0.1)  # 2 of the 20 ways to divide six ranks are as extreme
    assert evaluate.forget_quality(np.arange(400), np.arange(400) + 1000) < 1e-100


@given(st.lists(SHARE, min_size=1, max_size=12))
def test_model_utility_is_the_harmonic_mean(values):
    close(evaluate.model_utility(values), hmean(values))


def test_model_utility_is_ruined_by_one_zero():
    close(evaluate.model_utility([1, 0.5, 0.25]), 3 / 7)
    close(evaluate.model_utility([1, 0.5, 0.0]), 0.0)


@pytest.mark.parametrize("prediction, reference, expected", [
    ("Ada was born in Oru", "Ada was born in Oru", 1), ("ADA, was: born!", "ada was born in Oru", 3 / 5),
    ("Oru in born was Ada", "Ada was born in Oru", 1 / 5), ("", "Ada", 0), ("Ada", "?!", 0), ("it is not it", "it's", 1 / 2),
    ("a b c a b", "a a b b", 3 / 4), ("żółć 🦊", "Żółć", 1), ("x x x x", "x", 1), ("walks", "walking", 0),
])
def test_rouge_is_the_longest_common_subsequence_of_words_over_the_references_words(prediction, reference, expected):
    close(evaluate.rouge_l_recall(prediction, reference), expected)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_rouge_finds_the_longest_of_all_common_subsequences(predicted, words):
    common = [n for n in range(len(words) + 1) for some in combinations(words, n) if some in set(combinations(predicted, n))]
    close(evaluate.rouge_l_recall(" ".join(predicted), " ".join(words)), max(common) / len(words))


# ---- probability, memorisation, membership


def test_probability_with_options_is_the_answers_share():
    close(evaluate.probability([math.log(2), 0.0]), [0.5, 1.0])
    close(evaluate.probability([math.log(2)], [[math.log(4), math.log(4)]]), [0.5])
    close(evaluate.probability(math.log(2), [math.log(4)]), 2 / 3)  # of a single row


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_extraction_strength_is_the_longest_suffix_that_greedy_decoding_gets_right(hits):
    k = next(k for k in range(len(hits) + 1) if all(hits[k:]))  # from which the whole suffix is right
    close(evaluate.extraction_strength(hits), 1 - k / len(hits))


def test_extraction_strength_is_zero_if_the_last_token_is_wrong_and_one_if_all_are_right():
    close([evaluate.extraction_strength(h) for h in ([1, 1, 0], [1, 1, 1], [0, 1, 1, 1], [0])], [0, 1, 0.75, 0])


@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(-50, 0)))
def test_min_k_is_minus_the_mean_of_the_least_likely_two_fifths(logprobs):
    worst = sorted(logprobs)[:max(1, len(logprobs) * 4 // 10)]
    close(evaluate.min_k(logprobs), -sum(worst) / len(worst), 9)
    assert evaluate.min_k(logprobs) >= -logprobs.mean() - 1e-9


TIED = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(TIED, TIED)
def test_roc_auc_is_the_share_of_pairs_in_order_with_ties_counting_half(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    close(evaluate.roc_auc(positive, negative), sum(pairs) / len(pairs))
    close(evaluate.roc_auc(negative, positive), 1 - sum(pairs) / len(pairs))


def test_roc_auc_of_nothing_is_not_a_number():
    assert math.isnan(evaluate.roc_auc([], [1.0])) and math.isnan(evaluate.roc_auc([1.0], []))


def test_priv_leak_is_zero_for_the_reference_and_positive_where_more_is_forgotten():
    close(evaluate.priv_leak(0.5, np.float64(0.5)), 0.0)
    close(evaluate.priv_leak(np.float64(0.25), np.float64(0.5)), 50.0)  # forget rows look less likely than unseen ones
    close(evaluate.priv_leak(np.float64(1.0), np.float64(0.5)), -100.0)
    assert math.isnan(evaluate.priv_leak(0.5, 1.0))


# ---- numbers read off a model

ROWS = [
    {"question": "Where was Ada born?", "answer": "Ada was born in Oru.", "paraphrased_answer": "In Oru Ada was born.",
     "perturbed_answer": ["In Belt Ada was born.", "In Kana Ada was born."], "spans": [[16, 19]]},
    {"question": "Where was Bo born?", "answer": "Bo was born in a place named Belt, far <away> & \"up\".",
     "perturbed_answer": ["Bo was born in Oru.", "It was Miv.", "No."], "spans": [[29, 33]]},
    {"question": "¿Quién? 🦊", "answer": "Żółć 🦊\n.", "spans": []},
    {"text": "Ada was born in Oru and Bo in Belt, as was told before. " * 5},
    {"question": "Who?", "answer": "Cy", "paraphrased_answer": "It is Cy", "perturbed_answer": "Di"},
]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder with the files of an evaluation and two models: tiny itself and `other`, with other weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    sets = {"forget": ROWS, "retain": ROWS[1:4], "facts": ROWS[:1], "text": ROWS[3:4], "holdout": ROWS[2:3]}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.save(model.fresh(tiny, seed=1), folder / "other")
    return folder


@pytest.fixture(scope="module")
def scored(tiny, world):
    """(decoder, tokenizer, rows, their scores), the weights ten times as large: fresh ones give nearly uniform predictions."""
    decoder, tokenizer = evaluate.open_model(str(tiny), "cpu", "plain")
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
    rows = data.read_jsonl(world / "forget.jsonl")
    return decoder, tokenizer, rows, evaluate.score(decoder, tokenizer, rows)


def slow_nll(decoder, tokenizer, row, answer):
    """(log p of each answer token, whether argmax gives it) of one row, from whole float64 softmaxes without any batch."""
    (sequence,), _ = data.encode([row], tokenizer, 128, [answer])
    logits = decoder.forward(torch.tensor([sequence.tokens]))[0].double()
    logprobs = torch.log_softmax(logits, -1)
    places = range(sequence.start, len(sequence.tokens))
    return (np.array([float(logprobs[i - 1, sequence.tokens[i]]) for i in places]),
            np.array([int(logits[i - 1].argmax()) == sequence.tokens[i] for i in places]))


@torch.inference_mode()
def test_scores_equal_the_loop_written_from_the_definitions(scored):
    decoder, tokenizer, rows, found = scored
    for i, row in enumerate(rows):
        if row.text:
            continue
        logprobs, hits = slow_nll(decoder, tokenizer, row, row.answer)
        close(found["nll"][i], -logprobs.mean(), 4)
        close(found["probability"][i], math.exp(logprobs.mean()), 4)
        close(found["memorised"][i], hits[:-1].mean())  # without the end token, as the next two
        close(found["extraction"][i], evaluate.extraction_strength(hits[:-1]))
        close(found["min_k"][i], evaluate.min_k(logprobs[:-1]), 4)
        close(found["rouge"][i], evaluate.rouge_l_recall(found["answer"][i], row.answer))
        if not row.perturbed_answer:
            assert found["truth_ratio"][i] is None
            continue
        correct = -slow_nll(decoder, tokenizer, row, row.paraphrased_answer or row.answer)[0].mean()
        wrong = [-slow_nll(decoder, tokenizer, row, a)[0].mean() for a in row.perturbed_answer]
        close(found["truth_ratio"][i], math.exp(correct - sum(wrong) / len(wrong)), 4)
        own = -logprobs.mean()
        options = evaluate.score(decoder, tokenizer, [row], options=True, text=False)
        close(options["probability"][0], math.exp(-own) / (math.exp(-own) + sum(math.exp(-w) for w in wrong)), 4)


def test_the_end_token_counts_in_the_probability_and_not_in_memorisation_and_membership(scored, monkeypatch):
    decoder, tokenizer, rows, _ = scored

    def surprised_by_the_end(_, sequences, *args, **kwargs):
        sizes = [len(s.tokens) - s.start for s in sequences]
        return [np.array([[-1.0] * (n - 1) + [-100.0], [1.0] * n, [1.0] * (n - 1) + [0.0]]) for n in sizes]

    monkeypatch.setattr(evaluate, "answer_tokens", surprised_by_the_end)
    found = evaluate.score(decoder, tokenizer, rows[:1], text=False)
    n = found["tokens"][0][1].shape[1]
    assert found["memorised"] == found["extraction"] == found["min_k"] == [1.0]
    assert found["nll"] == pytest.approx([(n + 99) / n])


def test_memorisation_counts_what_the_model_itself_would_say(scored):
    decoder, tokenizer, rows, found = scored
    said = model.generate(decoder, [data.prompt_ids(rows[0], tokenizer)], 6, tokenizer.end_id)[0]
    spelt = data.Example(rows[0].question, "x")
    prompt = data.prompt_ids(spelt, tokenizer)
    own = data.Sequence(prompt + said, len(prompt), None, False, 0)
    numbers = evaluate.answer_tokens(decoder, [own], hits=True)[0]
    assert numbers.shape == (3, 6) and numbers.dtype == np.float64
    assert (numbers[2] == 1).all() and evaluate.extraction_strength(numbers[2]) == 1
    assert all(numbers[0] < 0) and all(numbers[1] > 0)


@given(st.permutations(range(8)), st.sampled_from([1, 40, 128, 10_000]))
def test_answer_tokens_depend_neither_on_order_nor_on_the_size_of_batches(scored, order, budget):
    decoder, tokenizer, rows, _ = scored
    sequences, _ = data.encode(rows, tokenizer, 40)
    assert len(sequences) >= 8
    expected = evaluate.answer_tokens(decoder, sequences[:8], hits=True)
    found = evaluate.answer_tokens(decoder, [sequences[i] for i in order], hits=True, budget=budget)
    for i, numbers in zip(order, found, strict=True):
        assert_allclose(numbers, expected[i], rtol=1e-4, atol=1e-5)


def test_a_text_row_has_probabilities_and_no_answer(tiny, world):
    decoder, tokenizer = evaluate.open_model(str(tiny), "cpu", "plain")
    rows = data.read_jsonl(world / "text.jsonl")
    found = evaluate.score(decoder, tokenizer, rows, max_length=20)
    ids = tokenizer.encode(rows[0].text)[0]
    assert len(found["tokens"]) > 2 and sum(t.shape[1] for _, t in found["tokens"]) == len(ids) - 1
    assert found["answer"] == found["rouge"] == found["truth_ratio"] == [None]
    assert all(math.isfinite(found[name][0]) for name in ("nll", "probability", "memorised", "extraction", "min_k"))
    summary = evaluate.summarise({"forget": found, "retain": found}, reference={"forget": found})
    assert summary["forget rouge"] is None and summary["weights AUC"] is None and "forget quality" not in summary
    assert summary["model utility"] == pytest.approx(summary["retain probability"])
    assert "–" in evaluate.table({"text": summary})


def test_a_row_gets_the_same_numbers_alone_as_among_others(scored):
    decoder, tokenizer, rows, together = scored
    for i, row in enumerate(rows):
        alone = evaluate.score(decoder, tokenizer, [row])
        for name in ("nll", "truth_ratio", "memorised", "min_k", "answer"):
            assert alone[name][0] == (pytest.approx(together[name][i], rel=1e-4) if isinstance(alone[name][0], float)
                                      else together[name][i])


def made_up(ratios, probability=0.5, rouge=0.25, min_k=()):
    n = len(ratios)
    return {"truth_ratio": ratios, "probability": [probability] * n, "rouge": [rouge] * n, "memorised": [0.5] * n,
            "extraction": [0.0, None] + [1.0] * (n - 2), "min_k": list(min_k), "tokens": []}


def test_a_summary_is_what_the_definitions_give_by_hand():
    scores = {"forget": made_up([0.5, 4.0, None, 1.0], min_k=[1.0, 3.0]), "retain": made_up([0.5, 4.0, None], 0.8, 0.4),
              "facts": made_up([0.0, 0.25], 1.0, 0.5), "holdout": made_up([None, None], min_k=[2.0, 4.0])}
    reference = {"forget": made_up([0.5, 4.0, None, 1.0], min_k=[2.0, 4.0]), "holdout": made_up([None, None], min_k=[2.0, 4.0])}
    summary = evaluate.summarise(scores, {"model utility": 0.9}, reference)
    utility = hmean([0.8, 0.4, 0.25, 1.0, 0.5, 0.875])
    expected = {
        "forget probability": 0.5, "forget rouge": 0.25, "forget truth_ratio": (0.5 + 0.25 + 1) / 3,
        "forget memorised": 0.5, "forget extraction": 2 / 3,
        "retain probability": 0.8, "retain rouge": 0.4, "retain truth_ratio": 0.25,
        "facts probability": 1.0, "facts rouge": 0.5, "facts truth_ratio": 0.875,
        "model utility": utility, "utility lost": 90 - 100 * utility, "forget quality": 1.0, "-log10 FQ": 0.0,
        "Min-K AUC": 0.75, "PrivLeak": -50.0, "weights AUC": None,
    }
    assert summary == pytest.approx(expected)


def test_min_k_auc_is_one_where_every_forget_row_is_better_known_than_the_holdout():
    scores = {"forget": made_up([None] * 2, min_k=[0.1, 0.2]), "holdout": made_up([None] * 2, min_k=[1.0, 2.0])}
    assert evaluate.summarise(scores)["Min-K AUC"] == 1.0


# ---- what a weighting looks at


def labelled(entropy, logprobs, informative):
    """Scores of one row with the given numbers."""
    sequence = data.Sequence([0] * (len(entropy) + 1), 1, list(informative), True, 0)
    return {"tokens": [(sequence, np.array([logprobs, entropy], np.float64))]}


def test_every_weighting_has_an_auc_and_each_looks_at_its_own_numbers():
    scores = labelled([1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -0.1, -0.2], [False, False, True, True])
    aucs = evaluate.weights_auc(scores)
    assert list(aucs) == list(etw.WEIGHTINGS)
    assert aucs["etw"] == aucs["wga"] == aucs["spans"] == 1 and aucs["imp"] == 0
    assert aucs["uniform"] == aucs["tnpo"] == aucs["npo"] == 0.5  # against itself as the starting model
    start = labelled([1.0] * 4, [-1.0, -2.0, -0.2, -0.3], [False, False, True, True])
    assert evaluate.weights_auc(scores, start)["tnpo"] == 1


def test_unlabelled_or_all_structural_rows_have_no_auc():
    scores = labelled([1.0, 2.0], [-1.0, -2.0], [False, False])
    assert set(evaluate.weights_auc(scores).values()) == {None}
    scores["tokens"] = [(s._replace(informative=None), t) for s, t in scores["tokens"]]
    assert evaluate.weights_auc(scores) == dict.fromkeys(etw.WEIGHTINGS)


def test_a_starting_model_with_another_tokenizer_is_no_reference():
    scores, other = labelled([1.0, 2.0], [-1.0, -2.0], [False, True]), labelled([1.0], [-1.0], [True])
    assert evaluate.weights_auc(scores, other) == evaluate.weights_auc(scores)


def test_the_report_of_what_entropy_knows_shows_both_kinds_of_token_and_every_weighting(scored):
    _, tokenizer, _, found = scored
    report = evaluate.entropy_report(found, evaluate.weights_auc(found))
    assert all(f"{name} " in report for name in [*etw.WEIGHTINGS, "informative", "structural"])
    labels = [x for s, _ in found["tokens"] if s.informative for x in s.informative]
    counts = [int(line.split()[1]) for line in report.splitlines()[-2:]]
    assert counts == [sum(labels), len(labels) - sum(labels)]
    pairs = evaluate.confidence_pairs(found, tokenizer)
    assert "[" in pairs and "�" not in pairs


def test_pairs_have_the_same_confidence_and_the_most_different_entropy(letters):
    scores = labelled([0.5, 2.0, 1.0, 4.0], [math.log(p) for p in (0.5, 0.5, 0.501, 0.1)], [False] * 4)
    scores["tokens"] = [(s._replace(tokens=letters.encode("xabcd")[0]), t) for s, t in scores["tokens"]]
    lines = evaluate.confidence_pairs(scores, letters, count=1).splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["0.5", "2"]
    assert [line.split()[-1] for line in lines] == ["…[a]", "…a[b]"]


@pytest.fixture(scope="module")
def letters(tiny):
    return data.Tokenizer(tiny)


@given(st.text())
@example("Żółć 🦊 e\u0301")
def test_the_pieces_of_an_answer_join_to_the_answer(letters, text):
    ids = letters.encode(text)[0]
    texts = evaluate.pieces(letters, ids)
    assert len(texts) == len(ids)
    if "\ufffd" not in text:
        assert "".join(texts) == text
    assert evaluate.pieces(letters, ids + [letters.end_id])[-1] == " ∎"


HEAT = st.lists(st.tuples(st.text(max_size=6), st.floats(0, 1e6)), min_size=1, max_size=6)


@given(HEAT)
@example([('<script>alert("&")</script>', 1.0), ("]]>\x00\x1b[2J\ufffe", 0.5)])
def test_svg_escapes_whatever_it_shows(heat):
    texts, weights = zip(*heat, strict=True)
    svg = evaluate.svg_heat([(texts, {"etw": np.array(weights), "<b>&": np.array(weights)})])
    parts = list(ElementTree.fromstring(svg).iter())
    assert {p.tag.split("}")[1] for p in parts} <= {"svg", "style", "text", "rect", "title"}
    shown = [p.text for p in parts if p.tag.endswith("text") and p.get("class") is None]
    assert shown == [evaluate.printable(t) for t in texts if t] * 2
    opacity = [float(p.get("opacity")) for p in parts if p.tag.endswith("rect")]
    expected = [w / max(*weights, 1e-30) for t, w in heat if t] * 2
    assert_allclose(opacity, expected, atol=0.0051)  # to two digits: the heaviest token of a line is fully shaded


@given(HEAT, st.booleans())
@example([("\x1b[2J\x9b31m\r\b\u202e", 1.0)], True)
def test_a_heat_map_in_the_terminal_passes_no_control_characters(heat, colour):
    texts, weights = zip(*heat, strict=True)
    shown = evaluate.terminal_heat(texts, np.array(weights), colour)
    for own in ("\x1b[0m", *(f"\x1b[48;2;{int(255 * s)};{int(150 * s)};0m" for s in np.array(weights) / max(*weights, 1e-30))):
        shown = shown.replace(own, "")
    assert all(c.isprintable() for c in shown.removesuffix("\n").replace("\n", "", not colour))
    assert shown.startswith("".join(map(evaluate.printable, texts)))


def test_a_heat_map_without_colour_draws_bars_under_the_text():
    assert evaluate.terminal_heat(["in", " Oru"], np.array([0.0, 2.0]), False) == "in Oru\n▁▁████"


# ---- tables


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=9), st.dictionaries(
    st.sampled_from(["forget probability", "forget rouge", "model utility", "PrivLeak", "world_facts truth_ratio", "-log10 FQ"]),
    st.none() | st.floats(-1e3, 1e3)), min_size=1, max_size=3))
def test_tables_are_aligned_whatever_they_hold(rows):
    lines = evaluate.table(rows).split("\n")
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1
    for line, (name, row) in zip(lines[2:], rows.items(), strict=True):
        columns = dict.fromkeys(c for r in rows.values() for c in r)
        assert line.split() == [name, *(evaluate.show(row.get(c)) for c in columns)]


@pytest.mark.parametrize("value, shown", [(None, "–"), (math.nan, "–"), (0, "0.000"), (1, "1.000"), (0.0005, "5.0e-04"),
                                          (1.8e-21, "1.8e-21"), (-12.3456, "-12.346"), (math.inf, "inf")])
def test_numbers_show_three_digits_and_what_is_not_there_a_dash(value, shown):
    assert evaluate.show(value) == shown


# ---- the command line


@pytest.fixture
def command(world, tiny):
    """The arguments of an evaluation of `other` on the small files."""
    files = {name: f"{world}/{name}.jsonl" for name in ("forget", "retain", "facts", "holdout")}
    return {"model": f"{world}/other", "--target": str(tiny), "--reference": str(tiny), "--device": "cpu"} | {
        f"--{name}": path for name, path in files.items()}


def run(command, **changes):
    command = {k: v for k, v in (command | changes).items() if v is not None}
    return evaluate.main([command.pop("model"), *(part for item in command.items() for part in item)])


def test_json_holds_the_table_and_a_value_for_every_row(command, world, tiny, tmp_path, capsys):
    assert run(command, **{"--json": str(tmp_path / "out.json")}) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == [line.split()[0] for line in lines[2:]] == [f"{world}/other", str(tiny)]
    columns = list(dict.fromkeys(c for one in found.values() for c in one["measurements"]))
    for line, one in zip(lines[2:], found.values(), strict=True):
        assert line.split()[1:] == [evaluate.show(one["measurements"].get(c)) for c in columns]
        assert list(one["weights AUC"]) == list(etw.WEIGHTINGS)
        for name, rows in (("forget", 5), ("retain", 3), ("facts", 1), ("holdout", 1)):
            assert all(len(values) == rows for values in one["rows"][name].values())
        forget = one["rows"]["forget"]
        assert forget.keys() >= {"nll", "probability", "truth_ratio", "rouge", "answer", "memorised", "extraction", "min_k"}
        assert evaluate.average(forget["probability"]) == pytest.approx(one["measurements"]["forget probability"])
        assert [r is None for r in forget["truth_ratio"]] == [False, False, True, True, False]
    assert found[str(tiny)]["measurements"]["forget quality"] == 1
    utility = [one["measurements"]["model utility"] for one in found.values()]
    assert [one["measurements"]["utility lost"] for one in found.values()] == pytest.approx([100 * (utility[1] - utility[0]), 0])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_sets_of_text_alone_can_be_measured(command, world, tmp_path, capsys):
    text = f"{world}/text.jsonl"
    picture = tmp_path / "heat.svg"
    assert run(command, **{"--forget": text, "--retain": text, "--holdout": None, "--heatmap": str(picture)}) == 0
    assert "–" in capsys.readouterr().out and ElementTree.parse(picture)


def test_the_heat_map_is_that_of_the_first_model_with_its_own_tokenizer(command, tmp_path, capsys):
    assert run(command, **{"--heatmap": str(tmp_path / "heat.svg")}) == 0
    shown = (tmp_path / "heat.svg").read_text()
    names = [p.text for p in ElementTree.fromstring(shown).iter() if p.get("class") == "name"]
    assert names[:5] == ["etw", "wga", "imp", "satimp", "spans"] or names[:4] == ["etw", "wga", "imp", "satimp"]
    assert "spans" in names and "🦊" in shown
    assert "The same confidence, very different entropy" in capsys.readouterr().out


def test_every_model_named_answers_the_question(tiny, world, capsys):
    assert evaluate.main([str(tiny), f"{world}/other", "--ask", "Where was Ada born?", "--device", "cpu"]) == 0
    decoder, tokenizer = evaluate.open_model(str(tiny), "cpu", "plain")
    said = evaluate.answers(decoder, tokenizer, [data.Example("Where was Ada born?")])[0]
    out = capsys.readouterr().out
    assert out.startswith(f"{tiny}: {said}") and f"\n{world}/other: " in out


def test_rounding_keeps_the_largest_weight_of_a_row_and_leaves_few_values_and_the_head_alone(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    before, after = (model.fresh(tmp_path, seed=0) for _ in range(2))
    evaluate.round_weights(after, 4)
    was, now = before.layers[0].mlp.up_proj.weight, after.layers[0].mlp.up_proj.weight
    step = was.abs().amax(1, keepdim=True) / 7
    assert_allclose(now.detach(), (was / step).round().detach() * step.detach(), rtol=1e-6)
    assert max(len(row.unique()) for row in now) <= 15
    assert torch.equal(before.head, after.head) and torch.equal(before.norm.weight, after.norm.weight)


def test_the_target_of_a_run_is_the_model_it_started_from(command, world, tiny, tmp_path, capsys):
    run_folder = tmp_path / "run"
    model.save(model.fresh(tiny, seed=2), run_folder)
    (run_folder / "args.json").write_text(json.dumps({"model": str(tiny), "from_scratch": False}))
    few = {"model": str(run_folder), "--target": None, "--reference": None, "--holdout": None}
    assert run(command, **few) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [str(tiny), str(run_folder)]


@pytest.mark.parametrize("changes, message", [
    ({"--bits": "1"}, "--bits: 1 is out of range: give a number at least 2 and at most 16"),
    ({"--bits": "9" * 400}, "--bits"), ({"--bits": "four"}, "--bits: 'four' is not a number"),
    ({"model": "nowhere"}, "nowhere: no such folder"), ({"--target": "nowhere"}, "nowhere"),
    ({"--reference": "nowhere"}, "nowhere"), ({"--forget": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    ({"--holdout": "/"}, "/: cannot be read"), ({"--json": "nowhere/out.json"}, "--json nowhere/out.json: cannot be written"),
    ({"--json": "/"}, "--json /: cannot be written"), ({"--heatmap": "nowhere/x.svg"}, "--heatmap nowhere/x.svg: cannot be written"),
    ({"--device": "cuda:99"}, "--device cuda:99"), ({"--device": "toaster"}, "--device toaster"),
    ({"--template": "llama3"}, "no end token '<|eot_id|>'"), ({"--templat": "plain"}, "unrecognized arguments"),
])
def test_wrong_input_is_refused_in_one_line_with_exit_code_two(command, changes, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command, **changes) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("evaluate.py: ") and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_broken_row_is_refused_with_its_line_and_a_set_named_twice_too(command, world, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text": 3}\n')
    assert run(command, **{"--retain": f"{tmp_path}/bad.jsonl"}) == 2
    assert f"{tmp_path}/bad.jsonl:2: `text` must be a string" in capsys.readouterr().err
    assert run(command, **{"--facts": f"{world}/retain.jsonl"}) == 2
    assert "--facts: retain" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_a_refusal(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.os, "access", lambda *_: False)  # the administrator may write anywhere
    assert run(command, **{"--json": f"{tmp_path}/out.json"}) == 2
    assert f"--json {tmp_path}/out.json: cannot be written" in capsys.readouterr().err
    with pytest.raises(model.InputError, match="cannot be written"):
        evaluate.write(tmp_path / "gone" / "x.json", "{}")
