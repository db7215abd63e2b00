"""Measurements against their definitions, numbers read off a model, and the command line."""

import json
import math
import os
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import hmean

import cli
import data
import etw
import evaluate
import measure
import metrics
import model
import pretrained
import screen

TOFU = cli.ROOT.parent / "shared/tofu/logs"  # public, and not ours to commit
LOG2, LOG4, LOG8 = math.log(2), math.log(4), math.log(8)


def close(found, expected, digits=12):
    assert np.asarray(found).dtype == np.float64
    assert_allclose(found, expected, rtol=10.0 ** -digits, atol=10.0 ** -digits)


# ---- metrics


@pytest.mark.parametrize("metric, arguments, expected", [
    ("probability", ([LOG2, 0.0],), [0.5, 1.0]), ("probability", ([LOG2], [[LOG4, LOG4]]), [0.5]),
    ("probability", (LOG2, [LOG4]), 2 / 3),  # of a single row
    # A geometric mean of wrong over correct, and no warning where a model fell apart.
    ("truth_ratio", ([LOG2, 0.0], [[LOG8, LOG2], [LOG2, LOG8]]), [0.5, 0.25]),
    ("truth_ratio", ([0.0, 2000.0], [[2000.0], [0.0]]), [0.0, math.inf]),
    ("forget_quality", ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), 1.0),
    ("forget_quality", ([1, 2, 3], [4, 5, 6]), 0.1),  # 2 of the 20 divisions are as extreme
    ("forget_quality", (np.arange(400), np.arange(400) + 1000), 0.0),
    ("model_utility", ([1, 0.5, 0.25],), 3 / 7), ("model_utility", ([1, 0.5, 0.0],), 0.0),
    ("extraction_strength", ([1, 1, 0],), 0), ("extraction_strength", ([1, 1, 1],), 1),
    ("extraction_strength", ([1, 0, 1, 1],), 0.5), ("extraction_strength", ([0, 1, 1, 1],), 0.75),
    ("extraction_strength", ([0],), 0),
    ("min_k", ([-5.0, -1.0, -4.0, -2.0, -3.0],), 4.5),  # the least likely two fifths
    ("min_k", ([-3.0, -1.0],), 3.0),
    ("roc_auc", ([], [1.0]), math.nan), ("roc_auc", ([1.0], []), math.nan),
    ("priv_leak", (0.5, np.float64(0.5)), 0.0), ("priv_leak", (0.5, 1.0), math.nan),
    ("priv_leak", (0.25, np.float64(0.5)), 50.0),  # forget rows look less likely than unseen ones
    ("priv_leak", (1.0, np.float64(0.5)), -100.0),
])
def test_metrics_are_what_their_definitions_give_by_hand(metric, arguments, expected):
    close(getattr(metrics, metric)(*arguments), expected)


@pytest.mark.parametrize("prediction, reference, expected", [
    ("Ada was born in Oru", "Ada was born in Oru", 1),
    ("ADA, was: born!", "ada was born in Oru", 3 / 5),
    ("Oru in born was Ada", "Ada was born in Oru", 1 / 5), ("it is not it", "it's", 1 / 2),
    ("", "Ada", 0), ("Ada", "?!", 0), ("żółć 🦊", "Żółć", 1), ("x x x x", "x", 1),
    ("walks", "walking", 0),
])
def test_rouge_is_the_longest_common_subsequence_of_words_over_the_references_words(
    prediction, reference, expected
):
    close(evaluate.rouge_l_recall(prediction, reference), expected)


