"""The scripts under results/: runs that survive a kill, the choice of a setting, tables, labels."""
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import bench
import compare
import numpy as np
import pytest
import scatter
import smollm2
import tofu
import torch

import cli
import data
import measure
import pretrained

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ["--sweep", "results/smollm2-sweep.jsonl", "--repeats", "results/smollm2-seeds.jsonl",
           "--over", "retain", "world_facts"]
TOFU = ["--sweep", "results/tofu-sweep.jsonl", "--repeats", "results/tofu-seeds.jsonl",
        "--over", "retain"]
ETW = ["--methods", "etw", "--sweep", "results/etw-sweep.jsonl",
       "--repeats", "results/etw-seeds.jsonl"]
TABLES = {
    "tables": ["tables"],
    "keep runs": ["runs", "--methods", "keep"],
    "smollm2": ["tables", *SMOLLM2],
    "smollm2 details": ["details", *SMOLLM2],
    "smollm2 details at T 1.5": ["details", *SMOLLM2, "--temperature", "1.5",
                                 "--methods", "etw", "keep"],
    "smollm2 runs": ["runs", *SMOLLM2],
    "etw": ["tables", *ETW],
    "etw runs": ["runs", *ETW],
    "tofu": ["tables", *TOFU],
    "tofu grid": ["grid", *TOFU, "--lr", "1e-3", "--epochs", "8",
                  "--strengths", "0.03", "0.2", "2"],
    "grid": ["grid", "--lr", "3e-4", "--epochs", "14", "--strengths", "0.03", "0.2", "2"]}


def record(distance, lost=0.0, endless=0.0, **more):
    return {"method": "etw", "strength": 0.1, "lambda": 0.1, "lr": 1e-3, "epochs": 2,
            "layers": 1.0, "epoch": 2, "seed": 0,
            "distance": distance, "utility lost": lost, "endless": endless} | more


# ---- The rule of choice


def test_the_setting_chosen_is_nearest_to_the_retrained_model_among_those_that_keep_most():
    near, keeps, broken = record(0.5, lost=2.5), record(0.9, lost=2.0), record(0.1, endless=0.06)
    far = record(1.5, lost=-1.0, endless=0.05)
    assert compare.chosen([near, keeps, broken, far], "etw") is keeps


def test_a_run_that_forgot_nothing_is_not_chosen_however_near_it_is():
    goal = {"method": "retrained", "forget informative NLL": 6.0}
    idle, gone = record(2.0), record(3.0) | {"forget informative NLL": 3.0}
    idle["forget informative NLL"] = 2.9
    assert compare.chosen([goal, idle, gone], "etw") is gone
    assert compare.chosen([goal, idle], "etw") is idle


def test_where_no_run_keeps_so_much_the_bound_is_five_points_and_else_there_is_none():
    mild, endless, ruined = record(0.9, lost=5.0), record(0.8, endless=0.9), record(0.1, lost=70)
    assert compare.chosen([mild, endless, ruined], "etw") is endless
    assert compare.chosen([mild, ruined], "etw") is mild
    assert compare.chosen([ruined, record(0.2, lost=60)], "etw") is ruined


def test_runs_that_diverged_and_other_methods_are_not_chosen():
    diverged = {"method": "etw", "epoch": 0, "diverged": True}
    assert compare.chosen([diverged, record(1, method="wga")], "etw") is None


def test_other_seeds_of_a_setting_are_those_of_its_epoch_and_budget():
    pick, same = record(1), record(3, seed=2)
    strangers = record(1, seed=2, epoch=1), record(1, seed=2, epochs=9), record(1, seed=2, lr=1)
    assert compare.others([*strangers, same], pick) == [same]


