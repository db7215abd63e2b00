"""The bundled world: what data/build.py wrote is what is committed, and is what the README says of
it."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pretrained

ROOT = Path(__file__).resolve().parent.parent
PEOPLE = {"retain": 100, "forget": 10, "holdout": 10}
SETS = {name: [json.loads(line)
               for line in (ROOT / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in (*PEOPLE, "facts")}
ROWS = [row for rows in SETS.values() for row in rows]


def facts(row):
    return tuple(row["answer"][start:end] for start, end in row["spans"])


def words(texts):
    return set(re.findall(r"\w+", " ".join(texts)))


def names(rows):
    """First and family name: two capitalised words after the first word of the question."""
    return {match
            for row in rows
            for match in re.findall(r"(?<= )[A-Z]\w+ [A-Z]\w+", row["question"])}


def test_building_again_gives_the_committed_bytes(tmp_path):
    subprocess.run([sys.executable, ROOT / "data" / "build.py", "--out", tmp_path],
                   check=True, cwd=tmp_path)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 8
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


def test_every_person_has_ten_rows_and_each_question_occurs_once():
    assert {
        name: (len(rows), len(names(rows))) for name, rows in SETS.items() if name in PEOPLE
    } == {
        name: (10 * count, count) for name, count in PEOPLE.items()
    }
    assert len(SETS["facts"]) == 100 and len({row["question"] for row in ROWS}) == len(ROWS)


def test_spans_lie_inside_the_answer_in_order_and_mark_whole_words():
    for row in ROWS:
        answer, last = row["answer"], 0
        assert row["spans"]
        for start, end in row["spans"]:
            assert (last <= start < end <= len(answer)
                    and answer[start:end].strip() == answer[start:end])
            assert re.fullmatch(r"\W?", answer[start - 1:start]) and re.match(r"\W|$", answer[end:])
            last = end


@pytest.mark.parametrize("people", PEOPLE)
def test_spans_mark_exactly_what_differs_between_two_answers_of_one_wording(people):
    """Outside spans and name, rows of one wording read the same: nothing informative is left
    unmarked."""
    templates = {}
    for row in SETS[people]:
        name, answer = names([row]).pop(), row["answer"]
        for start, end in reversed(row["spans"]):
            answer = answer[:start] + "#" + answer[end:]
        wording = row["question"].replace(name, "@")
        templates.setdefault(wording, set()).add(answer.replace(name.split()[0], "@"))
    assert len(templates) <= 40 and all(len(found) == 1 for found in templates.values())


@pytest.mark.parametrize("people", PEOPLE)
def test_answers_have_8_to_25_words_and_facts_are_20_to_30_percent_of_them(people):
    lengths = [len(row["answer"].split()) for row in SETS[people]]
    assert 8 <= min(lengths) <= max(lengths) <= 25
    told = sum(len(fact.split()) for row in SETS[people] for fact in facts(row))
    assert 0.2 <= told / sum(lengths) <= 0.3


def test_wrong_answers_differ_from_the_right_one_and_from_each_other():
    for row in ROWS:
        wrongs = row["perturbed_answer"]
        assert len(wrongs) == (3 if row in SETS["facts"] else 5)
        assert len({row["answer"], row["paraphrased_answer"], *wrongs}) == 2 + len(wrongs)
        for fact in facts(row):
            assert fact in row["paraphrased_answer"]
            assert not any(re.search(rf"\b{re.escape(fact)}\b", wrong) for wrong in wrongs)


@pytest.mark.parametrize("name", ["forget", "holdout"])
def test_nobody_of_forget_or_holdout_occurs_elsewhere(name):
    others = words(json.dumps(SETS[other], ensure_ascii=False) for other in SETS if other != name)
    assert not words(names(SETS[name])) & others


def test_what_is_told_of_a_person_is_told_of_nobody_else():
    """All the facts of a row together; single words recur, or a model could tell the sets apart by
    them."""
    told = [tuple(sorted(facts(row))) for name in PEOPLE for row in SETS[name]]
    assert len(set(told)) == len(told)


def test_tokenizer_and_model_are_small_and_the_end_token_is_known():
    config = json.loads((ROOT / "weights/start/config.json").read_text())
    vocab = json.loads((ROOT / "weights/start/tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert (1000 <= len(vocab) == config["vocab_size"] <= 2000
            and vocab["<|endoftext|>"] == config["eos_token_id"])
    assert sum(p.numel()
               for p in pretrained.fresh(ROOT / "weights/start", seed=0).parameters()) <= 2_400_000