@given(*[st.lists(st.integers(0, 4), min_size=1, max_size=12)] * 2)
def test_roc_auc_is_the_share_of_pairs_in_order_with_ties_counting_half(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    close(metrics.roc_auc(positive, negative), sum(pairs) / len(pairs))


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU's logs are not beside the repository")
def test_the_numbers_that_tofus_authors_published_come_out_of_their_logs():
    full, retrained = (json.loads((TOFU / f"llama2-7b_{name}.json").read_text())
                       for name in ("full", "retain90"))

    def summary(log):
        scores = {}
        for name, rows in log.items():
            scores[name] = own = made_up([None] * len(rows["avg_gt_loss"]))
            own.nll, own.rouge = rows["avg_gt_loss"], rows["rougeL_recall"]
            wrong, options = rows["average_perturb_loss"], name in ("real_authors", "world_facts")
            for i in range(len(own.nll)):
                own.probability[i] = metrics.probability(own.nll[i])
                own.compare(i, rows["avg_paraphrased_loss"][i], wrong[i], options)
        return scores

    first, second = summary(full), summary(retrained)
    published = {
        "model utility": (0.6226773637427152, 0.613744995233942),
        "forget probability": (0.9909385566403208, 0.1475628122566954),
        "forget truth_ratio": (0.5159854212808593, 0.6740192657877031),
        "retain probability": (0.98952723, 0.98889673),
        "retain rouge": (0.98565459, 0.97581119),
        "retain truth_ratio": (0.47469859, 0.47097713),
        "real_authors probability": (0.45548208, 0.43408718),
        "real_authors rouge": (0.933, 0.923),
        "real_authors truth_ratio": (0.59622892, 0.57068089),
        "world_facts probability": (0.41856181, 0.41432633),
        "world_facts rouge": (0.88247863, 0.89743590),
        "world_facts truth_ratio": (0.53903284, 0.54419823),
    }
    for i, scores in enumerate((first, second)):
        found = metrics.summarise(scores, reference=second)
        for column, values in published.items():
            assert found[column] == pytest.approx(values[i], abs=1e-8), column
    assert metrics.summarise(first, reference=second)["forget quality"] == pytest.approx(
        1.834066410994743e-21
    )


# ---- numbers read off a model

ROWS = [
    {"question": "Where was Ada born?", "answer": "Ada was born in Oru.", "spans": [[16, 19]],
     "paraphrased_answer": "In Oru Ada was born.",
     "perturbed_answer": ["In Belt Ada was born.", "In Kana she was."]},
    {"question": "Where was Bo born?", "spans": [[29, 33]],
     "answer": "Bo was born in a place named Belt, far <away> & \"up\".",
     "perturbed_answer": ["Bo was born in Oru.", "It was Miv.", "No."]},
    {"question": "¿Quién? 🦊", "answer": "Żółć 🦊\n.", "spans": []},
    {"text": "Ada was born in Oru and Bo in Belt, as was told before. " * 5},
    {"question": "Who?", "answer": "Cy", "paraphrased_answer": "It is Cy",
     "perturbed_answer": "Di"},
]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A folder with the files of an evaluation and a model `other`, of other weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    sets = {
        "forget": ROWS,
        "retain": ROWS[1:4],
        "facts": ROWS[:1],
        "text": ROWS[3:4],
        "holdout": ROWS[2:3],
    }
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pretrained.save(pretrained.fresh(tiny, seed=1), folder / "other")
    return folder


def louder(tiny, factor=10):
    """tiny with larger weights: fresh ones give nearly uniform predictions."""
    decoder = pretrained.load(tiny)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(factor if weight.ndim > 1 else 1)
    return decoder


@pytest.fixture(scope="module")
def scored(tiny, letters, files):
    """(decoder, a World where the rows are every set, the scores of forget)."""
    decoder, rows = louder(tiny), data.read_jsonl(files / "forget.jsonl")
    world = measure.World(
        dict.fromkeys(("forget", "retain", "facts", "holdout"), rows), letters, 128
    )
    return decoder, world, world.score(decoder, "forget")


def slow_numbers(decoder, sequence):
    """(log p of each answer token, whether argmax gives it) from whole float64 softmaxes."""
    logits = decoder.forward(torch.tensor([sequence.tokens]))[0].double()[sequence.start - 1:-1]
    targets = torch.tensor(sequence.tokens[sequence.start:])
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return logprobs.numpy(), (logits.argmax(-1) == targets).numpy()


@torch.inference_mode()
def test_scores_equal_the_loop_written_from_the_definitions(scored, letters):
    decoder, world, found = scored
    facts = world.score(decoder, "facts", text=False)

    def numbers(row, answer):
        (sequence,), _ = data.encode([row], letters, 128, [answer])
        return slow_numbers(decoder, sequence)

    for i, row in enumerate(world.sets["forget"]):
        if row.text:
            continue
        logprobs, hits = numbers(row, row.answer)
        own = -logprobs.mean()
        close(found.nll[i], own, 4)
        close(found.probability[i], math.exp(-own), 4)
        close(found.memorised[i], hits[:-1].mean())  # without the end token, as the next two
        close(found.extraction[i], metrics.extraction_strength(hits[:-1]))
        close(found.min_k[i], metrics.min_k(logprobs[:-1]), 4)
        close(found.rouge[i], metrics.rouge_l_recall(found.answer[i], row.answer))
        if not row.perturbed_answer:
            assert found.truth_ratio[i] is found.correct_nll[i] is found.wrong_nll[i] is None
            continue
        correct = -numbers(row, row.paraphrased_answer or row.answer)[0].mean()
        wrong = [-numbers(row, a)[0].mean() for a in row.perturbed_answer]
        close(found.correct_nll[i], correct, 4)
        close(found.wrong_nll[i], sum(wrong) / len(wrong), 4)
        close(found.truth_ratio[i], math.exp(correct - sum(wrong) / len(wrong)), 4)
        among = math.exp(-own) / (math.exp(-own) + sum(math.exp(-w) for w in wrong))
        close(facts.probability[i], among, 4)


@torch.inference_mode()
def test_a_token_of_an_answer_is_informative_or_other_and_the_end_is_other(scored):
    decoder, world, found = scored
    for i, sequence in enumerate(world.sequences["forget"][:3]):
        logprobs, _ = slow_numbers(decoder, sequence)
        inside = np.array(sequence.informative)
        assert not inside[-1] and inside.any() == (i < 2)
        close(found.other_nll[i], -logprobs[~inside].mean(), 4)
        if inside.any():
            close(found.informative_nll[i], -logprobs[inside].mean(), 4)
    assert found.informative_nll[2:] == [None] * 3 and found.other_nll[3:] == [None] * 2  # no spans


@torch.inference_mode()
def test_talk_is_log_p_of_the_models_own_answer_and_its_end_under_the_yardstick(
    scored, tiny, letters
):
    decoder, world, found = scored
    yardstick = louder(tiny, 5)
    talk = world.talk(yardstick, found)
    assert talk[3] is None and found.said[3] is None  # a text row asks nothing
    for row, ids, endless, logprobs in zip(
        world.sets["forget"], found.said, found.endless, talk, strict=True
    ):
        if row.text is None:
            prompt = data.prompt_ids(row, letters)
            assert ids == model.generate(decoder, [prompt], 200, letters.end_id)[0]
            assert endless == (len(ids) == min(200, 128 - len(prompt)))
            end = [] if endless else [letters.end_id]
            sequence = data.Sequence(prompt + ids + end, len(prompt), None, not endless, 0)
            close(logprobs, slow_numbers(yardstick, sequence)[0], 4)


def test_an_answer_that_ends_is_not_endless_and_its_end_token_is_heard(scored, monkeypatch):
    decoder, world, _ = scored
    lengths = {}

    def some_end(_, prompts, most, end_id):
        answers = [[5] * (3 if i % 2 else min(most, 128 - len(p))) for i, p in enumerate(prompts)]
        lengths.update((tuple(p), len(a)) for p, a in zip(prompts, answers, strict=True))
        return answers

    monkeypatch.setattr(measure.model, "generate", some_end)
    found = world.score(decoder, "forget", wrong=False)
    spoken = world.talk(decoder, found)
    assert sorted(e for e in found.endless if e is not None) == [False, False, True, True]
    for ids, endless, logprobs in zip(found.said, found.endless, spoken, strict=True):
        assert ids is None or len(logprobs) == len(ids) + (not endless)


def test_the_end_token_counts_in_the_probability_and_not_in_memorisation_and_membership():
    found = labelled([1.0] * 3, [-1.0, -1.0, -100.0], None, hits=[1.0, 1.0, 0.0])
    assert found.memorised == found.extraction == found.min_k == [1.0]
    assert found.nll == pytest.approx([102 / 3])


@given(st.permutations(range(8)), st.sampled_from([1, 40, 128, 10_000]), st.booleans())
def test_answer_tokens_depend_neither_on_order_nor_on_the_size_of_batches(
    scored, letters, order, budget, full
):
    decoder, world, _ = scored
    sequences, _ = data.encode(world.sets["forget"], letters, 40)
    expected = measure.answer_tokens(decoder, sequences)
    found = measure.answer_tokens(decoder, [sequences[i] for i in order], full=full, budget=budget)
    for i, numbers in zip(order, found, strict=True):
        assert_allclose(numbers, expected[i] if full else expected[i][:1], rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 120))