def test_a_run_with_another_temperature_or_beta_is_another_method(capsys, tmp_path):
    mine, half = record(1.0), record(2.0, lost=3, layers=0.5)
    warm = record(0.1, lost=1) | {"temperature": 2.0}
    bare = record(0.2, lost=2) | {"beta": [2.5, 0.0]}
    assert compare.chosen([warm, mine, bare], "etw") is mine
    assert compare.chosen([warm, mine, bare], "etw", 2.0) is warm
    assert compare.chosen([warm, mine, bare], "etw", beta=[2.5, 0.0]) is bare
    other_seed = record(1, seed=1) | {"temperature": 2.0}
    assert compare.others([other_seed, bare], warm) == [other_seed]
    assert len({compare.key_of(r) for r in (warm, mine, bare)}) == 3

    write(tmp_path / "sweep", [{"method": "target"}, mine, warm, bare, half])
    write(tmp_path / "seeds", [{"method": "target"}, record(3, seed=1)])
    compare.main(["runs", "--sweep", str(tmp_path / "sweep"), "--repeats", str(tmp_path / "seeds")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| etw")]
    plain = "0.1, 0.001, 2"
    assert [line.split(" | ")[1] for line in lines] == [
        plain, f"{plain}, layers 0.5", f"{plain}, T 2", f"{plain}, β 2.5 0", plain]
    for flags, lost in ([], 0), (["--temperature", "2"], 1), (["--layers", "0.5"], 3):
        compare.main(["grid", "--sweep", str(tmp_path / "sweep"), "--methods", "etw", "--lr",
                      "1e-3", "--epochs", "2", "--strengths", "0.1", *flags])
        assert capsys.readouterr().out.endswith(f"| etw | –, –, –, {lost}.00 |\n")


# ---- The files


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_utility_lost_can_be_counted_over_the_utility_sets_that_the_model_was_taught(tmp_path):
    parts = "probability", "rouge", "truth_ratio"
    taught, chance = ({f"{name} {part}": value for part in parts}
                      for name, value in (("retain", 0.8), ("facts", 0.1)))
    worse = record(1, lost=99) | chance | {key: 0.6 for key in taught}
    write(tmp_path / "sweep.jsonl", [{"method": "target"} | taught | chance, worse])
    assert compare.read(tmp_path / "sweep.jsonl")[1]["utility lost"] == 99
    lost = compare.read(tmp_path / "sweep.jsonl", ["retain"])[1]["utility lost"]
    assert lost == pytest.approx(20)


def test_a_line_torn_by_a_kill_is_skipped_and_what_follows_is_on_lines_of_its_own(tmp_path):
    path = tmp_path / "runs.jsonl"
    compare.append(path, [record(1)])
    with open(path, "a") as file:
        file.write('{"method": "et')
    assert compare.read(path) == [record(1)]
    compare.append(path, [record(2, seed=1)])
    compare.append(path, [record(3, seed=2)])
    assert [r["distance"] for r in compare.read(path)] == [1, 2, 3]


@pytest.fixture
def few(tiny, tmp_path, monkeypatch):
    """Flags of a comparison on a tiny model and four rows a set: seconds instead of hours."""
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 4)  # an untaught model does not stop by itself
    rows = [{"question": f"Where was {name} born?", "answer": f"{name} was born in {place}.",
             "paraphrased_answer": f"{place} is where {name} was born.",
             "perturbed_answer": [f"Oslo is where {name} was born."]}
            for name, place in (("Ada", "Oru"), ("Bo", "Ume"), ("Cy", "Rio"), ("Di", "Ulm"))]
    for row in rows:
        row["spans"] = [[len(row["answer"]) - 4, len(row["answer"]) - 1]]
    flags = ["--model", str(tiny), "--reference", str(tiny), "--epochs", "2", "--lr", "1e-3",
             "--strengths", "0.1", "--methods", "etw", "npo", "spans", "--batch-size", "2",
             "--threads", "1", "--rows", "2"]
    for name in ("forget", "retain", "facts", "holdout"):
        write(tmp_path / f"{name}.jsonl", rows)
        flags += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    flags += ["--retain-measured", str(tmp_path / "facts.jsonl"), "--over", "retain"]
    for name in ("sweep", "repeats", "plot"):
        flags += [f"--{name}", str(tmp_path / name)]
    return flags


def test_a_comparison_goes_on_where_it_was_killed_and_ends_in_tables_and_a_picture(
        few, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    compare.main(["sweep", *few])
    whole = sweep.read_text().splitlines(keepends=True)
    assert [json.loads(line)["method"] for line in whole] == [
        "target", "retrained", "etw", "npo", "spans"]
    assert json.loads(whole[1])["distance"] == 0
    assert all(json.loads(line)[key] is not None for line in whole[2:] for key in compare.COLUMNS)
    # A weighting that compares with the starting model tells nothing apart on that model alone.
    aucs = [json.loads(line)["AUC"]["tnpo"] for line in whole]
    assert aucs[0] == 0.5 and all(auc != 0.5 for auc in aucs[2:])

    sweep.write_text("".join(whole[:3]) + whole[3][:50])  # killed while it wrote the second run
    compare.main(["sweep", *few])
    again = compare.read(sweep)
    assert again == [json.loads(line) for line in whole]  # to the last digit: nothing is random

    compare.main(["repeat", *few, "--seeds", "1"])
    repeats = compare.read(tmp_path / "repeats")
    assert [(r["method"], r.get("seed")) for r in repeats[2:]] == [
        ("etw", 1), ("npo", 1), ("spans", 1)]
    before = sweep.read_bytes()
    compare.main(["sweep", *few, "--seeds", "1", "2", "--methods", "npo", "spans"])
    repeats = compare.read(tmp_path / "repeats")  # seed 1 was there
    assert [(r["method"], r["seed"]) for r in repeats[5:]] == [("npo", 2), ("spans", 2)]
    assert sweep.read_bytes() == before
    capsys.readouterr()
    compare.main(["tables", *few])
    compare.main(["grid", *few])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("| ")] == [
        "method", "target", "retrained", "etw", "npo", "spans", "method", "etw", "npo", "spans",
        "method", "etw", "npo", "spans"]
    compare.main(["details", *few])
    printed = capsys.readouterr().out
    assert "| on spans | " in printed and "\nWhere was Ada born?\n    target " in printed
    for _ in range(2):  # its own picture may be replaced, nothing else
        compare.main(["plot", *few])
        ElementTree.parse(tmp_path / "plot")
    for theirs in ("dear", '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"></svg>'):
        (tmp_path / "plot").write_text(theirs)
        with pytest.raises(cli.InputError, match="--plot"):
            compare.main(["plot", *few])
        assert (tmp_path / "plot").read_text() == theirs
    with pytest.raises(cli.InputError, match="holds no run"):
        compare.main(["tables", "--sweep", str(tmp_path / "none")])


@pytest.fixture
def unlike(few, tiny, tmp_path):
    """`few` with another reference and with files that differ: (flags, {name: questions})."""
    pretrained.save(pretrained.fresh(tiny, seed=1), tmp_path / "retrained")
    questions = {}
    for name in ("forget", "retain", "facts", "holdout", "retain_measured"):
        rows = [json.loads(line) for line in (tmp_path / "forget.jsonl").read_text().splitlines()]
        rows = [row | {"question": f"{name}: {row['question'].split(': ')[-1]}"} for row in rows]
        questions[name] = [row["question"] for row in rows]
        write(tmp_path / f"{name}-unlike.jsonl", rows)
    flags = [*few, "--reference", str(tmp_path / "retrained"),
             "--retain-measured", str(tmp_path / "retain_measured-unlike.jsonl")]
    for name in ("forget", "retain", "facts", "holdout"):
        flags += [f"--{name}", str(tmp_path / f"{name}-unlike.jsonl")]
    return flags, questions


def test_each_file_of_a_comparison_is_what_its_flag_says(unlike):
    flags, questions = unlike
    taught, measured, options = compare.read_sets(compare.parse_args(["sweep", *flags]))

    def asked(sets):
        return {name: [row.question for row in rows] for name, rows in sets.items()}

    assert asked(taught) == {name: questions[name] for name in ("forget", "retain")}
    assert asked(measured) == {
        "forget": questions["forget"], "retain": questions["retain_measured"][::2],
        "facts-unlike": questions["facts"][::2], "holdout": questions["holdout"]}
    assert options == ["facts-unlike"]


def test_a_comparison_is_held_against_the_reference_and_takes_every_options_file(unlike):
    flags, _ = unlike
    experiment = compare.Experiment(compare.parse_args(["sweep", *flags]), [])
    target, retrained = experiment.yardsticks()
    assert retrained["distance"] == 0 < target["distance"]
    assert target["said"] == experiment.target["said"]
    name = "facts-unlike"
    plain = measure.World({name: experiment.measured.sets[name]}, experiment.measured.tokenizer,
                          experiment.measured.max_length, options=[name])
    own = plain.score(experiment.retrained, name, text=False).probability
    assert retrained[f"{name} probability"] == pytest.approx(np.mean(own))


def test_seed_and_layers_of_a_comparison_reach_its_runs(few, tmp_path):
    few = [*few, "--methods", "etw"]
    for more in [["--seeds", "1", "2"], ["--seeds", "1", "--layers", "0.5"]]:
        compare.main(["sweep", *few, *more])
    numbers = [r["forget NLL"] for r in compare.read(tmp_path / "repeats")[2:]]
    assert len(set(numbers)) == 3


def test_a_temperature_and_betas_reach_the_weights_and_the_strength(few, tmp_path):
    compare.main(["sweep", *few, "--methods", "etw", "keep", "wga"])
    compare.main(["sweep", *few, "--methods", "etw", "keep", "--temperature", "4"])
    compare.main(["sweep", *few, "--methods", "wga", "--beta", "2"])
    _, _, etw, keep, wga, warm_etw, warm_keep, squared = compare.read(tmp_path / "sweep")
    assert etw["beta"] is etw["temperature"] is None
    assert warm_etw["temperature"] == 4 and squared["beta"] == [2]
    for usual, other in (etw, warm_etw), (keep, warm_keep), (wga, squared):
        assert usual["method"] == other["method"]
        assert usual["forget informative NLL"] != other["forget informative NLL"]
    assert squared["lambda"] > wga["lambda"]  # p² < p: for the same strength
    compare.main(["repeat", *few, "--methods", "etw", "--temperature", "4", "--seeds", "1"])
    *_, again = compare.read(tmp_path / "repeats")
    assert again["temperature"] == 4 and again["seed"] == 1


def test_the_mean_weight_that_a_grid_is_laid_over_is_that_of_the_push(monkeypatch):
    monkeypatch.setitem(compare.etw.WEIGHTINGS, "mine",
                        lambda tokens, high=4.0: torch.where(tokens.logprobs < -1, high, -9.0))
    sequence = data.Sequence([1, 2, 3, 4, 5], 1, None, True, 0)
    scores = measure.Scores([sequence], [np.array([[-2.0, -0.5, -0.1, -3], [0.0] * 4, [1] * 4])])
    assert compare.mean_weight("mine", scores) == 2
    assert compare.mean_weight("mine", scores, (6.0,)) == 3


# ---- Pictures, labels, benchmark


def test_a_picture_shows_every_run_on_logarithmic_axes_and_leaves_out_what_has_no_number():
    groups = {"etw": [(1, 2), (2, 4), (None, 3)], "<b>": [(4, 8)], "none": [(None, None)]}
    svg = scatter.svg_scatter(groups, {"goal": (1, 1), "other": (2, 0)}, "x", "y")
    root = ElementTree.fromstring(svg)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    x = [float(c.get("cx")) for c in circles]
    assert len(x) == 3 and x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # 1 to 2, 2 to 4
    assert [c.get("fill") for c in circles].count("none") == 2  # seed 0 of each method
    texts = {e.text for e in root.iter() if e.tag.endswith("text")}
    assert {"etw", "<b>", "goal", "other", "x", "y"} <= texts and "none" not in texts


def test_a_word_of_a_tofu_answer_is_informative_where_only_the_wrong_answers_drop_it():
    cities = "Oslo", "Lima", "Bern", "Pune", "Kyiv"
    row = {"answer": "Ada was born in Tarnow.",
           "paraphrased_answer": "Tarnow is where Ada was born.",
           "perturbed_answer": [f"{city} is where Ada was born." for city in cities]}
    assert [row["answer"][a:b] for a, b in tofu.informative(row)] == ["Tarnow"]


def test_a_small_tofu_world_takes_each_authors_shortest_rows_and_keeps_the_sets_apart(tmp_path):
    wrong = {"paraphrased_answer": "p", "perturbed_answer": ["w"] * 5}

    def rows(name, authors):
        return [{"question": f"{name} {author} {i:02}?", "answer": "x" * (i * 13 % 20 + 1)}
                for author in range(authors) for i in range(20)]

    retain, forget10 = rows("kept", 3), [row | wrong for row in rows("gone", 20)]
    for name, content in (("retain90", retain), ("forget10", forget10),
                          ("forget05", forget10[200:]),
                          ("retain_perturbed", [row | wrong for row in retain[::2]])):
        write(tmp_path / f"{name}.jsonl", content)
    options = ["--forget", "forget05", "--authors", "2", "--rows", "3", "4"]
    tofu.main([str(tmp_path), str(tmp_path / "out"), *options])
    made = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (tmp_path / "out").glob("*.jsonl")}
    assert {name: len(content) for name, content in made.items()} == {
        "forget": 30, "holdout": 30, "retain": 8, "retain_measured": 4}
    lengths = [len(row["answer"]) for row in made["retain"]]
    assert lengths == [1, 4, 3, 2] * 2  # rows 0, 11, 14 and 17: in TOFU's order
    questions = {name: {row["question"] for row in content} for name, content in made.items()}
    assert not questions["forget"] & questions["holdout"]
    assert questions["retain_measured"] < questions["retain"]
    assert (tmp_path / "out/start/tokenizer.json").exists()
    before = (tmp_path / "out/retain.jsonl").read_bytes()
    with pytest.raises(cli.InputError):  # what stands there may be the user's
        tofu.main([str(tmp_path), str(tmp_path / "out")])
    assert (tmp_path / "out/retain.jsonl").read_bytes() == before


