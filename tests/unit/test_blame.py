"""Who is accused, from what ranks said: the one that is gone or failed, or nobody."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from noflush.failure.blame import Verdict, Words, judge


def name(rank):
    return f"stage {rank} (rank {rank})"


def verdict(own, said=(), world=4, store="answers", keeper=0):
    return judge(own, {words.rank: words for words in said}, world, store, keeper, name)


def closed(rank, lost, **more):
    return Words(rank, lost=lost, **more)


def silent(rank, lost, seconds=30.0):
    return Words(rank, lost=lost, how="silent", seconds=seconds)


def test_words_survive_the_store():
    words = Words(3, "OSError: full", None, "silent", 1.5, True)
    assert Words.loads(words.dumps().encode()) == words


def test_a_neighbour_whose_connection_closed_is_gone():
    found = verdict(closed(1, 2))
    assert (found.accused, found.sure) == (2, True)
    assert found.sentence == "stage 2 (rank 2) is gone: its connection to stage 1 (rank 1) was closed"


@pytest.mark.parametrize("victim", range(6))
def test_whoever_notices_late_follows_the_words_to_the_one_that_is_gone(victim):
    """A chain of six: each stage loses the neighbour on the victim's side, which ended before it and left words."""
    said = []
    for distance in range(1, 6):
        for rank in (victim - distance, victim + distance):
            if 0 <= rank < 6:
                own = closed(rank, rank + 1 if rank < victim else rank - 1)
                assert verdict(own, said, 6).accused == victim
                said.append(own)


def test_a_fault_of_its_own_is_told_with_its_reason():
    found = verdict(closed(0, 1), [closed(1, 2), Words(2, fault="OSError: No space left on device")])
    assert (found.accused, found.sentence) == (2, "stage 2 (rank 2) failed: OSError: No space left on device")
    mine = verdict(Words(3, fault="ValueError: x"), [closed(2, 3)])
    assert (mine.accused, mine.sure) == (3, True)


def test_silence_is_no_end_and_others_may_still_speak():
    found = verdict(silent(1, 2))
    assert (found.accused, found.sure) == (2, False)
    assert found.sentence == "stage 2 (rank 2) has been silent for 30 s: stopped, stuck or cut off"
    assert verdict(silent(0, 1), [silent(1, 2), silent(3, 2)]).accused == 2


def test_one_that_others_gave_up_on_accuses_itself():
    found = verdict(closed(2, 1), [silent(1, 2, 7)])
    assert found.accused == 2
    assert found.sentence == "stage 2 (rank 2) was silent for 7 s, and stage 1 (rank 1) gave up on it"


def test_two_that_do_not_hear_each_other_accuse_the_network():
    found = verdict(silent(0, 1), [silent(1, 2), silent(2, 1)])
    assert found.accused is None
    assert "stage 2 (rank 2) and stage 1 (rank 1) heard nothing from each other" in found.sentence


# ---- the store's keeper is the one that is gone, stopped, or has left ---------------------------------------


def test_the_keepers_own_neighbour_accuses_it():
    assert verdict(closed(1, 0), store="refuses").accused == 0
    assert "is gone" in verdict(closed(1, 0), store="silent").sentence


def test_without_the_store_nobody_accuses_a_neighbour_that_may_have_ended_for_the_keepers_sake():
    """Stage 1 ended because rank 0 died, or rank 0 has left because stage 1 died: stage 2 cannot know."""
    found = verdict(closed(2, 1), store="refuses")
    assert found.accused is None
    assert "stage 1 (rank 1) has ended, and the store that stage 0 (rank 0) keeps cannot be reached" in found.sentence
    assert verdict(closed(2, 1, seconds=90, absent=True), store="refuses").accused is None
    assert verdict(closed(2, 1), store="refuses", keeper=None).accused is None
    assert verdict(closed(1, 0, seconds=90, absent=True), store="refuses").accused is None  # it may have given up on 1


def test_a_store_that_takes_questions_and_does_not_answer_has_a_stopped_keeper():
    for own in (silent(2, 1), closed(2, 1), Words(3)):
        found = verdict(own, store="silent")
        assert found.accused == 0
        assert "is gone" not in found.sentence
        assert "silent" in found.sentence


# ---- a collective failed: nobody's connection in particular --------------------------------------------------


def test_after_a_collective_the_words_of_others_or_the_only_one_missing_tell():
    assert verdict(Words(0), [closed(1, 2)]).accused == 2
    assert verdict(Words(0), [Words(1), Words(3)]).accused == 2
    assert verdict(Words(0), world=2).accused == 1
    found = verdict(Words(0), [Words(1)])
    assert (found.accused, found.sure) == (None, False)
    assert "not heard from: stage 2 (rank 2), stage 3 (rank 3)" in found.sentence
    assert verdict(Words(0), [Words(1), Words(3)], store="refuses", keeper=2).accused is None


def test_nobody_who_left_words_about_another_is_ever_accused():
    """Whatever subset has spoken, in whatever order the collectives and channels failed."""
    victim = 2
    everyone = [closed(1, 2), closed(3, 2), closed(0, 1), Words(4), Words(5)]
    for own in everyone:
        others = [words for words in everyone if words is not own]
        for count in range(len(others) + 1):
            for said in itertools.combinations(others, count):
                # Words are left before connections close: who lost stage 1 by its end can read stage 1's.
                if own.rank == 0 and not any(words.rank == 1 for words in said):
                    continue
                if any(w.rank == 0 for w in said) and not any(w.rank == 1 for w in said) and own.rank != 1:
                    continue
                assert verdict(own, said, 6).accused in (victim, None)


def test_a_store_whose_connection_broke_is_its_keepers():
    """Not "it is not known by whom": what broke was no collective."""
    verdict = judge(Words(1, lost=0), {}, 3, "refuses", 0, "stage {}".format)
    assert verdict == Verdict(0, "stage 0 is gone: its connection to stage 1 was closed")


def test_a_time_that_is_not_known_is_not_said():
    verdict = judge(Words(0, how="silent"), {1: Words(1)}, 3, "answers", 0, "stage {}".format)
    assert verdict.sentence == "stage 2 has been silent: stopped, stuck or cut off"


def test_an_error_of_the_store_itself_is_laid_to_its_keeper():
    code = """
from torch.distributed import DistNetworkError
from noflush.failure import last_words
class Broken:
    def set(self, key, value): raise RuntimeError("connection reset")
last_words.attend(1, 3, "stage {}".format, Broken())
print(last_words.explain(DistNetworkError("sendBytes failed")).sentence)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "stage 0 is gone: its connection to stage 1 was closed", done.stderr


def test_who_answers_a_roll_call_is_not_missing():
    """Rank 3 is in a collective and has not noticed; rank 1 is gone."""
    own, said = Words(0), {2: Words(2)}
    before = judge(own, said, 4, "answers", 0, "stage {}".format)
    assert (before.accused, before.sure) == (None, False)
    after = judge(own, said, 4, "answers", 0, "stage {}".format, alive={3})
    assert after == Verdict(1, "stage 1 is gone: a connection was closed, and all others have answered")