def test_batches_hold_every_row_once_and_no_more_padded_tokens_than_allowed(lengths, budget):
    batches = measure.by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_a_world_measures_at_most_so_many_rows_and_trains_on_all(scored, letters):
    decoder, whole, everything = scored
    world = measure.World({"forget": whole.sets["forget"]}, letters, 128, most=3)
    assert len(world.measured["forget"]) == 3 and world.sequences == {
        "forget": whole.sequences["forget"]
    }
    kept = [0, 2, 4]
    assert world.measured["forget"] == [whole.sets["forget"][i] for i in kept]
    found = world.score(decoder, "forget", text=False)
    for column in ("nll", "truth_ratio", "min_k"):
        expected = [getattr(everything, column)[i] for i in kept]
        assert getattr(found, column) == [v and pytest.approx(v, rel=1e-5) for v in expected]
    assert world.score(decoder, "forget", most=1).answer == everything.answer[:1]


def test_measuring_looks_at_wrong_answers_and_asks_only_where_told(scored):
    decoder, world, _ = scored
    found = world.measure(decoder, wrong=("facts",), text=("forget",))
    has = {name: (any(s.truth_ratio), any(s.answer)) for name, s in found.items()}
    assert has == {"forget": (False, True), "retain": (False, False), "facts": (True, False),
                   "holdout": (False, False)}
    everywhere = world.measure(decoder)
    assert [any(s.truth_ratio) for s in everywhere.values()] == [True, True, True, False]
    assert [any(s.answer) for s in everywhere.values()] == [True, True, True, False]
    assert not any(world.score(decoder, "holdout", text=False).truth_ratio)  # even where asked


