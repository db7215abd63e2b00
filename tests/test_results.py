"""The scripts under results/: how a setting is chosen, what utility is counted over, and the labels taken from TOFU."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import compare
import pytest
import tofu

ROOT = Path(__file__).resolve().parents[1]
TOFU = ["--sweep", "results/tofu-sweep.jsonl", "--repeats", "results/tofu-seeds.jsonl", "--over", "retain"]


def record(quality, lost, **more):
    return {"method": "etw", "forget quality": quality, "-log10 FQ": -compare.np.log10(quality), "utility lost": lost} | more


def test_the_setting_chosen_is_the_mildest_that_forgot_else_the_one_that_forgot_most():
    forgot, mildly, barely, ruined = record(0.5, 4), record(0.06, 1), record(1e-9, 0), record(0.04, 70)
    assert compare.chosen([forgot, mildly, barely, ruined], "etw") is mildly
    assert compare.chosen([barely, ruined], "etw") is ruined


def test_with_a_bound_the_setting_chosen_forgot_most_among_those_that_lost_no_more():
    much, less, ruined = record(0.2, 1.5), record(0.06, 1), record(0.5, 70)
    assert compare.chosen([less, much, ruined], "etw", within=2) is much
    assert compare.chosen([ruined], "etw", within=2) is ruined


def test_utility_lost_can_be_counted_over_the_utility_sets_that_the_model_was_taught(tmp_path):
    taught, chance = ({f"{name} {part}": value for part in ("probability", "rouge", "truth_ratio")}
                      for name, value in (("retain", 0.8), ("facts", 0.1)))
    worse = record(0.5, 99) | chance | {key: 0.6 for key in taught}
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (record(1, 0) | taught | chance, worse)))
    assert abs(compare.read(tmp_path / "sweep.jsonl", ["retain"])[1]["utility lost"] - 20) < 1e-9
    assert compare.read(tmp_path / "sweep.jsonl")[1]["utility lost"] == 99


def test_a_word_of_a_tofu_answer_is_informative_where_only_the_wrong_answers_drop_it():
    row = {"answer": "Ada was born in Tarnow.", "paraphrased_answer": "Tarnow is where Ada was born.",
           "perturbed_answer": [f"{city} is where Ada was born." for city in ("Oslo", "Lima", "Bern", "Pune", "Kyiv")]}
    assert [row["answer"][a:b] for a, b in tofu.informative(row)] == ["Tarnow"]


@pytest.mark.parametrize("command", [
    ["tables"], ["grid", "--lr", "3e-4"], ["tables", *TOFU], ["tables", "--within", "5", *TOFU],
    ["grid", "--lr", "3e-4", "--epochs", "6", "--strengths", *"0.001 0.003 0.01 0.03 0.1 0.3 1 3 10".split(), *TOFU],
], ids=["bundled tables", "bundled grid", "TOFU tables", "TOFU tables within a bound", "TOFU grid"])
def test_every_row_of_the_comparison_tables_is_what_the_committed_runs_give(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    compare.main(command)
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") > 8
    assert set(printed.split("\n")) - {""} <= set((ROOT / "results/README.md").read_text("utf-8").split("\n"))
    if command[0] == "tables" and "--within" not in command:
        assert printed.split("\n\n")[1] in (ROOT / "README.md").read_text("utf-8")
