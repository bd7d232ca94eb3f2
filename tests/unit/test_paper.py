"""The pure parts of the bench of the paper's setting: whose turn it is, what logs say, wrong folders, the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from noflush.launch.arguments.understand import understand
from noflush.methods.table import METHODS
from tests.bench.paper_parts import folders, room, table
from tests.bench.paper_parts.agenda import Entry, Standing, best_rate, next_of
from tests.bench.paper_parts.contestants import CONTESTANTS, NAMES, chosen
from tests.bench.paper_parts.progress import at_tenths, read
from tests.bench.paper_parts.ranks import Place, own_job
from tests.bench.paper_parts.rates import read_rates
from tests.bench.paper_parts.setting import CONFIG, Setting, described, ds_config, every, main_run, trials, words

DATA = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50257")
SETTING = Setting(50_000, DATA, (("bytes of --data", "12"),))
OUT = Path("/out")
BY_NAME = {one.name: one for one in CONTESTANTS}
every_contestant = pytest.mark.parametrize("one", CONTESTANTS, ids=NAMES)

LINE = (
    " [2026-01-01 00:00:00] iteration {:8d}/      40 | consumed samples: 8 | elapsed time per iteration (ms): {:.1f} | "
    "learning rate: 3E-04 | global batch size: 4 | lm loss: {:.6E} | loss scale: 1.0 | grad norm: 1.000 | number of "
    "skipped iterations: 0 | number of nan iterations: 0 | bubble: {:.1f}% | delay: 1 |"
)
EVALUATION = " validation loss at iteration {} | lm loss value: {:.6E} | lm loss PPL: 1.0E+00 |"


def standing(name="muon", slices=0, reached=0, loss=None, lr=1e-3):
    return Standing(main_run(BY_NAME[name], lr, SETTING, OUT), slices, reached, loss)


def trial(lr, loss=None, slices=0):
    return Standing(trials(BY_NAME["muon"], [lr], SETTING, OUT)[0], slices, 0, loss)


# ---- contestants and the launcher's arguments ----------------------------------------------------------------------


@every_contestant
def test_the_launcher_understands_every_contestant_as_the_papers_setting(one, tmp_path):
    run = main_run(one, one.lr, SETTING, tmp_path)
    folders.write_config(run, ds_config(run))
    settings, _ = understand([*words(SETTING, run), "--dry-run", "--exit-duration-in-mins", "20"], 8)
    assert (settings.ranks.pipeline, settings.gas, settings.batch.global_size) == (8, 1, 8)
    assert (settings.steps.iterations, settings.steps.eval_every) == (50_000, 1_000)
    assert settings.steps.exit_after_minutes == 20
    assert (settings.optimizer.lr, settings.optimizer.min_lr) == (one.lr, pytest.approx(one.lr / 10))
    assert settings.optimizer.warmup_samples == 3_000 * 8
    assert settings.deepspeed["optimizer"]["type"] == one.optimizer
    assert settings.block.schedule == ("1f1b_flush" if one.flush else "1f1b_no_flush")
    assert settings.block.weights == one.weights
    assert settings.block.clip == "stage"


def test_the_papers_own_contestant_has_the_papers_config():
    assert ds_config(main_run(BY_NAME["nadam"], 3e-4, SETTING, OUT)) == json.loads(CONFIG.read_text())


@every_contestant
def test_parameters_are_the_methods(one):
    params = ds_config(main_run(one, one.lr, SETTING, OUT))["optimizer"]["params"]
    assert params.keys() <= METHODS[one.optimizer].params.keys()


def test_a_shorter_training_and_a_trial_have_everything_shorter():
    one = BY_NAME["nadam-latest"]
    short = main_run(one, 3e-4, replace(SETTING, iterations=5_000), OUT)
    (tenth,) = trials(one, [3e-4], SETTING, OUT)
    for run in (short, tenth):
        assert run.iterations == 5_000
        assert ds_config(run)["optimizer"]["params"]["lr_discount_steps"] == 700
        given = words(SETTING, run)
        assert given[given.index("--lr-warmup-iters") + 1] == "300"
    assert (every(short), every(tenth)) == (100, 5_000)
    assert every(main_run(one, 3e-4, replace(SETTING, iterations=40), OUT)) == 4


def test_a_contestant_that_is_none():
    assert [one.name for one in chosen(["muon", "pipedream"])] == ["pipedream", "muon"]
    assert chosen([]) == CONTESTANTS
    with pytest.raises(ValueError, match="moun: no such contestant; there are adamw-flush"):
        chosen(["moun"])


# ---- learning rates ------------------------------------------------------------------------------------------------


def test_rates_as_given():
    assert read_rates(["nadam=1e-4"], ["muon=3e-3,1e-3"], NAMES) == ({"nadam": 1e-4}, {"muon": (1e-3, 3e-3)})


@pytest.mark.parametrize(
    ("given", "tuned", "says"),
    [
        (["moun=1"], [], "no contestant of this call"),
        (["muon"], [], "'' is no learning rate"),
        (["muon=0"], [], "'0' is no learning rate"),
        (["muon=nan"], [], "'nan' is no learning rate"),
        (["muon=1e-3,2e-3"], [], "give one rate"),
        ([], ["muon=1e-3"], "give two rates or more"),
        (["muon=1e-3"], ["muon=1e-3,2e-3"], "muon has its rates already"),
    ],
)
def test_rates_that_are_none(given, tuned, says):
    with pytest.raises(ValueError, match=says):
        read_rates(given, tuned, NAMES)


def test_the_best_rate():
    assert best_rate([trial(1e-3, 4.0), trial(2e-3, 3.0), trial(3e-3, math.nan)]) == 2e-3
    assert best_rate([trial(2e-3, 3.0), trial(1e-3, 3.0)]) == 1e-3
    assert best_rate([trial(1e-3, 4.0), trial(2e-3)]) is None
    with pytest.raises(ValueError, match=r"learning rates 0\.1, 0\.2: give smaller ones"):
        best_rate([trial(0.1, math.nan), trial(0.2, math.inf)])


# ---- whose turn it is ----------------------------------------------------------------------------------------------


def test_contestants_take_turns():
    done = {"pipedream": 0, "nadam": 0, "muon": 0}
    turns = []
    for _ in range(7):
        entries = [Entry((), standing(name, count, loss=3.0 if count == 3 else None)) for name, count in done.items()]
        name = next_of(entries).run.contestant.name
        turns.append(name)
        done[name] += 1
    assert turns == ["pipedream", "nadam", "muon"] * 2 + ["pipedream"]


def test_who_has_finished_or_failed_is_passed_over():
    entries = [Entry((), standing("pipedream", 1, loss=3.0)), Entry((), standing("nadam")), Entry((), standing())]
    assert next_of(entries, {OUT / "nadam"}).run.contestant.name == "muon"
    assert next_of(entries, {OUT / "nadam", OUT / "muon"}) is None


def test_trials_come_before_the_training():
    first, second = trial(1e-3, slices=2), trial(2e-3, slices=1)
    assert next_of([Entry((first, second), None)]) is second
    assert next_of([Entry((first, second), None)], {second.run.folder}) is first
    done = trial(1e-3, 3.0), trial(2e-3, 4.0)
    assert next_of([Entry(done, standing(lr=1e-3))]).run.trial is False
    assert next_of([Entry(done, standing(loss=3.0))]) is None


# ---- logs ----------------------------------------------------------------------------------------------------------


def test_what_logs_say():
    first = [LINE.format(2, 900, 5.0, 90), LINE.format(4, 10, 4.9, 50), EVALUATION.format(4, 4.9)]
    killed = [LINE.format(6, 800, 4.8, 90), LINE.format(8, 30, 4.7, 60), EVALUATION.format(8, 4.65), LINE[:90]]
    again = [LINE.format(6, 700, 4.8, 90), LINE.format(8, 20, 4.7, 70), EVALUATION.format(8, 4.75)]
    found = read(["\n".join(lines) for lines in (first, killed, again)])
    assert found.validation == {4: 4.9, 8: 4.75}
    assert (found.ms, found.bubble) == (20, 0.6)
    assert (found.iteration, found.loss) == (8, 4.7)
    assert at_tenths(found.validation, 40) == [4.9, 4.75, *[None] * 8]


def test_a_log_without_figures():
    assert read([]).ms is None
    nan = LINE.replace("{:.6E}", "NAN").replace(" bubble: {:.1f}% |", "")
    found = read(["\n".join([nan.format(2, 9), nan.format(4, 7), EVALUATION.format(4, math.nan)[:-1]])])
    assert found.ms == 7
    assert found.bubble is None
    assert math.isnan(found.loss)
    assert found.validation == {}


# ---- folders -------------------------------------------------------------------------------------------------------


def begun(tmp_path, **changes):
    setting = replace(SETTING, **changes)
    run = main_run(BY_NAME["muon"], 1e-3, setting, tmp_path)
    return run, described(setting, run, ["--deepspeed_config", "x.json", "--lr", "3e-4", "--clip-grad", "10"])


def test_a_folder_of_the_same_settings_goes_on(tmp_path):
    run, settings = begun(tmp_path)
    assert settings["--lr"] == "0.001"
    assert settings["--clip-grad"] == "10"
    folders.check(run, settings)
    folders.begin(run, settings, ds_config(run))
    folders.check(run, settings)
    assert folders.rate_in(run) == 1e-3
    assert folders.standing_of(run, 8) == Standing(run, 0, 0, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "--seed is '1337' there, and '1' here"),
        ({"iterations": 100}, "--train-iters is '50000' there, and '100' here"),
        ({"held": (("bytes of --data", "13"),)}, "bytes of --data is '12' there, and '13' here"),
        ({"size": ("--num-layers", "2")}, "--num-layers is 'not given' there, and '2' here"),
    ],
)
def test_a_folder_of_other_settings(changes, says, tmp_path):
    folders.begin(*begun(tmp_path), {})
    with pytest.raises(folders.FolderError, match=says):
        folders.check(*begun(tmp_path, **changes))


def test_a_rate_that_was_tuned_is_another_setting(tmp_path):
    run, settings = begun(tmp_path)
    folders.begin(run, settings, {})
    tuned = replace(run, tuned_over=(1e-3, 2e-3))
    with pytest.raises(folders.FolderError, match=r"tuned over is 'not given' there, and '0\.001 0\.002' here"):
        folders.check(tuned, described(SETTING, tuned, ["--deepspeed_config", "x", "--lr", "1", "--clip-grad", "10"]))


def test_a_folder_that_holds_something_else(tmp_path):
    run, settings = begun(tmp_path)
    (run.folder / "global_step4").mkdir(parents=True)
    (run.folder / "global_step4" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(folders.FolderError, match=r"holds checkpoints, but no settings\.json"):
        folders.check(run, settings)
    (run.folder / folders.SETTINGS).write_text("{")
    with pytest.raises(folders.FolderError, match="cannot be read"):
        folders.check(run, settings)
    with pytest.raises(folders.FolderError, match="latest is missing"):
        folders.standing_of(run, 8)


def test_how_far_a_folder_is(tmp_path):
    run, settings = begun(tmp_path, iterations=10)
    folders.begin(run, settings, {})
    for tag in ("global_step4", "global_step10"):
        (run.folder / tag).mkdir()
        (run.folder / tag / "mp_rank_00_model_states.pt").touch()
        (run.folder / "latest").write_text(tag)
    for number, said in ((9, EVALUATION.format(10, 9.0)), (10, EVALUATION.format(10, 3.0)), (11, "")):
        (run.folder / "logs" / folders.log_name(number, 7)).write_text(said)
    assert folders.standing_of(run, 8) == Standing(run, 11, 10, 3.0)
    folders.prune(run)
    assert sorted(path.name for path in run.folder.glob("global_step*")) == ["global_step10"]


# ---- room and ranks ------------------------------------------------------------------------------------------------


def test_where_ranks_go_and_whether_they_fit():
    assert [room.device_of("host id", rank, 8, 3) for rank in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [room.device_of("devices", rank, 8, 8) for rank in range(8)] == list(range(8))
    assert room.shortage("host id", [1e9] * 8, [80e9], "muon") is None
    assert room.shortage("devices", [10e9] * 8, [], "muon") is None
    short = room.shortage("host id", [4e9] * 8, [24e9, 16e9], "muon")
    assert short.startswith("muon: its ranks on GPU 1 need 18.4 GB at least, and there are 16.0 GB")
    assert "on this machine need 36.8 GB" in room.shortage("gloo", [4e9] * 8, [24e9], "muon")


def test_one_task_of_an_array_goes_back_into_the_queue_alone():
    assert own_job({"SLURM_JOB_ID": "7"}) == "7"
    assert own_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}) == "7_1"


def test_a_job_of_another_number_of_tasks():
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}
    assert Place(8, job).way == "srun"
    with pytest.raises(ValueError, match="this SLURM job has 8 tasks, and there are 4 stages"):
        Place(4, job)
    assert Place(8, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "DS_ACCELERATOR": "cpu"}).way == "gloo"


def test_an_own_core_and_port_for_every_rank():
    place = Place(2, {"DS_ACCELERATOR": "cpu"})
    env = place.environment(1, 1234)
    assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "1234",
    }


# ---- the table -----------------------------------------------------------------------------------------------------


def row(name, losses, ms, reached=100, **more):
    progress = read([])
    progress.validation, progress.ms, progress.bubble = losses, ms, 0.25
    return table.Row(BY_NAME[name], 1e-3, reached, progress, **more)


def test_the_table():
    flush = row("adamw-flush", {10: 6.0, 50: 5.0, 100: 4.0}, 400.0)
    ours = row("muon", {10: 5.5, 50: 4.5, 100: 4.2}, 50.0, tuned_over=(1e-3, 2e-3))
    begun = row("pipedream", {}, None, reached=0, failed="slice 1 ended")
    assert table.equal_seconds([flush, ours]) == 5.0
    assert table.equal_seconds([flush, begun]) is None
    cells = table.cells(flush, 100, 4096, 5.0)
    assert cells[2:] == ["0.001", "100", "4.0000", "54.60", "10,240", "25.0%", "5.9375"]
    assert table.cells(flush, 100, 4096, 3.0)[-1] == "none yet"
    assert table.cells(ours, 100, 4096, 5.0)[2:] == ["0.001*", "100", "4.2000", "66.69", "81,920", "25.0%", "4.2000"]
    assert table.cells(begun, 100, 4096, None)[3:] == ["0 of 100, failed", "-", "-", "-", "25.0%", "-"]
    assert table.cells(replace(ours, reached=60), 200, 4096, None)[3:5] == ["60 of 200", "4.2000 at 100"]
    assert table.along(flush, 100) == ["adamw-flush", "6.0000", "-", "-", "-", "5.0000", *["-"] * 4, "4.0000"]
    text = table.markdown([flush, ours], 100, 4096, "8 ranks", {"title": "A table", "commit": "abc"})
    assert text.startswith("# A table\n\n- commit: abc\n")
    assert "equal time: 5.0 s of training" in text
    assert (
        "learning rate of muon: best of 0.001, 0.002 (*), by a tenth of the training each; it is at their edge" in text
    )
    assert "learning rate of adamw-flush: given by --lr" in text
    assert "pipedream failed: slice 1 ended" in "\n".join(table.notes([begun], 100, None, "8 ranks"))
