"""Pictures of token weights show the text and nothing else; reports of entropy, what is there."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import cli
import data
import etw
import metrics
import screen
from measure import Scores


def labelled(entropy, logprobs, informative, ids=None):
    """Scores of one row with the given numbers."""
    tokens = [0, *(ids or [0] * len(entropy))]
    sequence = data.Sequence(tokens, 1, informative, False, 0)
    return Scores([sequence], [np.array([logprobs, entropy, [1.0] * len(entropy)], np.float64)])


@given(st.text())
@example("Żółć 🦊 e\u0301")
def test_the_pieces_of_an_answer_join_to_the_answer(letters, text):
    ids = letters.encode(text)[0]
    texts = screen.pieces(letters, ids)
    assert len(texts) == len(ids) and ("".join(texts) == text or "\ufffd" in text)
    assert screen.pieces(letters, ids + [letters.end_id])[-1] == " ∎"


@given(st.lists(st.tuples(st.text(max_size=6), st.floats(0, 1e6)), min_size=1, max_size=6))
@example([('<script>alert("&")</script>', 1.0), ("]]>\x00\x1b[2J\x9b31m\r\b\u202e\ufffe", 0.5)])
def test_heat_maps_escape_whatever_they_show(heat):
    texts, weights = zip(*heat, strict=True)
    shades = np.array(weights) / max(*weights, 1e-30)
    clean = [cli.printable(t) for t in texts]
    svg = screen.svg_heat([(texts, {"etw": np.array(weights), "<b>&": np.array(weights)})])
    parts = list(ElementTree.fromstring(svg).iter())
    assert {p.tag.split("}")[1] for p in parts} <= {"svg", "style", "text", "rect", "title"}
    shown = [p.text for p in parts if p.tag.endswith("text") and p.get("class") is None]
    assert shown == [t for t in clean if t] * 2
    opacity = [float(p.get("opacity")) for p in parts if p.tag.endswith("rect")]
    expected = [shade for t, shade in zip(texts, shades, strict=True) if t]
    assert_allclose(opacity, expected * 2, atol=0.0051)
    coloured, bars = (screen.terminal_heat(texts, np.array(weights), c) for c in (True, False))
    for shade in shades:
        colour = f"\x1b[48;2;{int(255 * shade)};{int(150 * shade)};0m"
        coloured = coloured.replace(colour, "").replace("\x1b[0m", "")
    assert "".join(clean).isprintable() and coloured == "".join(clean)
    assert bars.startswith("".join(clean) + "\n")


def test_a_heat_map_without_colour_draws_bars_under_the_text():
    assert screen.terminal_heat(["in", " Oru"], np.array([0.0, 2.0]), False) == "in Oru\n▁▁████"


def test_pairs_have_the_same_confidence_and_the_most_different_entropy(letters):
    scores = labelled([0.5, 2.0, 1.0, 4.0], np.log([0.5, 0.5, 0.501, 0.1]), [False] * 4,
                      letters.encode("abcd")[0])
    lines = screen.confidence_pairs(scores, letters, count=1).splitlines()[2:]
    assert [line.split()[1:] for line in lines] == [["0.5", "…[a]"], ["2", "…a[b]"]]


def test_the_entropy_report_counts_each_class_and_shows_its_quantiles():
    scores = labelled([1.0, 3.0, 5.0, 0.25], [-1.0] * 4, [True, True, True, False])
    informative, structural = (
        line.split() for line in screen.entropy_report(scores).splitlines()[1:]
    )
    assert informative == ["informative", "3", "1.2", "2", "3", "4", "4.8"]
    assert structural == ["structural", "1", *["0.25"] * 5]
    assert screen.entropy_report(labelled([1.0], [-1.0], None)) == ""


@pytest.mark.parametrize(
    "informative, methods", [(None, ["etw", "wga"]), ([True, False], ["etw", "wga", "spans"])]
)
def test_the_heat_map_has_the_methods_that_the_labels_allow(letters, informative, methods):
    scores = labelled([1.0, 3.0], [-1.0, -2.0], informative, letters.encode("ab")[0])
    (texts, weights), = screen.heat_blocks(scores, letters, methods=("etw", "wga", "spans"))
    assert texts == ["a", "b"] and list(weights) == methods
    assert_allclose(weights["etw"], [0.5, 1.5])
    assert_allclose(weights["wga"], np.exp([-1.0, -2.0]))


@pytest.mark.parametrize("method", etw.WEIGHTINGS)
def test_token_weights_are_those_of_etw_with_the_betas_given(method):
    import torch
    scores = labelled([1.0, 3.0], [-1.0, -2.0], [True, False])
    start = np.array([[-0.5, -2.5], [1.0, 1.0]])
    beta = {"wga": (2.0,), "satimp": (1.0, 0.5)}.get(method, ())
    row = etw.Tokens(torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[1.0, 3.0]]).double(),
                     torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-0.5, -2.5]]).double(),
                     torch.tensor([[True, False]]), torch.tensor([[1.0, 1.0]]).double())
    found = metrics.token_weights(method, scores.sequences[0], scores.tokens[0], start, beta)
    assert_allclose(found, etw.weigh(method, row, *beta)[0])