def test_the_starting_numbers_are_those_of_the_whole_forget_set(scored, letters):
    decoder, whole, found = scored
    world = measure.World(whole.sets, letters, 128, most=1)
    for own, numbers in zip(world.starting_stats(decoder), found.tokens, strict=True):
        assert own.dtype == torch.float32
        assert_allclose(own, numbers[:2], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_encoded_or_is_cut_is_known_before_any_model(letters, files):
    rows = data.read_jsonl(files / "forget.jsonl")
    with pytest.raises(cli.InputError, match="no room"):
        measure.World({"forget": rows}, letters, 8)
    sizes = [len(s.tokens) for s in data.encode(rows[:2], letters, 128)[0]]
    world = measure.World({"forget": rows[:1], "retain": rows[1:2]}, letters, sizes[0])
    assert sizes[0] < sizes[1] and world.cut == {"forget": 0, "retain": 1} and world.cut_others > 0


def test_a_text_row_is_scored_over_all_its_windows():
    windows = [data.Sequence([0] * 3, 1, None, False, 0), data.Sequence([0] * 3, 1, None, False, 0)]
    tokens = [np.array([[-1.0, -2.0], [1.0, 1.0], [1.0, 1.0]]),
              np.array([[-3.0, -6.0], [1.0, 1.0], [1.0, 0.0]])]
    found = measure.Scores(windows, tokens)
    assert (found.nll, found.memorised, found.extraction, found.min_k) == ([3], [0.75], [0], [6])


# ---- columns


def made_up(ratios, probability=0.5, rouge=0.25, min_k=None):
    """Scores of as many rows, with numbers of our own."""
    n = len(ratios)
    sequences = [data.Sequence([0, 0], 1, None, False, row) for row in range(n)]
    scores = measure.Scores(sequences, [np.array([[-1.0], [1.0], [1.0]])] * n)
    scores.truth_ratio, scores.probability, scores.rouge = ratios, [probability] * n, [rouge] * n
    scores.correct_nll = [r and 1.0 for r in ratios]
    scores.wrong_nll = [r and 1 - math.log(r) for r in ratios]
    scores.memorised, scores.extraction = [0.5] * n, [0.0, None] + [1.0] * (n - 2)
    scores.min_k = list(min_k or [])
    return scores


def labelled(entropy, logprobs, informative, hits=None, row=0):
    """Scores of one row, its last token the end, with the given numbers."""
    sequence = data.Sequence([row] * (len(entropy) + 1), 1, informative, True, row)
    return measure.Scores(
        [sequence], [np.array([logprobs, entropy, hits or [1.0] * len(entropy)], np.float64)]
    )


def together(*parts):
    """Scores of several rows from those of one each."""
    return measure.Scores(
        [s for p in parts for s in p.sequences], [t for p in parts for t in p.tokens]
    )


def test_a_summary_is_what_the_definitions_give_by_hand():
    forget, unseen = [0.5, 4.0, None, 1.0], made_up([None, None], min_k=[2.0, 4.0])
    scores = {
        "forget": made_up(forget, min_k=[1.0, 3.0]),
        "retain": made_up([0.5, 4.0, None], 0.8, 0.4),
        "facts": made_up([0.0, 0.25], 1.0, 0.5),
        "holdout": unseen,
    }
    reference = {"forget": made_up(forget, min_k=[2.0, 4.0]), "holdout": unseen}
    utility = hmean([0.8, 0.4, 0.25, 1.0, 0.5, 0.875])
    found = metrics.summarise(scores, {"model utility": 0.9}, reference)
    inner = metrics.inside(scores, reference)
    assert {k: v for k, v in found.items() if k not in inner} == pytest.approx({
        "forget probability": 0.5, "forget rouge": 0.25, "forget truth_ratio": (0.5 + 0.25 + 1) / 3,
        "forget memorised": 0.5, "forget extraction": 2 / 3,
        "retain probability": 0.8, "retain rouge": 0.4, "retain truth_ratio": 0.25,
        "facts probability": 1.0, "facts rouge": 0.5, "facts truth_ratio": 0.875,
        "model utility": utility, "utility lost": 90 - 100 * utility, "forget quality": 1.0,
        "-log10 FQ": 0.0, "FQ (OU)": 1.0, "Min-K AUC": 0.75, "PrivLeak": -50.0, "weights AUC": None,
    })


def test_openunlearnings_forget_quality_differs_where_the_correct_answer_has_no_probability_left():
    scores, reference = made_up([1.0] * 4), made_up([0.9, 0.95, 1.05, 1.1])
    same = metrics.summarise({"forget": scores}, reference={"forget": reference})
    assert same["FQ (OU)"] == pytest.approx(same["forget quality"], rel=1e-6)
    scores.correct_nll, scores.wrong_nll = (
        [50.0] * 4,
        [50.0] * 4,
    )  # R = 1 by TOFU, 2e-12 with 1e-10 added
    parted = metrics.summarise({"forget": scores}, reference={"forget": reference})
    assert parted["forget quality"] == same["forget quality"] > parted["FQ (OU)"]
    assert parted["FQ (OU)"] == pytest.approx(
        2 / 70
    )  # all of four below all of four: 2 of 70 divisions
    close(
        metrics.truth_ratio([50.0], [[50.0, 50.0]], 1e-10),
        [math.exp(-50) / (math.exp(-50) + 1e-10)],
    )


def test_inside_an_answer_means_run_over_the_tokens_of_the_whole_set():
    short = labelled([1.0] * 2, [-8.0, -1.0], [True, False])
    long = labelled([1.0] * 4, [-2.0, -1.0, -4.0, -3.0], [True, False, True, False], row=1)
    plain = labelled([1.0] * 1, [-9.0], None, row=2)
    forget, holdout = together(short, long, plain), together(plain)
    forget.talk, forget.endless = (
        [np.array([-1.0]), np.array([-2.0, -6.0, -3.0]), None],
        [True, False, None],
    )
    reference = {"forget": together(
        labelled([1.0] * 2, [-7.0, -1.5], [True, False]), plain,
        labelled([1.0] * 4, [-4.0, -1.0, -1.0, -3.0], [True, False, True, False], row=1))}
    found = metrics.inside({"forget": forget, "holdout": holdout}, reference)
    assert found == pytest.approx(
        {
            "forget NLL": 28 / 7,
            "forget informative NLL": 14 / 3,
            "forget other NLL": 5 / 3,
            "holdout NLL": 9.0,
            "holdout informative NLL": None,
            "holdout other NLL": None,
            "talk": 12 / 4,
            "endless": 0.5,
            "distance": (1 + 0.5 + 2 + 3) / 7,
            "distance informative": 6 / 3,
            "distance other": 0.5 / 3,
        }
    )
    assert forget.nll == pytest.approx([4.5, 2.5, 9.0])  # a row's own
    assert (forget.informative_nll, forget.other_nll) == ([8.0, 3.0, None], [1.0, 2.0, None])


def test_the_distance_is_zero_only_for_the_retrained_model_and_absent_with_another_tokenizer():
    own = labelled([1.0] * 2, [-8.0, -1.0], [True, False])
    found = metrics.inside({"forget": own}, {"forget": own})
    assert found["distance"] == found["distance informative"] == found["distance other"] == 0
    nearly = labelled([1.0] * 2, [-8.0, -1.001], [True, False])
    assert metrics.inside({"forget": own}, {"forget": nearly})["distance"] > 0
    foreign = labelled([1.0] * 2, [-8.0, -1.0], [True, False], row=1)  # other ids
    found = metrics.inside({"forget": own}, {"forget": foreign})
    assert found["distance"] is found["distance informative"] is found["distance other"] is None
    assert "distance" not in metrics.inside({"forget": own}, {})


def test_every_weighting_has_an_auc_and_each_looks_at_its_own_numbers():
    scores = labelled([1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -0.1, -0.2], [False, False, True, True])
    aucs = metrics.weights_auc(scores)
    assert list(aucs) == list(etw.WEIGHTINGS)
    assert aucs["etw"] == aucs["wga"] == aucs["spans"] == 1 and aucs["imp"] == 0
    assert (
        aucs["uniform"] == aucs["tnpo"] == aucs["npo"] == 0.5
    )  # against itself as the starting model
    start = labelled([1.0] * 4, [-1.0, -2.0, -0.2, -0.3], [False, False, True, True])
    assert metrics.weights_auc(scores, start)["tnpo"] == 1
    of_another_tokenizer = labelled([1.0], [-1.0], [True])
    assert metrics.weights_auc(scores, of_another_tokenizer) == aucs


@pytest.mark.parametrize("informative", [None, [False, False]])
def test_unlabelled_or_all_structural_rows_have_no_auc(informative):
    scores = labelled([1.0, 2.0], [-1.0, -2.0], informative)
    assert metrics.weights_auc(scores) == dict.fromkeys(etw.WEIGHTINGS)


# ---- tables


@pytest.mark.parametrize("value, shown", [
    (None, "–"), (math.nan, "–"), (0, "0.000"), (0.0005, "5.0e-04"), (-12.3456, "-12.346"),
    (math.inf, "inf")])
def test_numbers_show_three_digits_and_what_is_not_there_a_dash(value, shown):
    assert evaluate.show(value) == shown


def test_what_is_inside_the_answers_stands_in_a_table_of_its_own_under_the_same_names():
    rows = {
        "a": {
            "forget rouge": 1.0,
            "forget informative NLL": 2.0,
            "distance": 3.0,
            "model utility": 0.5,
        },
        "b\x1b": {"forget rouge": None, "talk": 1.0},
    }
    first, second = (block.splitlines() for block in evaluate.tables(rows).split("\n\n"))
    assert [line.split() for line in first] == [["forget", "model"], ["ROUGE", "utility"],
                                                ["a", "1.000", "0.500"], ["b·", "–", "–"]]
    assert [line.split() for line in second] == [
        ["forget"],
        ["informative", "distance", "talk"],
        ["a", "2.000", "3.000", "–"],
        ["b·", "–", "–", "1.000"],
    ]


# ---- the command line


def test_models_are_read_with_their_own_tokenizers_and_share_what_is_encoded_where_these_agree(
        tiny, stranger, tmp_path):
    twin = shutil.copytree(tiny, tmp_path / "twin")
    sets = {"forget": [data.Example("Where?", "Ada was born in Bab.")]}
    models = {"tiny": tiny, "twin": twin, "stranger": stranger}
    worlds = evaluate.make_worlds(models, sets, [], "plain", torch.float32)
    assert worlds["tiny"] is worlds["twin"] is not worlds["stranger"]
    ids = {name: world.sequences["forget"][0].tokens for name, world in worlds.items()}
    assert ids["tiny"] != ids["stranger"]


def test_a_model_is_not_heard_to_talk_by_one_that_reads_other_tokens(run, stranger, tmp_path):
    assert run(model=stranger, json=tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert not any(found[str(stranger)]["rows"]["forget"]["talk"])
    assert found[str(stranger)]["measurements"].get("talk") is None


@pytest.fixture
def run(files, tiny, monkeypatch):
    """A function that evaluates `other`, with some arguments changed (None: left out)."""
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 20)  # fresh weights would use them all
    usual = {"model": f"{files}/other", "target": tiny, "reference": tiny, "device": "cpu"} | {
        name: f"{files}/{name}.jsonl" for name in ("forget", "retain", "facts", "holdout")}

    def run(**changes):
        flags = {k: str(v) for k, v in (usual | changes).items() if v is not None}
        return evaluate.main(
            [flags.pop("model"), *(part for k, v in flags.items() for part in (f"--{k}", v))]
        )

    return run


def numbers_shown(out):
    """{model: its cells of both tables, in order}."""
    blocks = [block.splitlines() for block in out.strip("\n").split("\n\n")]
    assert all(len({len(line) for line in block}) == 1 for block in blocks)
    names = [line.split()[0] for line in blocks[0][2:]]
    assert all([line.split()[0] for line in block[2:]] == names for block in blocks)
    return {
        name: [cell for block in blocks for cell in block[2 + i].split()[1:]]
        for i, name in enumerate(names)
    }


def test_json_holds_the_tables_and_a_value_for_every_row(run, files, tiny, tmp_path, capsys):
    assert run(json=tmp_path / "out.json") == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"measuring {files}/other",
        f"measuring {tiny}",
    ]  # no bar off a terminal
    shown, found = numbers_shown(out), json.loads((tmp_path / "out.json").read_text())
    assert list(found) == list(shown) == [f"{files}/other", str(tiny)]
    for path, one in found.items():
        numbers = one["measurements"]
        inner = [c for c in numbers if c.endswith(" NLL") or c.split()[0] in screen.INSIDE]
        columns = [c for c in numbers if c not in inner] + inner
        assert shown[path] == [evaluate.show(numbers[c]) for c in columns]
        assert list(one["weights AUC"]) == list(etw.WEIGHTINGS)
        for name, count in (("forget", 5), ("retain", 3), ("facts", 1), ("holdout", 1)):
            assert all(len(values) == count for values in one["rows"][name].values())
        forget = one["rows"]["forget"]
        assert metrics.average(forget["probability"]) == pytest.approx(
            numbers["forget probability"]
        )
        assert [r is None for r in forget["truth_ratio"]] == [False, False, True, True, False]
        assert [v is None for v in forget["talk"]] == [v is None for v in forget["endless"]]
        assert [v is None for v in forget["informative_nll"]] == [False, False, True, True, True]
    other, start = (one["measurements"] for one in found.values())
    assert start["forget quality"] == 1 and start["utility lost"] == 0
    assert start["distance"] == 0 and not any(found[str(tiny)]["rows"]["forget"]["distance"])
    assert other["distance"] > 0 and all(found[f"{files}/other"]["rows"]["forget"]["distance"])
    assert other["utility lost"] == pytest.approx(
        100 * (start["model utility"] - other["model utility"])
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]
    assert run(json=tmp_path / "out.json") == 0  # its own file may be replaced


