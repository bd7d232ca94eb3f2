"""The command: a small comparison from start to end, resuming, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from noflush.__main__ import main
from noflush.compare.agenda import Plan, agenda
from noflush.compare.contestants import BASELINE, CONTESTANTS, chosen, contestant
from noflush.compare.corpus import Corpus, token_ids
from noflush.compare.ledger import Ledger
from noflush.compare.result import panel
from noflush.compare.settings import Record, Task, Trial
from noflush.compare.trial import run_trial
from noflush.methods.table import METHODS

TINY = ["--sequence", "8", "--width", "8", "--heads", "2", "--batch", "2", "--tokens", "640", "--stages", "2"]
MINE = (
    '{"name": "mine", "optimizer": {"type": "DelayAwareNAdamW", "params": {"betas": [0.95, 0.999]}}, "rates": [0.01]}'
)


def invented(trial):
    """A record whose loss is best at lr .002, .1 nats worse without the flush."""
    loss = 2 + abs(math.log2(trial.lr / 0.002)) + trial.seed / 100 + (0 if trial.contestant.synchronous else 0.1)
    tokens = trial.updates * Task().tokens_per_update
    return Record(((0, 5.0), (tokens // 2, 1 + loss), (tokens, loss)), loss, 1.0, 2.0, 8.0)


def plan_of(names, stages=(8,), updates=400):
    return Plan(tuple(chosen(names)), stages, 2, updates, updates)


def finish(plan, task, ledger):
    """Runs everything, invented; how many trials that were."""
    count = 0
    while now := agenda(plan, task, ledger.find).now:
        for trial in now:
            ledger.add(trial, invented(trial))
            count += 1
    return count


def test_a_small_comparison_gives_tables_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text"
    text.write_bytes(b"In a hole in the ground there lived a compiler. " * 6000)
    asked = ["compare", *TINY, "--methods", "sync-adamw", "--contestant", MINE, "--seeds", "2", "--text", str(text)]
    asked += ["--out", str(tmp_path / "out")]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "mine" in shown
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = {row["contestant"]["name"]: row for row in written["panels"][0]["rows"]}
    assert list(rows) == ["sync-adamw", "mine"]
    for name in rows:
        assert 0 < rows[name]["loss"]["mean"] < math.log(256) + 0.1
        assert rows[name]["curve"][0][0] == 0
        assert rows[name]["curve"][-1][0] == 640
    assert rows["sync-adamw"]["equal_time"]["tokens"] == 320
    assert "| mine |" in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    (tmp_path / "out" / "trials.jsonl").write_text("\n".join(lines) + '\n{"name": "cut sho')

    def no_worker(*_):
        raise AssertionError("a finished trial was run again")

    monkeypatch.setattr("noflush.compare.workers.Workers.start", no_worker)
    assert main(asked) == 0


def test_a_trial_cut_short_by_a_kill_runs_again_and_no_other(tmp_path):
    task, plan = Task(), plan_of(["adamw", "nadam"])
    count = finish(plan, task, Ledger(tmp_path, task))
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    assert whole.count(b"\n") == count
    path.write_bytes(whole[:-20])
    assert finish(plan, task, Ledger(tmp_path, task)) == 1
    assert finish(plan, task, Ledger(tmp_path, task)) == 0


def test_trials_of_other_settings_in_one_folder_are_kept_apart(tmp_path):
    task, plan = Task(), plan_of(["adamw"])
    count = finish(plan, task, Ledger(tmp_path, task))
    for other in (Task(width=128), Task(digest="another text"), Task(clip=0.5), Task(weight_decay=0.1)):
        assert finish(plan, other, Ledger(tmp_path, other)) == count
    assert finish(plan_of(["adamw"], stages=(4,)), task, Ledger(tmp_path, task)) == count
    assert finish(plan, task, Ledger(tmp_path, task)) == 0


def test_losses_that_are_infinite_are_kept(tmp_path):
    task = Task()
    trial = Trial(CONTESTANTS["nadam"], 8, 1, 1.0, 100, "report")
    Ledger(tmp_path, task).add(trial, Record(((0, 5.5), (70, math.inf)), math.inf, 1.0, 1.0, 1.0))
    found = Ledger(tmp_path, task).find(trial)
    assert found is not None
    assert found.loss == found.curve[1][1] == math.inf


def test_a_run_that_diverges_ends_early():
    task = Task(width=8, heads=2, sequence=8, batch=2)
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(ids, {"search": ids, "report": ids})
    record = run_trial(task, corpus, Trial(CONTESTANTS["pipedream"], 2, 1, 1e3, 40, "search"))
    assert record.loss == math.inf
    assert record.curve[-1][0] <= 20 * task.tokens_per_update
    assert record.curve[-1][1] == math.inf


def test_rows_stand_against_the_best_synchronous_ones_at_equal_tokens_and_time(tmp_path):
    task, plan = Task(), plan_of(["adamw", "nadam"])
    ledger = Ledger(tmp_path, task)
    finish(plan, task, ledger)
    found = panel(plan, task, 8, ledger.find, 30.0)
    rows = {row.contestant.name: row for row in found.rows}
    assert {row.lr for row in found.rows} == {0.002}
    assert found.seconds == pytest.approx(400 * 0.03)
    assert found.seconds_of_flush == pytest.approx(400 * 0.03 * 8)
    assert rows["pipedream"].adamw.difference.nats == pytest.approx(0.1)
    assert rows["pipedream"].adamw.tax is None
    assert rows["sync-nadam"].adamw.tax == 1.0
    # Its end is at 2.115 and the other's curve falls from 3.015 to 2.015 over the last half.
    assert rows["pipedream"].adamw.matched_at == pytest.approx(0.95)
    assert rows["sync-adamw"].equal_time.read_from == "own run"
    assert rows["sync-adamw"].equal_time.tokens == 50 * task.tokens_per_update
    assert rows["pipedream"].equal_time.read_from == "all"
    # 4 rates at a fourth and 2 at a half, of 400 updates
    assert rows["nadam"].search_tokens == 800 * task.tokens_per_update
    short = plan_of(["adamw"], updates=60)
    finish(short, task, ledger)
    assert panel(short, task, 8, ledger.find, 30.0).rows[0].equal_time.read_from == "long curve"


def test_methods_bring_their_synchronous_rows():
    assert [row.name for row in chosen(["nadam"])] == [BASELINE, "sync-nadam", "nadam"]
    assert [row.name for row in chosen(["adamw", "sync-nag", "nag"])] == [BASELINE, "pipedream", "sync-nag", "nag"]


def test_every_row_is_one_that_its_optimizer_takes():
    for name, row in CONTESTANTS.items():
        assert METHODS[row.optimizer].faults(row.params) == [], name
        assert row.synchronous or CONTESTANTS[row.twin].synchronous, name
        assert 3 <= len(row.rates) <= 6


def test_a_contestant_as_json():
    row = contestant(MINE)
    assert (row.name, row.rates, row.schedule, row.weights) == ("mine", (0.01,), "1f1b_no_flush", "stash")
    assert Task().params_of(row, 0.5) == {**METHODS["DelayAwareNAdamW"].values({}), "betas": (0.95, 0.999), "lr": 0.5,
                                          "weight_decay": 0.01}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ('{"name": "x"}', "give {"),
        ('{"name": "x", "optimizer": {"type": "Lion"}}', "'Lion': it must be one of"),
        ('{"name": "x", "optimizer": {"type": "DelayAwareNAG", "params": {"beta": 1}}}', "beta is not a parameter"),
        ('{"name": "x", "optimizer": {"type": "DelayAwareNAG", "params": {"lr": 1}}}', "lr is searched"),
        ('{"name": "x", "optimizer": {"type": "DelayAwareNAG"}, "weights": "newest"}', "weights is 'newest'"),
        ('{"name": "x", "optimizer": {"type": "DelayAwareNAG"}, "policy": "2bw"}', "policy is not a key"),
        ('{"name": "x", "optimizer": {"type": "DelayAwareNAG"}, "rates": [2, 1]}', "rates is [2, 1]"),
    ],
)
def test_json_that_is_no_contestant(text, fault):
    with pytest.raises(ValueError, match="--contestant") as caught:
        contestant(text)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--methods", "adamw,adagrad"], "--methods adagrad: no such contestant"),
        (["--stages", "0"], "--stages 0: every one must be 1 or more"),
        (["--stages", "8;32"], "give numbers separated by commas"),
        (["--tokens", "3000"], "give 20992 or more"),
        (["--seeds", "0"], "--seeds 0: it must be 1 or more"),
        (["--jobs", "0"], "--jobs 0: it must be 1 or more"),
        (["--lr-budget", "0"], "--lr-budget 0: it must be above 0"),
        (["--stage-ms", "0"], "--stage-ms 0: it must be above 0"),
        (["--depth", "6", "--stages", "4"], "--depth 6 does not divide into 4 stages"),
        (["--width", "30"], "--width 30 does not divide by --heads 4"),
        (["--batch", "0"], "--batch 0: it must be 1 or more"),
        (["--data", "ids.bin"], "--data and --vocabulary belong together"),
        (["--data", "/nowhere/ids.bin", "--vocabulary", "9"], "No such file"),
        (["--text", "/nowhere/text"], "No such file"),
        (["--contestant", MINE, "--contestant", MINE], "the name 'mine' is taken"),
        (["--contestant", MINE.replace('}, "rates"', '}, "weights": "2bw", "rates"')], "contestant 'mine' at 8 stages"),
    ],
)
def test_what_cannot_be_compared_is_one_line(options, fault, capsys, tmp_path):
    assert main(["compare", "--out", str(tmp_path), *options]) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert len(said.splitlines()) == 1


def test_a_flat_file_of_ids_is_read_by_its_vocabulary(tmp_path):
    ids = [5, 999, 70, 3]
    (tmp_path / "ids.bin").write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
    assert token_ids(str(tmp_path / "ids.bin"), 1000).long().tolist() == ids
    with pytest.raises(ValueError, match="id 999 is not in a vocabulary of 900"):
        token_ids(str(tmp_path / "ids.bin"), 900)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="check --vocabulary"):
        token_ids(str(tmp_path / "odd.bin"), 1000)
    assert token_ids(str(tmp_path / "ids.bin"), 256).dtype == torch.uint8
