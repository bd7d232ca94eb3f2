"""Groups that come, die and are slow draw every block of one order once, but for what was in flight."""

from __future__ import annotations

import json
import random

import pytest

from noflush.order.shared_order import Membership, SharedOrder, block_samples


def words_of(groups):
    """What all tell in a round, in the order of ranks; it travels as JSON."""
    return json.loads(json.dumps([group.words() for group in groups]))


def hear(groups, told):
    return [group.agree(told) for group in groups]


def draw(group, count):
    return [group.next() for _ in range(count)]


def test_one_group_alone_draws_the_order():
    assert draw(SharedOrder("a"), 5) == [0, 1, 2, 3, 4]


def test_two_take_turns_in_what_the_first_has_not_claimed():
    a, b = SharedOrder("a", ahead=2), SharedOrder("b", ahead=2)
    assert draw(a, 3) == [0, 1, 2]
    told = words_of([a, b])
    assert told[0]["claim"] == 9
    assert hear([a, b], told) == [True, True]
    assert a.membership == b.membership == Membership(1, ("a", "b"), (), 9)
    assert draw(b, 3) == [10, 12, 14]
    assert draw(a, 8) == [3, 4, 5, 6, 7, 8, 9, 11]
    assert a.drawn_twice == 0


def test_whoever_is_new_does_not_lead_whatever_its_rank():
    old, new = SharedOrder("old", ahead=0), SharedOrder("a new one", ahead=0)
    assert draw(old, 100)[-1] == 99
    told = json.loads(json.dumps([new.words(waits=True), old.words()]))
    claim = told[1]["claim"]
    hear([new, old], told)
    assert new.membership == old.membership == Membership(1, ("a new one", "old"), (), claim)
    assert new.drawn_twice == 0


def test_a_group_that_was_cut_off_counts_what_it_draws_twice():
    a, b = SharedOrder("a", ahead=0), SharedOrder("b", ahead=0)
    hear([a, b], words_of([a, b]))
    hear([a, b], words_of([a, b]))
    draw(b, 5)
    hear([a], words_of([a]))
    told = words_of([a, b])
    hear([a, b], told)
    assert b.drawn_twice == 5


def test_a_run_that_goes_on_from_a_checkpoint_draws_what_was_left():
    a, b = SharedOrder("a", ahead=0), SharedOrder("b", ahead=0)
    hear([a, b], words_of([a, b]))
    assert draw(a, 3) + draw(b, 1) == [0, 2, 4, 1]
    hear([a, b], words_of([a, b]))
    kept = json.loads(json.dumps(a.kept()))
    again = SharedOrder("a, started again")
    again.resume(kept)
    assert draw(again, 4) == [3, 5, 6, 7]


def test_a_round_that_takes_longer_than_was_claimed_is_counted():
    a, b = SharedOrder("a", ahead=2), SharedOrder("b", ahead=2)
    told = words_of([a, b])
    assert draw(a, 5) == [0, 1, 2, 3, 4]
    hear([a, b], told)
    assert draw(a, 1) + draw(b, 2) == [2, 3, 5]
    assert a.drawn_twice == 3


def test_what_a_slow_group_has_not_come_to_is_handed_out_first():
    a, b, c = (SharedOrder(key, ahead=0) for key in "abc")
    hear([a, b], words_of([a, b]))
    assert draw(a, 6) == [0, 2, 4, 6, 8, 10]
    assert draw(b, 2) == [1, 3]
    hear([a, b], words_of([a, b]))
    hear([a, b, c], words_of([a, b, c]))
    assert a.membership.freed == ((5, 12, 2),)
    assert [group.next() for group in (a, b, c)] == [5, 7, 9]
    assert [group.next() for group in (a, b, c)] == [11, 12, 13]


def test_what_the_dead_drew_after_its_last_words_is_drawn_again_and_no_more():
    a, b = SharedOrder("a", ahead=0), SharedOrder("b", ahead=0)
    hear([a, b], words_of([a, b]))
    assert draw(a, 3) + draw(b, 3) == [0, 2, 4, 1, 3, 5]
    hear([a, b], words_of([a, b]))
    draw(b, 2)  # 7, 9
    hear([a], words_of([a]))
    assert draw(a, 9)[-3:] == [12, 13, 14]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_only_the_deads_last_blocks_come_twice(seed):
    """Groups of different speeds come and die at random moments of a round."""
    chance = random.Random(seed)
    names = iter("abcdefghijklmnopqrstuvwxyz")
    groups, drawn, speeds = [], [], {}
    unheard = {}  # what each drew since its last words
    may_come_twice, may_be_lost = set(), 0

    def note(group, count):
        found = draw(group, count)
        unheard.setdefault(group.key, []).extend(found)
        drawn.extend(found)

    for _ in range(60):
        if len(groups) < 2 or (chance.random() < 0.2 and len(groups) < 5):
            groups.append(SharedOrder(next(names), ahead=4))
            speeds[groups[-1].key] = chance.randint(1, 6)
        elif chance.random() < 0.15:
            gone = groups.pop(chance.randrange(len(groups)))
            may_come_twice.update(unheard[gone.key])
            may_be_lost += 4 * 6 * 2  # what it had claimed and not come to
        told = words_of(groups)
        for group in groups:
            unheard[group.key] = []
        for group in groups:
            note(group, chance.randint(0, 4) if group.membership.term else 0)  # who is new has not begun
        hear(groups, told)
        for group in groups:
            note(group, speeds[group.key])
    twice = {block for block in drawn if drawn.count(block) > 1}
    assert all(group.drawn_twice == 0 for group in groups)
    assert twice <= may_come_twice
    end = min(group.membership.horizon for group in groups)
    for _ in range(200):
        for group in groups:
            note(group, 1)
    assert len(set(range(end)) - set(drawn)) <= may_be_lost


def test_a_group_that_was_cut_off_takes_the_others_order_over():
    a, b = SharedOrder("a", ahead=0), SharedOrder("b", ahead=0)
    hear([a, b], words_of([a, b]))
    draw(a, 2)
    draw(b, 2)
    hear([a], words_of([a]))  # b does not answer
    draw(a, 4)
    draw(b, 4)
    assert hear([a, b], words_of([a, b])) == [True, True]
    assert a.membership == b.membership
    assert a.membership.term == 3


def test_blocks_of_an_epoch_do_not_cross_its_end():
    assert block_samples(0, 4, 10) == (0, range(4))
    assert block_samples(1, 4, 10) == (0, range(4, 8))
    assert block_samples(2, 4, 10) == (1, range(4))