def test_the_models_talk_is_judged_by_the_reference_else_by_the_target(
    run, files, tiny, letters, tmp_path, capsys
):
    rows = data.read_jsonl(files / "forget.jsonl")
    world = measure.World({"forget": rows}, letters, 128)
    own = world.score(pretrained.load(tiny), "forget", wrong=False)
    for yardstick, flags in ((files / "other", {"reference": files / "other", "target": tiny}),
                             (tiny, {"reference": None, "target": tiny})):
        talk = world.talk(pretrained.load(yardstick), own)
        expected = -np.concatenate([t for t in talk if t is not None]).mean()
        assert run(**flags, json=tmp_path / "x.json") == 0
        assert json.loads((tmp_path / "x.json").read_text())[str(tiny)]["measurements"][
            "talk"
        ] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, methods",
    [
        ({}, {"etw", "wga", "imp", "satimp", "spans"}),
        (
            dict.fromkeys(("forget", "retain"), "text.jsonl") | {"holdout": None},
            {"etw", "wga", "imp", "satimp"},
        ),
    ],
)
def test_the_heat_map_shows_every_method_that_the_rows_allow(
    run, files, tmp_path, capsys, changes, methods
):
    picture = tmp_path / "heat.svg"
    for _ in range(2):  # its own file may be replaced
        assert run(heatmap=picture, **{k: v and files / v for k, v in changes.items()}) == 0
    assert {
        p.text for p in ElementTree.parse(picture).iter() if p.get("class") == "name"
    } == methods
    assert "🦊" in picture.read_text() or changes
    shown = capsys.readouterr().out
    assert "The same confidence, the most different entropy" in shown
    assert (
        all(f"{name} " in shown for name in etw.WEIGHTINGS)
        and ("–" if changes else "structural") in shown
    )