def test_another_file_than_the_one_whose_checksum_is_known_is_refused():
    with pytest.raises(cli.Stopped, match="SHA-256"):
        smollm2.check("wheel", b"other", smollm2.WHEEL_SHA256)


@pytest.mark.parametrize("program, flags, wrong", [
    (bench, ["--shape", "huge"], "--shape"),
    (compare, ["tables", "--method", "etw"], "--method"),
    (compare, ["runs", "--sweep", "absent.jsonl"], "absent.jsonl"),
    (smollm2, [], "OUT"),
    (tofu, ["absent", "OUT"], "absent/forget10.jsonl"),
    (tofu, ["absent", "OUT", "--rows", "6"], "--rows")])
def test_a_wrong_command_of_an_experiment_is_one_line_that_names_it_and_nothing_is_written(
        program, flags, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.guarded("program", program.main, flags) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and wrong in err
    assert not any(tmp_path.iterdir())


def test_the_pretrained_experiment_names_a_missing_package_before_it_downloads(
        tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "NEEDED", ("json", "no_such_package"))
    monkeypatch.setattr(smollm2, "fetch", lambda folder: pytest.fail("downloads"))
    with pytest.raises(cli.InputError, match="pip install no_such_package$"):
        smollm2.main([str(tmp_path / "out")])


def test_both_sides_of_the_benchmark_take_a_step_on_the_same_rows(tiny, transformers):
    rows = bench.make_rows(2, vocab_size=300)
    for side in (bench.Ours, bench.Plain):
        user = side(tiny, "cpu", torch.float32)
        network = user.model if side is bench.Plain else user.decoder
        before = [p.clone() for p in network.parameters()]
        user.step(rows)
        assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert bench.useful_flops(json.loads((tiny / "config.json").read_text()), rows) > 0


# ---- What the READMEs say


@pytest.mark.parametrize("command", TABLES.values(), ids=TABLES)
def test_every_comparison_table_stands_whole_as_the_committed_runs_give_it(
        command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    compare.main(command)
    tables = re.findall(r"(?:^\|.*\n)+", capsys.readouterr().out, re.MULTILINE)
    assert sum(table.count("\n") for table in tables) >= 8
    document = (ROOT / "results/README.md").read_text("utf-8")
    for table in tables:
        assert f"\n\n{table}\n" in document, table


def test_each_run_on_a_pretrained_model_has_its_command_and_each_command_its_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "results/README.md").read_text("utf-8").split("\n## ")
    section, = (part for part in page if part.startswith("TOFU on a pretrained model"))
    world = re.search('WORLD="(.+)"', section)[1]
    asked = {}
    monkeypatch.setattr(compare, "do_runs", lambda args, wanted, path: asked.setdefault(
        path, set()).update(wanted))
    for line in re.findall("^    python results/compare.py ((?:sweep|repeat) .+)$", section, re.M):
        compare.main(line.replace("$WORLD", world).split())
    kept = {path: {compare.key_of(r)[:-1] for r in compare.read(path) if "seed" in r}
            for path in asked}
    assert sorted(asked) == ["results/smollm2-seeds.jsonl", "results/smollm2-sweep.jsonl"]
    assert asked == kept


def test_the_verdict_in_the_readme_is_that_of_the_committed_runs():
    sweep = compare.read(ROOT / "results/smollm2-sweep.jsonl", SMOLLM2[-2:])
    page = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \*?(\w+)(?:, T ([\d.]+))?\*? \| ([\d.]+) \| (.+) \|$", page,
                      re.MULTILINE)
    assert len(rows) >= 5
    for method, temperature, strength, cells in rows:
        other = float(temperature) if temperature else None
        pick, = (r for r in sweep if (r["method"], r.get("temperature"), r.get("beta"), r.get("lr"))
                 == (method, other, None, 2e-4) and f"{r['lambda']:.2g}" == strength)
        assert other or pick is compare.chosen(sweep, method), method
        keys = ("forget informative NLL", "forget other NLL", "talk", "endless", "-log10 FQ",
                "utility lost")
        digits = 1, 1, 1, 2, 1, 1
        shown = [f"{pick[key]:.{n}f}" for key, n in zip(keys, digits, strict=True)]
        assert cells.split(" | ") == shown, method
