"""Groups of pipelines: slices, corrections, schedules, samples, and what a newcomer is given."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import ReduceOp, TCPStore

from noflush.order.averaging import due, schedule_behind, slice_of, slices_of, smoothing
from noflush.order.shared_order import SharedOrder
from noflush.replicas import process_group, transport
from noflush.replicas.correction import correction, weighted_average
from noflush.replicas.samples import GroupSamples
from noflush.replicas.total import total_in_order


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("elements", [1, 7, 100, 1001])
def test_every_number_is_averaged_once_in_a_turn(fraction, elements):
    seen = []
    for number in range(slices_of(fraction)):
        start, length = slice_of(number, elements, fraction)
        seen += range(start, start + length)
        assert length <= -(-elements // slices_of(fraction))
    assert sorted(seen) == list(range(elements))
    assert slice_of(slices_of(fraction), elements, fraction) == slice_of(0, elements, fraction)


def test_fractions_that_floats_miss_make_whole_numbers_of_slices():
    assert [slices_of(f) for f in (1.0, 0.5, 0.1, 0.05, 0.3)] == [1, 2, 10, 20, 4]


def test_a_round_starts_when_its_time_has_come():
    assert [update for update in range(40, 65) if due(update, 40, 20)] == [60, 61, 62, 63, 64]


def test_a_slow_groups_schedule_goes_to_the_mean_and_no_fast_one_back():
    others = [(30.0, 90), (10.0, 30)]
    assert schedule_behind(30, others) == 45
    assert schedule_behind(90, others) == 0
    assert schedule_behind(5, [(0.0, 0), (0.0, 0)]) == 0
    assert schedule_behind(240, [(30.0, 720), (10.0, 240)], 8) == 45  # in samples, of which an update has eight


def test_smoothing_falls_from_a_half_to_a_hundredth():
    assert smoothing(0) == 0.5
    assert smoothing(25) == pytest.approx(0.255)
    assert smoothing(50) == smoothing(10**6) == pytest.approx(0.01)


def test_the_average_is_weighted_by_samples():
    a, b = torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])
    assert weighted_average([a, b], [3.0, 1.0]).tolist() == [1.0, 3.0]
    assert weighted_average([a, b], [0.0, 0.0]) is None


def test_what_was_learnt_since_is_kept():
    sent, average, now = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.5])
    change, rate = correction("none", sent, average, now, None, 5, 0.5)
    assert (now + change).tolist() == [3.5]
    assert rate is None


def test_or_what_is_usually_learnt_in_that_time():
    sent, average, now = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])
    change, rate = correction("corrected", sent, average, now, None, 4, 0.5)
    assert rate.tolist() == [0.25]
    assert (now + change).tolist() == [4.0]
    # Next time it moves thrice as far; half of that is believed: (.25 + .75) / 2 an update, over two.
    change, rate = correction("corrected", sent, average, torch.tensor([2.5]), rate, 2, 0.5)
    assert rate.tolist() == [0.5]
    assert (torch.tensor([2.5]) + change).tolist() == [4.0]


class Store(dict):
    """A TCPStore's words."""

    def set(self, key, value):
        self[key] = value

    def delete_key(self, key):
        del self[key]


def test_the_last_stage_reads_what_the_first_one_decided():
    store, order = Store(), SharedOrder("a")
    first, last = GroupSamples(20, 4, 1, order, store), GroupSamples(20, 4, 1, None, store)
    drawn, read = iter(first), iter(last)
    mine = [next(drawn) for _ in range(24)]
    assert [next(read) for _ in range(24)] == mine
    assert sorted(mine[:20]) == list(range(20))
    assert mine[:4] != mine[20:24]  # the next epoch has an order of its own
    assert len(store) == 0


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="3 samples make no micro-batch of 4"):
        GroupSamples(3, 4, 1, SharedOrder("a"), None)


def meet(address, rank):
    group = process_group.FreshGloo("127.0.0.1", timedelta(seconds=5))
    time.sleep(0.3 * (rank == 0))  # the others are there before it
    group.configure(address, "x", rank, 3, 1, 0, 1, [0, 1, 2])
    total = torch.full((2,), float(rank + 1))
    group.allreduce([total], ReduceOp.SUM).wait()
    return total.tolist()


def test_a_quorum_of_an_old_number_meets_under_new_keys():
    """A lighthouse that was started anew counts from 1: its quorum's members find what an older one has left."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}/torchft/1/0"
    for _ in range(3):
        with ThreadPoolExecutor(3) as members:
            found = [members.submit(meet, address, rank) for rank in (2, 1, 0)]
            assert [one.result(20) for one in found] == [[6.0, 6.0]] * 3


def add_up(address, rank, world, parts):
    group = process_group.FreshGloo("127.0.0.1", timedelta(seconds=10))
    group.configure(address, "x", rank, world, 1, 0, 1, list(range(world)))
    return [total_in_order(group, part, world, timedelta(seconds=10)) for part in parts]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_groups_are_summed_in_their_order_to_the_bit(world):
    draw = torch.Generator().manual_seed(world)
    lengths = (0, 1, world - 1, world, world + 1, 1000, 70_001)
    parts = [[torch.randn(length, generator=draw) for length in lengths] for _ in range(world)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}/torchft/1/0"
    with ThreadPoolExecutor(world) as members:
        found = [members.submit(add_up, address, rank, world, parts[rank]) for rank in range(world)]
        totals = [one.result(30) for one in found]
    for number in range(len(lengths)):
        in_order = sum((parts[rank][number] for rank in range(world)), torch.zeros(()))
        assert all(torch.equal(total[number], in_order) for total in totals)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a peer's was run",))


def test_a_newcomers_state_is_tensors_and_json():
    state = {"weights.0": torch.arange(3.0), "state.0.step": torch.tensor(7)}, {"updates": 3, "groups": [{"lr": 0.1}]}
    tensors, plain = transport.from_bytes(transport.to_bytes(state))
    assert plain == state[1]
    assert all(torch.equal(tensors[name], value) for name, value in state[0].items())
    with pytest.raises(TypeError):
        transport.to_bytes(({}, {"schedule": object()}))
    with pytest.raises(Exception, match="header"):
        transport.from_bytes(pickle.dumps(Bomb()))


def test_a_newcomer_may_ask_before_it_is_served():
    giver, taker = transport.TensorTransport("127.0.0.1"), transport.TensorTransport("127.0.0.1")
    found = []
    patience = timedelta(seconds=20)
    asks = threading.Thread(target=lambda: found.append(taker.recv_checkpoint(0, giver.metadata(), 1, patience)))
    asks.start()
    giver.send_checkpoint([1], 1, {"user": {"default": ({"w": torch.ones(2)}, {"updates": 5})}}, patience)
    asks.join(20)
    giver.disallow_checkpoint()
    assert found[0]["user"]["default"][1] == {"updates": 5}
    giver.shutdown()
    taker.shutdown()
