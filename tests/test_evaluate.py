"""The measurements against their definitions, the numbers read off a model, the pictures, and the command line."""
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import hmean

import data
import etw
import evaluate
import model

LOG2, LOG4, LOG8 = math.log(2), math.log(4), math.log(8)


def close(found, expected, digits=12):
    assert np.asarray(found).dtype == np.float64
    assert_allclose(found, expected, rtol=10.0 ** -digits, atol=10.0 ** -digits)


# ---- metrics


@pytest.mark.parametrize("metric, arguments, expected", [
    ("probability", ([LOG2, 0.0],), [0.5, 1.0]), ("probability", ([LOG2], [[LOG4, LOG4]]), [0.5]),
    ("probability", (LOG2, [LOG4]), 2 / 3),  # of a single row
    ("truth_ratio", ([LOG2, 0.0], [[LOG8, LOG2], [LOG2, LOG8]]), [0.5, 0.25]),  # geometric mean of wrong over correct
    ("truth_ratio", ([0.0, 2000.0], [[2000.0], [0.0]]), [0.0, math.inf]),  # and no warning
    ("forget_quality", ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), 1.0),
    ("forget_quality", ([1, 2, 3], [4, 5, 6]), 0.1),  # 2 of the 20 ways to divide six ranks are as extreme
    ("forget_quality", (np.arange(400), np.arange(400) + 1000), 0.0),
    ("model_utility", ([1, 0.5, 0.25],), 3 / 7), ("model_utility", ([1, 0.5, 0.0],), 0.0),
    *(("extraction_strength", (hits,), strength)
      for hits, strength in (([1, 1, 0], 0), ([1, 1, 1], 1), ([1, 0, 1, 1], 0.5), ([0, 1, 1, 1], 0.75), ([0], 0))),
    ("min_k", ([-5.0, -1.0, -4.0, -2.0, -3.0],), 4.5), ("min_k", ([-3.0, -1.0],), 3.0),  # the least likely two fifths
    ("roc_auc", ([], [1.0]), math.nan), ("roc_auc", ([1.0], []), math.nan),
    ("priv_leak", (0.5, np.float64(0.5)), 0.0), ("priv_leak", (0.5, 1.0), math.nan),
    ("priv_leak", (0.25, np.float64(0.5)), 50.0),  # forget rows look less likely than unseen ones
    ("priv_leak", (1.0, np.float64(0.5)), -100.0),
])
def test_metrics_are_what_their_definitions_give_by_hand(metric, arguments, expected):
    close(getattr(evaluate, metric)(*arguments), expected)


@pytest.mark.parametrize("prediction, reference, expected", [
    ("Ada was born in Oru", "Ada was born in Oru", 1), ("ADA, was: born!", "ada was born in Oru", 3 / 5),
    ("Oru in born was Ada", "Ada was born in Oru", 1 / 5), ("it is not it", "it's", 1 / 2), ("", "Ada", 0),
    ("Ada", "?!", 0), ("żółć 🦊", "Żółć", 1), ("x x x x", "x", 1), ("walks", "walking", 0),
])
def test_rouge_is_the_longest_common_subsequence_of_words_over_the_references_words(prediction, reference, expected):
    close(evaluate.rouge_l_recall(prediction, reference), expected)


