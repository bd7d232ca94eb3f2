"""Links around a stage that has died: which messages go by which line, and what is sent again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from noflush.failure.last_words import PeerError
from noflush.order.detours import Offer, ranked, replaceable, scale_with_guests
from noflush.replicas import door as doors
from noflush.replicas.door import Door, PeerLine, Refused, knock
from noflush.stage.detour import DetourControlOut, DetourInbox, DetourOutbox
from noflush.stage.link import ACTIVATION, CONTROL, GRADIENT, LinkAbove, LinkBelow, NoStandIn
from noflush.stage.messages import TensorSpec
from noflush.stage.peer import Attention, Peer, PeerGone

CPU = torch.device("cpu")


def peer(timeout_s=5.0):
    return Peer(None, 1, 1, 0, 0, timeout_s, Attention(timeout_s), replaceable=True)


class Recording:
    """A line that keeps what was sent."""

    def __init__(self):
        self.sent, self.closed, self.ended = [], False, False

    def send(self, kind, number, tensors=(), words=()):
        self.sent.append((kind, number, [t.tolist() for t in tensors] or list(words)))

    def close(self):
        self.ended = True


def value(x):
    return torch.tensor([float(x)])


def test_the_fastest_is_asked_first_and_newcomers_last():
    offers = [Offer("new", (), None), Offer("slow", (), 1.0), Offer("b", (), 3.0), Offer("a", (), 3.0)]
    assert [offer.key for offer in ranked(offers)] == ["a", "b", "slow", "new"]
    assert [offer.key for offer in ranked(offers, {"a", "slow"})] == ["b", "new"]


def test_neither_the_first_stage_nor_one_with_a_tied_weight_is_replaced():
    assert replaceable(4) == (1, 2, 3)
    assert replaceable(4, [(0, 3)]) == (1, 2)
    assert replaceable(4, [(0, 3), (1, 2)]) == ()
    assert replaceable(1) == ()


def test_an_update_is_the_mean_over_own_micro_batches_and_guests():
    own, guests = torch.tensor([1.0, 3.0]), torch.tensor([5.0])
    summed = (own / 2).sum() + (guests / 2).sum()
    assert summed / scale_with_guests(2, 1) == torch.cat([own, guests]).mean()


def below(timeout_s=5.0):
    link = LinkBelow(peer(timeout_s), direct=False)
    inbox = DetourInbox(peer(), GRADIENT, CPU, link)
    outbox = DetourOutbox(peer(), ACTIVATION, CPU, link)
    return link, inbox, outbox


def test_what_has_no_gradient_yet_goes_to_who_stands_in():
    link, inbox, outbox = below()
    line = Recording()

    def find(first, refused):
        assert first == 1
        assert not refused
        return "b", line

    link.find = find
    for number in range(3):
        outbox.send(number, [value(number)])
        inbox.post([TensorSpec((1,), torch.float32, False)])
    link.took(GRADIENT, 0)
    outbox.retire(0)
    threading.Timer(0.2, lambda: link.bring(GRADIENT, 1, [value(7)], [])).start()
    assert inbox.take(1) == [value(7)]
    assert line.sent == [(ACTIVATION, 1, [[1.0]]), (ACTIVATION, 2, [[2.0]])]
    outbox.send(3, [value(3)])
    assert line.sent[-1] == (ACTIVATION, 3, [[3.0]])


def test_who_fails_is_not_asked_again_until_another_has_helped():
    link, inbox, outbox = below()
    asked, lines = [], {"b": Recording(), "c": Recording()}

    def find(first, refused):
        asked.append((first, sorted(refused)))
        name = next(name for name in ("b", "c") if name not in refused)
        lines[name].closed = name == "b"
        return name, lines[name]

    link.find = find
    outbox.send(0, [value(0)])
    inbox.post([TensorSpec((1,), torch.float32, False)])
    threading.Timer(0.2, lambda: link.bring(GRADIENT, 0, [value(1)], [])).start()
    assert inbox.take(0) == [value(1)]
    assert asked == [(0, []), (0, ["b"])]
    assert lines["b"].ended
    assert lines["c"].sent == [(ACTIVATION, 0, [[0.0]])]


def test_nobody_to_stand_in_is_the_error_of_the_stage_that_died():
    link, inbox, *_ = below()
    link.gone = PeerGone("", lambda: PeerError("stage 1 (rank 1) is gone"))

    def find(first, refused):
        raise NoStandIn("b: it has not begun to train")

    link.find = find
    inbox.post([TensorSpec((1,), torch.float32, False)])
    with pytest.raises(PeerError, match=r"stage 1 \(rank 1\) is gone.*it has not begun to train"):
        inbox.take(0)


def test_each_message_goes_by_the_newest_line_that_begins_before_it():
    link, inbox, outbox = below()
    stand_in, back = Recording(), Recording()
    link.find = lambda first, refused: ("b", stand_in)
    outbox.send(0, [value(0)])
    for _ in range(4):
        inbox.post([TensorSpec((1,), torch.float32, False)])
    threading.Timer(0.2, lambda: link.bring(GRADIENT, 0, [value(0)], [])).start()
    inbox.take(0)
    outbox.send(1, [value(1)])
    link.add_line(2, back)
    outbox.send(2, [value(2)])
    assert [number for _, number, _ in stand_in.sent] == [0, 1]
    assert [number for _, number, _ in back.sent] == [2]
    assert not stand_in.ended
    for number in (1, 2):
        link.bring(GRADIENT, number, [value(number)], [])
    inbox.take(1)
    assert stand_in.ended  # it has had its last
    inbox.take(2)
    assert not back.ended


def test_gradients_go_again_from_where_who_stands_in_begins():
    link = LinkAbove(peer(), direct=False)
    inbox, outbox = DetourInbox(peer(), ACTIVATION, CPU, link), DetourOutbox(peer(), GRADIENT, CPU, link)
    for number in range(5):
        link.took(ACTIVATION, number)
        outbox.send(number, [value(number)])
    outbox.retire(1)
    line = Recording()
    assert link.accept(3, line) == 5
    assert line.sent == [(GRADIENT, 3, [[3.0]]), (GRADIENT, 4, [[4.0]])]
    for _ in range(6):
        inbox.post([TensorSpec((1,), torch.float32, False)])
    link.bring(ACTIVATION, 4, [value(-1)], [])  # had already
    link.bring(ACTIVATION, 5, [value(5)], [])
    link.bring(ACTIVATION, 5, [value(-1)], [])
    assert inbox.take(5) == [value(5)]


def test_a_stage_that_waits_ends_soon_if_nobody_can_find_a_stand_in_any_more():
    link = LinkAbove(peer(timeout_s=60.0), direct=False)
    link.is_found = lambda: False
    inbox = DetourInbox(peer(), ACTIVATION, CPU, link)
    inbox.post([TensorSpec((1,), torch.float32, False)])
    begun = time.monotonic()
    with pytest.raises(PeerError, match="stage 0, which is to find somebody, has gone too"):
        inbox.take(0)
    assert time.monotonic() - begun < 10


def test_what_torch_carries_as_bytes_comes_back_as_it_was():
    link = LinkAbove(peer(), direct=False)
    inbox = DetourInbox(peer(), ACTIVATION, CPU, link)
    sent = torch.tensor([[True, False], [False, True]])
    outbox = DetourOutbox(peer(), GRADIENT, CPU, link)
    kept = Recording()
    kept.send = lambda kind, number, tensors=(), words=(): link.bring(ACTIVATION, number, tensors, words)
    inbox.post([TensorSpec((2, 2), torch.bool, False)])
    link.add_line(0, kept)
    outbox.send(0, [sent])
    assert torch.equal(inbox.take(0)[0], sent)


# ---- doors and lines ----------------------------------------------------------------------------------------


def test_a_question_has_an_answer_and_then_the_line_carries_messages_both_ways():
    got, door = [], Door("127.0.0.1")
    held = []

    def answer(question, line):
        line.use(lambda kind, number, tensors, words: line.send(kind, number + 1, tensors, words))
        held.append(line)
        line.send("first", 0)  # not before the answer
        return {"x": value(2)}, {"asked": question["what"]}

    door.answers["hello"] = answer
    line, (tensors, plain) = knock(door.address, {"kind": "hello", "what": 5}, 5)
    assert plain == {"asked": 5}
    assert tensors["x"] == value(2)
    come = threading.Event()

    def received(*message):
        got.append(message)
        if len(got) == 2:
            come.set()

    line.use(received)
    line.begin()
    line.send("word", 1, [torch.ones(2), torch.zeros(3)], [4, 5])
    assert come.wait(10)
    assert got[0][:2] == ("first", 0)
    kind, number, tensors, words = got[1]
    assert (kind, number, words) == ("word", 2, [4, 5])
    assert [t.tolist() for t in tensors] == [[1.0, 1.0], [0.0, 0.0, 0.0]]
    line.close()
    ended_by = time.monotonic() + 10
    while not (line.closed and held[0].closed):
        assert time.monotonic() < ended_by
        time.sleep(0.02)
    door.close()


def test_tensors_of_one_storage_can_go_together():
    door, got, come = Door("127.0.0.1"), [], threading.Event()

    def answer(question, line):
        line.use(lambda kind, number, tensors, words: (got.append(tensors), come.set()))
        return {}, {}

    door.answers["hello"] = answer
    line, _ = knock(door.address, {"kind": "hello"}, 5)
    line.use(lambda *message: None)
    line.begin()
    whole = torch.arange(4.0)
    line.send("x", 0, [whole[:2], whole[2:], whole])
    assert come.wait(10)
    assert [t.tolist() for t in got[0]] == [[0.0, 1.0], [2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
    line.close()
    door.close()


@pytest.mark.parametrize(
    ("kind", "said"), [("no", "not today"), ("unknown", "nobody here answers 'unknown'"), ("wrong", "bad value")]
)
def test_a_no_has_its_reason(kind, said):
    def no(question, line):
        raise Refused("not today")

    def wrong(question, line):
        raise ValueError("bad value")

    door = Door("127.0.0.1")
    door.answers |= {"no": no, "wrong": wrong}
    with pytest.raises(Refused, match=said):
        knock(door.address, {"kind": kind}, 5)
    door.close()


def test_what_is_no_question_harms_nobody():
    import socket

    door = Door("127.0.0.1")
    door.answers["hello"] = lambda question, line: ({}, {"well": 1})
    host, port = door.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as visitor:
        visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert knock(door.address, {"kind": "hello"}, 5)[1][1] == {"well": 1}
    door.close()


def test_where_nobody_listens_is_an_oserror():
    door = Door("127.0.0.1")
    door.close()
    with pytest.raises(OSError, match="refused"):
        knock(door.address, {"kind": "hello"}, 2)


def _listen(told):
    door = Door("127.0.0.1")

    def answer(question, line):
        line.use(lambda *message: None)
        return {}, {}

    door.answers["hello"] = answer
    told.send(door.address)
    time.sleep(600)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_line_to_a_process_that_is_gone_or_stands_still_is_closed_soon(how, monkeypatch):
    monkeypatch.setattr(doors, "SILENT_S", 2.0)
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_listen, args=(its,), daemon=True)
    process.start()
    over = threading.Event()
    line, _ = knock(mine.recv(), {"kind": "hello"}, 5)
    line.use(lambda *message: None, over.set)
    line.begin()
    try:
        assert not over.wait(2.5)  # beats keep it open
        begun = time.monotonic()
        os.kill(process.pid, how)
        assert over.wait(10)
        assert line.closed
        assert time.monotonic() - begun < (2 if how == signal.SIGKILL else 6)
    finally:
        process.kill()
        process.join()


def test_what_a_line_was_given_before_its_end_is_still_sent():
    door, got, come = Door("127.0.0.1"), [], threading.Event()

    def answer(question, line):
        line.use(lambda kind, number, tensors, words: got.append(number), come.set)
        return {}, {}

    door.answers["hello"] = answer
    line, _ = knock(door.address, {"kind": "hello"}, 5)
    line.use(lambda *message: None)
    line.begin()
    for number in range(50):
        line.send("x", number, [torch.zeros(1000)])
    line.close()
    assert come.wait(10)
    assert got == list(range(50))
    assert isinstance(line, PeerLine)
    door.close()


def test_control_goes_again_too():
    link = LinkBelow(peer(), direct=True)
    line = Recording()
    link.gone = PeerGone("", lambda: PeerError(""))
    control = DetourControlOut(peer(), link)
    control.send([1, 2], before=4)
    control.send([3], before=5)
    link.add_line(4, line)
    assert line.sent == [(CONTROL, 4, [1, 2]), (CONTROL, 5, [3])]
    control.retire(4)
    again = Recording()
    link.add_line(5, again)
    assert again.sent == [(CONTROL, 5, [3])]
    assert line.closed is False


def test_a_message_that_takes_longer_than_silence_may_is_no_silence(monkeypatch):
    """A long one on a slow link."""
    import socket
    import struct

    from noflush.replicas.transport import to_bytes

    monkeypatch.setattr(doors, "SILENT_S", 2.0)
    monkeypatch.setattr(doors, "BEAT_S", 0.2)
    mine, its = socket.socketpair()
    got, over = threading.Event(), threading.Event()
    line = PeerLine(mine)
    line.use(lambda *message: got.set(), over.set)
    line.begin()
    data = to_bytes(({"0": torch.zeros(4000)}, {"kind": "x", "number": 0, "words": []}))
    its.sendall(struct.pack("<Q", len(data)))
    for at in range(0, len(data), 1000):
        its.sendall(data[at : at + 1000])
        time.sleep(0.25)
    assert got.wait(5)
    assert not over.is_set()
    assert over.wait(10)  # and now it is silent
    its.close()


def test_a_line_that_fails_takes_no_other_with_it():
    """Who stands in fails while the stage itself is back: from there on it stays."""
    link, inbox, outbox = below()
    stand_in, back, again = Recording(), Recording(), Recording()
    lines = iter([("b", stand_in), ("c", again)])
    link.find = lambda first, refused: next(lines)
    for number in range(4):
        outbox.send(number, [value(number)])
        inbox.post([TensorSpec((1,), torch.float32, False)])
    threading.Timer(0.2, lambda: link.bring(GRADIENT, 0, [value(0)], [])).start()
    inbox.take(0)
    link.add_line(4, back)
    outbox.send(4, [value(4)])
    stand_in.closed = True
    threading.Timer(0.5, lambda: link.bring(GRADIENT, 1, [value(1)], [])).start()
    inbox.take(1)
    assert [number for _, number, _ in again.sent] == [1, 2, 3]
    assert [number for _, number, _ in back.sent] == [4]
    assert not back.ended


def test_labels_of_any_shape_arrive_as_they_were():
    from noflush.replicas.labels import KeptLabels, labels_of

    class OneStage:
        stage = 0

        class schedule:
            @staticmethod
            def in_flight(stage):
                return 2

    stage = OneStage()
    kept = KeptLabels(stage)
    door = Door("127.0.0.1")
    door.answers["labels"] = kept.answer
    every = [torch.ones(2), (torch.zeros(1), torch.ones(1).bool()), {"mask": torch.ones(2), "of": 3}, None]
    for number, labels in enumerate(every):
        stage.batch_read(number, (None, labels))
        found = labels_of(door.address, number, CPU, 5)
        assert str(found) == str(labels)
    stage.batch_read(9, (torch.ones(1),))  # a stage that reads inputs alone
    with pytest.raises(Refused, match="micro-batch 0 is not in flight"):
        labels_of(door.address, 0, CPU, 5)
    door.close()