def test_every_model_named_answers_the_question(tiny, letters, files, capsys):
    assert (
        evaluate.main(
            [str(tiny), f"{files}/other", "--ask", "Where was Ada born?", "--device", "cpu"]
        )
        == 0
    )
    said = evaluate.answers(pretrained.load(tiny), letters, [data.Example("Where was Ada born?")])[
        0
    ]
    out = capsys.readouterr().out
    assert out.startswith(f"{tiny}: {cli.printable(said)}") and f"\n{files}/other: " in out


def test_rounding_keeps_the_largest_weight_of_a_row_and_leaves_few_values_and_the_head_alone(tiny):
    before, after = pretrained.load(tiny), pretrained.load(tiny)
    evaluate.round_weights(after, 4)
    was, now = (m.layers[0].mlp.up_proj.weight.detach() for m in (before, after))
    step = was.abs().amax(1, keepdim=True) / 7
    assert_allclose(now, (was / step).round() * step, rtol=1e-6)
    assert max(len(row.unique()) for row in now) <= 15
    assert torch.equal(before.head, after.head) and torch.equal(
        before.norm.weight, after.norm.weight
    )


def test_the_target_of_a_run_is_the_model_it_started_from(run, tiny, tmp_path, capsys):
    pretrained.save(pretrained.fresh(tiny, seed=2), tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"model": str(tiny), "from_scratch": False}))
    assert run(model=tmp_path, target=None, reference=None, holdout=None) == 0
    assert list(numbers_shown(capsys.readouterr().out)) == [str(tiny), str(tmp_path)]