@given(*[st.lists(st.integers(0, 4), min_size=1, max_size=12)] * 2)
def test_roc_auc_is_the_share_of_pairs_in_order_with_ties_counting_half(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    close(evaluate.roc_auc(positive, negative), sum(pairs) / len(pairs))


# ---- numbers read off a model

ROWS = [
    {"question": "Where was Ada born?", "answer": "Ada was born in Oru.", "paraphrased_answer": "In Oru Ada was born.",
     "perturbed_answer": ["In Belt Ada was born.", "In Kana she was."], "spans": [[16, 19]]},
    {"question": "Where was Bo born?", "answer": "Bo was born in a place named Belt, far <away> & \"up\".",
     "perturbed_answer": ["Bo was born in Oru.", "It was Miv.", "No."], "spans": [[29, 33]]},
    {"question": "¿Quién? 🦊", "answer": "Żółć 🦊\n.", "spans": []},
    {"text": "Ada was born in Oru and Bo in Belt, as was told before. " * 5},
    {"question": "Who?", "answer": "Cy", "paraphrased_answer": "It is Cy", "perturbed_answer": "Di"},
]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder with the files of an evaluation and a model `other`, with other weights than tiny."""
    folder = tmp_path_factory.mktemp("evaluate")
    sets = {"forget": ROWS, "retain": ROWS[1:4], "facts": ROWS[:1], "text": ROWS[3:4], "holdout": ROWS[2:3]}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model.save(model.fresh(tiny, seed=1), folder / "other")
    return folder


@pytest.fixture(scope="module")
def scored(tiny, letters, world):
    """(decoder, rows, their scores), the weights ten times as large: fresh ones give nearly uniform predictions."""
    decoder = model.load(tiny)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
    rows = data.read_jsonl(world / "forget.jsonl")
    return decoder, rows, evaluate.score(decoder, letters, rows)


def slow_numbers(decoder, tokenizer, row, answer):
    """(log p of each answer token, whether argmax gives it) of one row, from whole float64 softmaxes, no batch."""
    (sequence,), _ = data.encode([row], tokenizer, 128, [answer])
    logits = decoder.forward(torch.tensor([sequence.tokens]))[0].double()[sequence.start - 1:-1]
    targets = torch.tensor(sequence.tokens[sequence.start:])
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return logprobs.numpy(), (logits.argmax(-1) == targets).numpy()


@torch.inference_mode()
def test_scores_equal_the_loop_written_from_the_definitions(scored, letters):
    decoder, rows, found = scored
    for i, row in enumerate(rows):
        if row.text:
            continue
        logprobs, hits = slow_numbers(decoder, letters, row, row.answer)
        own = -logprobs.mean()
        close(found["nll"][i], own, 4)
        close(found["probability"][i], math.exp(-own), 4)
        close(found["memorised"][i], hits[:-1].mean())  # without the end token, as the next two
        close(found["extraction"][i], evaluate.extraction_strength(hits[:-1]))
        close(found["min_k"][i], evaluate.min_k(logprobs[:-1]), 4)
        close(found["rouge"][i], evaluate.rouge_l_recall(found["answer"][i], row.answer))
        if not row.perturbed_answer:
            assert found["truth_ratio"][i] is None
            continue
        correct = -slow_numbers(decoder, letters, row, row.paraphrased_answer or row.answer)[0].mean()
        wrong = [-slow_numbers(decoder, letters, row, a)[0].mean() for a in row.perturbed_answer]
        close(found["truth_ratio"][i], math.exp(correct - sum(wrong) / len(wrong)), 4)
        options = evaluate.score(decoder, letters, [row], options=True, text=False)
        close(options["probability"][0], math.exp(-own) / (math.exp(-own) + sum(math.exp(-w) for w in wrong)), 4)


def test_the_end_token_counts_in_the_probability_and_not_in_memorisation_and_membership(scored, letters, monkeypatch):
    decoder, rows, _ = scored

    def surprised_by_the_end(_, sequences, *args, **kwargs):
        sizes = [len(s.tokens) - s.start for s in sequences]
        return [np.array([[-1.0] * (n - 1) + [-100.0], [1.0] * n, [1.0] * (n - 1) + [0.0]]) for n in sizes]

    monkeypatch.setattr(evaluate, "answer_tokens", surprised_by_the_end)
    found = evaluate.score(decoder, letters, rows[:1], text=False)
    n = found["tokens"][0][1].shape[1]
    assert found["memorised"] == found["extraction"] == found["min_k"] == [1.0]
    assert found["nll"] == pytest.approx([(n + 99) / n])


@given(st.permutations(range(8)), st.sampled_from([1, 40, 128, 10_000]))
def test_answer_tokens_depend_neither_on_order_nor_on_the_size_of_batches(scored, letters, order, budget):
    decoder, rows, _ = scored
    sequences, _ = data.encode(rows, letters, 40)
    expected = evaluate.answer_tokens(decoder, sequences, hits=True)
    found = evaluate.answer_tokens(decoder, [sequences[i] for i in order], hits=True, budget=budget)
    for i, numbers in zip(order, found, strict=True):
        assert_allclose(numbers, expected[i], rtol=1e-4, atol=1e-5)


def made_up(ratios, probability=0.5, rouge=0.25, min_k=()):
    n = len(ratios)
    return {"truth_ratio": ratios, "probability": [probability] * n, "rouge": [rouge] * n, "memorised": [0.5] * n,
            "extraction": [0.0, None] + [1.0] * (n - 2), "min_k": list(min_k), "tokens": []}


def test_a_summary_is_what_the_definitions_give_by_hand():
    forget, unseen = [0.5, 4.0, None, 1.0], made_up([None, None], min_k=[2.0, 4.0])
    scores = {"forget": made_up(forget, min_k=[1.0, 3.0]), "retain": made_up([0.5, 4.0, None], 0.8, 0.4),
              "facts": made_up([0.0, 0.25], 1.0, 0.5), "holdout": unseen}
    reference = {"forget": made_up(forget, min_k=[2.0, 4.0]), "holdout": unseen}
    utility = hmean([0.8, 0.4, 0.25, 1.0, 0.5, 0.875])
    assert evaluate.summarise(scores, {"model utility": 0.9}, reference) == pytest.approx({
        "forget probability": 0.5, "forget rouge": 0.25, "forget truth_ratio": (0.5 + 0.25 + 1) / 3,
        "forget memorised": 0.5, "forget extraction": 2 / 3,
        "retain probability": 0.8, "retain rouge": 0.4, "retain truth_ratio": 0.25,
        "facts probability": 1.0, "facts rouge": 0.5, "facts truth_ratio": 0.875,
        "model utility": utility, "utility lost": 90 - 100 * utility, "forget quality": 1.0, "-log10 FQ": 0.0,
        "Min-K AUC": 0.75, "PrivLeak": -50.0, "weights AUC": None,
    })


# ---- what a weighting looks at


def labelled(entropy, logprobs, informative):
    """Scores of one row with the given numbers."""
    sequence = data.Sequence([0] * (len(entropy) + 1), 1, informative, True, 0)
    return {"tokens": [(sequence, np.array([logprobs, entropy], np.float64))]}


def test_every_weighting_has_an_auc_and_each_looks_at_its_own_numbers():
    scores = labelled([1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -0.1, -0.2], [False, False, True, True])
    aucs = evaluate.weights_auc(scores)
    assert list(aucs) == list(etw.WEIGHTINGS)
    assert aucs["etw"] == aucs["wga"] == aucs["spans"] == 1 and aucs["imp"] == 0
    assert aucs["uniform"] == aucs["tnpo"] == aucs["npo"] == 0.5  # against itself as the starting model
    start = labelled([1.0] * 4, [-1.0, -2.0, -0.2, -0.3], [False, False, True, True])
    assert evaluate.weights_auc(scores, start)["tnpo"] == 1
    of_another_tokenizer = labelled([1.0], [-1.0], [True])
    assert evaluate.weights_auc(scores, of_another_tokenizer) == aucs


@pytest.mark.parametrize("informative", [None, [False, False]])
def test_unlabelled_or_all_structural_rows_have_no_auc(informative):
    scores = labelled([1.0, 2.0], [-1.0, -2.0], informative)
    assert evaluate.weights_auc(scores) == dict.fromkeys(etw.WEIGHTINGS)


def test_pairs_have_the_same_confidence_and_the_most_different_entropy(letters):
    scores = labelled([0.5, 2.0, 1.0, 4.0], np.log([0.5, 0.5, 0.501, 0.1]), [False] * 4)
    scores["tokens"] = [(s._replace(tokens=letters.encode("xabcd")[0]), t) for s, t in scores["tokens"]]
    lines = evaluate.confidence_pairs(scores, letters, count=1).splitlines()[2:]
    assert [line.split()[1:] for line in lines] == [["0.5", "…[a]"], ["2", "…a[b]"]]


@given(st.text())
@example("Żółć 🦊 e\u0301")
def test_the_pieces_of_an_answer_join_to_the_answer(letters, text):
    ids = letters.encode(text)[0]
    texts = evaluate.pieces(letters, ids)
    assert len(texts) == len(ids) and ("".join(texts) == text or "\ufffd" in text)
    assert evaluate.pieces(letters, ids + [letters.end_id])[-1] == " ∎"


@given(st.lists(st.tuples(st.text(max_size=6), st.floats(0, 1e6)), min_size=1, max_size=6))
@example([('<script>alert("&")</script>', 1.0), ("]]>\x00\x1b[2J\x9b31m\r\b\u202e\ufffe", 0.5)])
def test_heat_maps_escape_whatever_they_show(heat):
    texts, weights = zip(*heat, strict=True)
    shades, clean = np.array(weights) / max(*weights, 1e-30), [evaluate.printable(t) for t in texts]
    svg = evaluate.svg_heat([(texts, {"etw": np.array(weights), "<b>&": np.array(weights)})])
    parts = list(ElementTree.fromstring(svg).iter())
    assert {p.tag.split("}")[1] for p in parts} <= {"svg", "style", "text", "rect", "title"}
    assert [p.text for p in parts if p.tag.endswith("text") and p.get("class") is None] == [t for t in clean if t] * 2
    opacity = [float(p.get("opacity")) for p in parts if p.tag.endswith("rect")]
    assert_allclose(opacity, [shade for t, shade in zip(texts, shades, strict=True) if t] * 2, atol=0.0051)
    coloured, bars = (evaluate.terminal_heat(texts, np.array(weights), colour) for colour in (True, False))
    for shade in shades:
        coloured = coloured.replace(f"\x1b[48;2;{int(255 * shade)};{int(150 * shade)};0m", "").replace("\x1b[0m", "")
    assert "".join(clean).isprintable() and coloured == "".join(clean) and bars.startswith("".join(clean) + "\n")


def test_a_heat_map_without_colour_draws_bars_under_the_text():
    assert evaluate.terminal_heat(["in", " Oru"], np.array([0.0, 2.0]), False) == "in Oru\n▁▁████"


@pytest.mark.parametrize("value, shown", [(None, "–"), (math.nan, "–"), (0, "0.000"), (0.0005, "5.0e-04"),
                                          (-12.3456, "-12.346"), (math.inf, "inf")])
def test_numbers_show_three_digits_and_what_is_not_there_a_dash(value, shown):
    assert evaluate.show(value) == shown


# ---- the command line


@pytest.fixture
def run(world, tiny):
    """A function that evaluates `other` on the small files, with some arguments changed (None: left out)."""
    usual = {"model": f"{world}/other", "target": tiny, "reference": tiny, "device": "cpu"} | {
        name: f"{world}/{name}.jsonl" for name in ("forget", "retain", "facts", "holdout")}

    def run(**changes):
        found = {k: str(v) for k, v in (usual | changes).items() if v is not None}
        return evaluate.main([found.pop("model"), *(part for k, v in found.items() for part in (f"--{k}", v))])
    return run


def test_json_holds_the_table_and_a_value_for_every_row(run, world, tiny, tmp_path, capsys):
    assert run(json=tmp_path / "out.json") == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out.json").read_text())
    assert len({len(line) for line in lines}) == 1
    assert list(found) == [line.split()[0] for line in lines[2:]] == [f"{world}/other", str(tiny)]
    columns = dict.fromkeys(c for one in found.values() for c in one["measurements"])
    for line, one in zip(lines[2:], found.values(), strict=True):
        assert line.split()[1:] == [evaluate.show(one["measurements"].get(c)) for c in columns]
        assert list(one["weights AUC"]) == list(etw.WEIGHTINGS)
        for name, rows in (("forget", 5), ("retain", 3), ("facts", 1), ("holdout", 1)):
            assert all(len(values) == rows for values in one["rows"][name].values())
        forget = one["rows"]["forget"]
        assert evaluate.average(forget["probability"]) == pytest.approx(one["measurements"]["forget probability"])
        assert [r is None for r in forget["truth_ratio"]] == [False, False, True, True, False]
    other, start = (one["measurements"] for one in found.values())
    assert start["forget quality"] == 1 and start["utility lost"] == 0
    assert other["utility lost"] == pytest.approx(100 * (start["model utility"] - other["model utility"]))
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


@pytest.mark.parametrize("changes, methods", [
    ({}, {"etw", "wga", "imp", "satimp", "spans"}),
    (dict.fromkeys(("forget", "retain"), "text.jsonl") | {"holdout": None}, {"etw", "wga", "imp", "satimp"})])
def test_the_heat_map_shows_every_method_that_the_rows_allow(run, world, tmp_path, capsys, changes, methods):
    picture = tmp_path / "heat.svg"
    assert run(heatmap=picture, **{k: v and world / v for k, v in changes.items()}) == 0
    assert {p.text for p in ElementTree.parse(picture).iter() if p.get("class") == "name"} == methods
    assert "🦊" in picture.read_text() or changes
    shown = capsys.readouterr().out
    assert "The same confidence, the most different entropy" in shown
    assert all(f"{name} " in shown for name in etw.WEIGHTINGS) and ("–" if changes else "structural") in shown


def test_every_model_named_answers_the_question(tiny, letters, world, capsys):
    assert evaluate.main([str(tiny), f"{world}/other", "--ask", "Where was Ada born?", "--device", "cpu"]) == 0
    said = evaluate.answers(model.load(tiny), letters, [data.Example("Where was Ada born?")])[0]
    out = capsys.readouterr().out
    assert out.startswith(f"{tiny}: {evaluate.printable(said)}") and f"\n{world}/other: " in out


def test_rounding_keeps_the_largest_weight_of_a_row_and_leaves_few_values_and_the_head_alone(tiny):
    before, after = model.load(tiny), model.load(tiny)
    evaluate.round_weights(after, 4)
    was, now = (m.layers[0].mlp.up_proj.weight.detach() for m in (before, after))
    step = was.abs().amax(1, keepdim=True) / 7
    assert_allclose(now, (was / step).round() * step, rtol=1e-6)
    assert max(len(row.unique()) for row in now) <= 15
    assert torch.equal(before.head, after.head) and torch.equal(before.norm.weight, after.norm.weight)


def test_the_target_of_a_run_is_the_model_it_started_from(run, tiny, tmp_path, capsys):
    model.save(model.fresh(tiny, seed=2), tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"model": str(tiny), "from_scratch": False}))
    assert run(model=tmp_path, target=None, reference=None, holdout=None) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [str(tiny), str(tmp_path)]


@pytest.mark.parametrize("changes, message", [
    ({"bits": 1}, "--bits: 1 is out of range: give a number at least 2"), ({"bits": "9" * 400}, "--bits"),
    ({"bits": "four"}, "--bits: 'four' is not a number"), ({"template": "llama3"}, "no end token '<|eot_id|>'"),
    *(({flag: "nowhere"}, "nowhere: no such folder") for flag in ("model", "target", "reference")),
    ({"forget": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"), ({"holdout": "/"}, "/: cannot be read"),
    *(({flag: at}, f"--{flag} {at}: cannot be written") for flag in ("json", "heatmap") for at in ("no/x", "/")),
    ({"device": "cuda:99"}, "--device cuda:99"), ({"device": "toaster"}, "--device toaster"),
    ({"unknown": "x"}, "unrecognized"), ({"facts": "retain.jsonl"}, "--facts: retain"),
    ({"retain": "bad.jsonl"}, "bad.jsonl:2: `text` must be a string"),
])
def test_wrong_input_is_refused_in_one_line_with_exit_code_two(run, changes, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text": 3}\n')
    assert run(**changes) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("evaluate.py: ") and message in err and len(err.splitlines()) == 1
    assert len(list(tmp_path.iterdir())) == 1
