"""README and docs tell the truth: commands parse, the quick start runs, code is what it says, a
page is a page."""
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import data
import etw
import evaluate
import measure
import metrics
import pretrained
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
RECIPES = (ROOT / "docs/recipes.md").read_text("utf-8")
PARSERS = {"train.py": train.parse_args, "evaluate.py": evaluate.parse_args}


def commands():
    """Every `python FILE ...` of the indented blocks, its comment (two spaces and more) cut off."""
    lines = re.findall(r"^    (python .+)$", README + "\n" + RECIPES, re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}", line)[0]) for line in lines if not line.endswith("\\")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_names_a_file_that_exists_and_flags_that_parse(command):
    assert (ROOT / command[1]).is_file()
    if command[1] in PARSERS and "-h" not in command:
        PARSERS[command[1]](command[2:])


def test_the_quick_start_runs_and_shows_what_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    start = next(c for c in commands() if c[1:] == ["train.py", "--forget", "data/forget.jsonl"])
    assert train.main([*start[2:], "--out", str(tmp_path / "run"), "--epochs", "1",
                       "--batch-size", "8", "--measure-rows", "9"]) == 0
    shown = capsys.readouterr().out
    for name in ("before", "after", "never taught", "forget probability", "forget informative NLL",
                 "forget other NLL", "talk", "endless", "distance", "forget quality",
                 "retain probability", "facts probability", "forget: ", "retain: "):
        assert name in shown, name
    # The never-taught model answers the forget questions alone: there it is the goal.
    assert [shown.count(f"\n  {name}") for name in ("before", "after", "never taught")] == [6, 6, 3]
    assert json.loads(
        (tmp_path / "run" / "result.json").read_text())["before"]["forget probability"] > 0.99


def test_readme_is_one_page():
    assert len(README.encode()) <= 8192


def test_every_file_that_is_named_exists():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(links) > 8 and all((ROOT / link).exists() for link in links)


def test_the_lines_shown_as_the_loss_are_the_lines_that_every_step_runs():
    shown = next(b for b in blocks("python") if "L_r" in b)
    source = "".join(line.strip() + "\n"
                     for line in inspect.getsource(train.step_loss).splitlines())
    assert all(line.strip() + "\n" in source for line in shown.splitlines())


def blocks(language):
    return re.findall(rf"```{language}\n(.+?)```", README, re.DOTALL)


def test_the_example_rows_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(blocks("json")[0])
    question, text = data.read_jsonl(tmp_path / "rows.jsonl")
    assert question.answer[slice(*question.spans[0])] == "Tarnow" and text.text


def test_the_loss_for_ones_own_trainer_is_the_one_that_train_py_descends():
    scope = {}
    exec(next(b for b in blocks("python") if "def unlearning_loss" in b), scope)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=g, requires_grad=True)
    labels = torch.randint(0, 11, (2, 6), generator=g)
    labels[0, :3], labels[1, :2] = -100, -100
    is_forget = torch.tensor([True, False])
    theirs = scope["unlearning_loss"](logits, labels, is_forget, lam=0.5)
    tokens = etw.Tokens(*etw.label_stats(logits, labels))
    ours = train.step_loss(tokens, is_forget, (3, 4), train.Recipe(lam=0.5, method="etw"))[0]
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (theirs, ours)))


def test_the_example_weighting_is_one():
    scope = {"etw_weights": etw.etw_weights, "WEIGHTINGS": {}}
    exec(next(b for b in blocks("python") if "def mine" in b), scope)
    tokens = etw.Tokens(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]),
                        torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(scope["WEIGHTINGS"]["mine"](tokens), torch.tensor([[0.2, 1.8]]))


def test_the_bundled_weights_know_what_the_readme_says(monkeypatch):
    """Target: every set at 0.99 and more; ROC-AUC of the ETW weights at least 0.9, where
    wga looks the other way. Retrained: ignorant of the forget set."""
    monkeypatch.chdir(ROOT)
    found = {}
    sets = {kind: data.read_jsonl(f"data/{kind}.jsonl") for kind in ("forget", "facts")}
    for name in ("target", "retain"):
        decoder, tokenizer = pretrained.load(f"weights/{name}"), data.Tokenizer(f"weights/{name}")
        world = measure.World(sets, tokenizer, 256)
        found[name] = world.measure(decoder, wrong=("facts",), text=())
    known = {(name, kind): metrics.average(scores[kind].probability)
             for name, scores in found.items() for kind in sets}
    assert known["target", "forget"] >= 0.99 and known["target", "facts"] >= 0.99
    assert known["retain", "facts"] >= 0.99 and known["retain", "forget"] <= 0.35
    aucs = metrics.weights_auc(found["target"]["forget"])
    assert aucs["etw"] >= 0.9 and aucs["wga"] < 0.1 and aucs["spans"] == 1