def test_a_run_is_measured_on_the_sets_it_was_made_with(run, files, tiny, tmp_path, capsys):
    out, path = tmp_path / "run", tmp_path / "out.json"
    pretrained.save(pretrained.fresh(tiny, seed=2), out)
    made = {"model": str(tiny), "reference": f"{files}/other", "forget": f"{files}/retain.jsonl",
            "retain": [f"{files}/{name}.jsonl" for name in ("forget", "text")],
            "facts": f"{files}/facts.jsonl", "holdout": f"{files}/holdout.jsonl"}
    (out / "args.json").write_text(json.dumps(made))
    usual = dict.fromkeys(("target", "reference", "forget", "retain", "facts", "holdout"))
    assert run(**usual, model=out, json=path) == 0
    assert list(numbers_shown(capsys.readouterr().out)) == [str(tiny), str(out), f"{files}/other"]
    found = json.loads(path.read_text())[str(out)]["rows"]
    assert {name: len(rows["nll"]) for name, rows in found.items()} == {
        "forget": 3, "retain": 6, "facts": 1, "holdout": 1}

    assert run(**usual | {"forget": f"{files}/forget.jsonl"}, model=out, json=path) == 0
    found = json.loads(path.read_text())[str(out)]["rows"]
    assert len(found["forget"]["nll"]) == 5 and "holdout" not in found

    (out / "args.json").write_text(json.dumps(made | {"retain": [f"{files}/gone.jsonl"]}))
    assert run(**usual, model=out) == 2
    assert "--retain" in capsys.readouterr().err


def test_a_taught_model_is_its_own_target(run, tiny, tmp_path, capsys):
    pretrained.save(pretrained.fresh(tiny, seed=2), tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"model": str(tiny), "forget": None}))
    assert run(model=tmp_path, target=None, reference=None, holdout=None) == 0
    assert list(numbers_shown(capsys.readouterr().out)) == [str(tmp_path)]


@pytest.mark.parametrize("template", ["nonsense", 3, ["plain"], None])
def test_a_template_that_args_json_makes_up_is_refused(run, tiny, tmp_path, capsys, template):
    (tmp_path / "args.json").write_text(json.dumps({"template": template}))
    assert run(model=tmp_path) == 2
    assert "args.json: unknown template" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["some-org/some-model", "a\0b", "\udc80", "/dev/zero"])
def test_a_file_in_a_folder_sends_nobody_to_the_hub(
    run, tiny, tmp_path, capsys, monkeypatch, named
):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(a))
    pretrained.save(pretrained.fresh(tiny, seed=2), tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"model": named, "forget": "x"}))
    assert run(model=tmp_path, target=None, reference=None, holdout=None) == 0
    out, err = capsys.readouterr()
    assert list(numbers_shown(out)) == [str(tmp_path)] and not asked
    assert (
        f"was made from {cli.printable(named)}, which is no folder here" in err
        and "--target" in err
    )


@pytest.mark.parametrize("told, reference", [("other", "other"), (None, "weights/retain")])
def test_the_reference_is_the_runs_own_though_the_bundled_target_has_one(
        files, tmp_path, told, reference):
    made = {"model": cli.bundled("weights/target"), "reference": told and f"{files}/{told}",
            "forget": f"{files}/forget.jsonl", "retain": f"{files}/retain.jsonl"}
    (tmp_path / "args.json").write_text(json.dumps(made))
    args = evaluate.parse_args([str(tmp_path)])
    evaluate.complete(args)
    assert args.reference == (f"{files}/{told}" if told else cli.bundled(reference))


def test_bundled_files_are_found_from_any_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = evaluate.parse_args([str(tiny)])
    evaluate.complete(args)
    for path in (
        args.target, args.reference, args.forget, *args.retain, *args.facts, args.holdout):
        assert os.path.exists(path)
    assert str(tmp_path) not in args.target
    args = evaluate.parse_args([str(tiny), "--forget", "mine.jsonl"])
    evaluate.complete(args)
    assert (args.target, args.reference, args.holdout) == (str(tiny), None, None)


@pytest.mark.parametrize("flag", ["json", "heatmap"])
def test_nothing_of_the_users_is_overwritten(run, files, tiny, tmp_path, capsys, flag):
    mine = tmp_path / "mine.json"
    linked = tmp_path / "link"
    linked.symlink_to(files / "facts.jsonl")
    for content in ("{}", '{"a": 1}', '{"a": {"b": 1}}', "[]", "<svg/>", "", "x"):
        mine.write_text(content)
        assert run(**{flag: mine}) == 2 and mine.read_text() == content
    for path in (
        files / "forget.jsonl",
        linked,
        tiny / "model.safetensors",
        tiny / "config.json",
        tiny / "new.json",
        files / "other/tokenizer.json",
    ):
        before = path.read_bytes() if path.exists() else None
        assert run(**{flag: path}) == 2, path
        assert (path.read_bytes() if path.exists() else None) == before
    out, err = capsys.readouterr()
    assert (
        out == ""
        and len(err.splitlines()) == 13
        and all(f"--{flag}" in line for line in err.splitlines())
    )


def test_a_name_as_long_as_a_file_system_takes_is_written(tmp_path):
    cli.write_json(tmp_path / ("ä" * 127), 1)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["1\n"]
    with pytest.raises(cli.InputError, match="too long"):
        cli.check_output("--json", tmp_path / ("ä" * 128), [], "")


def test_one_file_for_both_outputs_is_refused(run, tmp_path, capsys):
    assert run(json=tmp_path / "x", heatmap=tmp_path / "x") == 2
    assert "--heatmap" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_that_predicts_no_numbers_is_refused(run, tiny, tmp_path, capsys):
    decoder = pretrained.load(tiny)
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight.fill_(3e38)  # finite, but its products are not
    pretrained.save(decoder, tmp_path / "huge")
    assert run(model=tmp_path / "huge") == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{tmp_path}/huge: its predictions are not finite" in err.splitlines()[-1]


def test_an_interrupt_while_torch_is_imported_is_one_line():
    import signal
    import subprocess
    import sys

    program = subprocess.Popen(
        [sys.executable, "-v", str(cli.ROOT / "evaluate.py"), "x"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    said = []
    for line in program.stderr:
        if line.startswith("import 'numpy.linalg"):  # torch is yet to come
            program.send_signal(signal.SIGINT)
            said = program.stderr.read().splitlines()
            break
    assert program.wait(60) == 130
    assert "Traceback" not in "\n".join(said) and any(
        "evaluate.py: interrupted" in line for line in said
    )


@pytest.mark.parametrize("changes, message", [
    ({"bits": 1}, "--bits: 1 is out of range: give a number at least 2"),
    ({"bits": "9" * 400}, "--bits"), ({"bits": "four"}, "--bits: 'four' is not a number"),
    ({"template": "llama3"}, "no end token '<|eot_id|>'"),
    *(({flag: "nowhere"}, "nowhere: no such folder") for flag in ("model", "target", "reference")),
    ({"forget": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    ({"holdout": "/"}, "/: cannot be read"),
    *(({flag: ""}, f"--{flag}: must be text")
      for flag in ("forget", "reference", "target", "holdout", "json", "ask")),
    ({"forget": "pipe"}, "pipe: not a regular file"),
    *(({flag: at}, f"--{flag} {at}: cannot be written")
      for flag in ("json", "heatmap") for at in ("no/x", "/")),
    ({"device": "cuda:99"}, "--device cuda:99"), ({"device": "toaster"}, "--device toaster"),
    ({"unknown": "x"}, "unrecognized"), ({"facts": "retain.jsonl"}, "--facts: retain"),
    ({"retain": "bad.jsonl"}, "bad.jsonl:2: `text` must be a string"),
])
def test_wrong_input_is_refused_in_one_line_with_exit_code_two(
    run, changes, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text": 3}\n')
    os.mkfifo(tmp_path / "pipe")
    assert run(**changes) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("evaluate.py: ")
        and message in err
        and len(err.splitlines()) == 1
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_answers_are_options_in_every_facts_file_whatever_its_name(run, files, tmp_path):
    found = {}
    for name in ("facts", "capitals"):
        (tmp_path / f"{name}.jsonl").write_bytes((files / "facts.jsonl").read_bytes())
        assert run(facts=tmp_path / f"{name}.jsonl", json=tmp_path / "out.json") == 0
        numbers = json.loads((tmp_path / "out.json").read_text())[f"{files}/other"]["measurements"]
        found[name] = numbers[f"{name} probability"], numbers["model utility"]
    assert found["capitals"] == found["facts"]


def test_bits_reach_the_numbers_and_a_head_of_its_own_is_not_rounded(run, files, tmp_path):
    nll = []
    for bits in (None, 2):
        assert run(bits=bits, json=tmp_path / "out.json") == 0
        out = json.loads((tmp_path / "out.json").read_text())
        nll.append(out[f"{files}/other"]["measurements"]["forget NLL"])
    assert nll[0] != nll[1]
    untied = cli.ROOT / "tests/fixtures/qwen3"  # in `tiny` the head is the embedding, no layer
    before, after = pretrained.load(untied), pretrained.load(untied)
    evaluate.round_weights(after, 2)
    assert before.lm_head is not None and torch.equal(before.head, after.head)
    assert not torch.equal(before.layers[0].mlp.up_proj.weight, after.layers[0].mlp.up_proj.weight)


def test_the_heat_map_is_of_the_first_model_named(run, files, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "draw", lambda file, path, scores, *_: drawn.append(
        (path, scores.nll[0])))
    assert run(heatmap=tmp_path / "x.svg", json=tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())[f"{files}/other"]["rows"]
    assert drawn == [(f"{files}/other", rows["forget"]["nll"][0])]


def test_a_question_is_asked_in_the_template_of_the_run(tiny, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(measure.model, "generate",
                        lambda decoder, prompts, *_: asked.extend(prompts) or [[5]])
    model = shutil.copytree(tiny, tmp_path / "run")
    (model / "args.json").write_text(json.dumps({"template": "llama2"}))
    assert evaluate.main([str(model), "--ask", "Who?", "--device", "cpu"]) == 0
    assert data.Tokenizer(model).decode(asked[0]) == "[INST] Who? [/INST]"
