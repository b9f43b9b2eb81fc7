"""The queue of long work: its order, places in it, and cancelled tasks."""

import threading
from unittest.mock import Mock

import pytest

from interpreter.app.work import Cancelled, Task, WorkQueue, explain

from .client import wait_for


class Held(Task):
    """A task that runs until the test ends or cancels it; `log` records which."""

    def __init__(self, name, log, error=None):
        self.may_end, self.name, self.log, self.error = threading.Event(), name, log, error
        super().__init__("segment", name, Held.work, lambda error: log.append(("done", name, error)))

    def work(self):
        self.log.append(("begun", self.name))
        while not self.may_end.wait(0.005):
            self.check()
        if self.error:
            raise self.error


@pytest.fixture
def queue():
    queue = WorkQueue("test")
    yield queue
    queue.close(10)


def filled(queue, names="abc", errors=None):
    log = []
    tasks = [Held(name, log, (errors or {}).get(name)) for name in names]
    for task in tasks:
        queue.add(task)
    wait_for(lambda: log == [("begun", names[0])])
    return tasks, log


def test_tasks_are_done_in_order(queue):
    (a, b, c), log = filled(queue)
    assert [(t.running, queue.ahead(t)) for t in (a, b, c)] == [(True, 0), (False, 1), (False, 2)]
    for task in (c, b, a):  # the order in which they could end does not matter
        task.may_end.set()
    assert all(task.ended.wait(10) for task in (a, b, c))
    assert log == [(what, name, *error) for name in "abc" for what, error in (("begun", []), ("done", [None]))]
    assert [queue.ahead(t) for t in (a, b, c)] == [0, 0, 0]


def test_waiting_task_is_taken_out(queue):
    (a, b, c), log = filled(queue)
    queue.cancel(b)
    assert b.ended.is_set()
    assert queue.ahead(c) == 1
    c.may_end.set()
    a.may_end.set()
    assert c.ended.wait(10)
    assert log == [("begun", "a"), ("done", "a", None), ("begun", "c"), ("done", "c", None)]
    queue.cancel(c)  # nothing is left to stop
    assert len(log) == 4


def test_running_task_stops_at_its_next_check(queue):
    (a, b, _), log = filled(queue)
    queue.cancel(a)
    assert a.ended.wait(10)
    wait_for(lambda: b.running)
    assert a.cancelled
    assert log == [("begun", "a"), ("begun", "b")]


def test_task_cancelled_at_its_end_is_not_reported(queue):
    log = []

    def run(task):
        task.cancel()  # after its last check

    task = Task("segment", "x", run, log.append)
    queue.add(task)
    assert task.ended.wait(10)
    assert log == []


def test_error_of_a_task_does_not_stop_the_next(queue):
    errors = {"a": ValueError("no"), "b": RuntimeError("broken")}
    tasks, log = filled(queue, errors=errors)
    for task in tasks:
        task.may_end.set()
        assert task.ended.wait(10)
    done = {name: error for what, name, *rest in log if what == "done" for error in rest}
    assert done == {"a": errors["a"], "b": errors["b"], "c": None}


def test_closed_queue_stops_everything():
    queue = WorkQueue("test")
    (a, b, c), log = filled(queue)
    queue.close(10)
    assert a.ended.is_set()
    assert all(task.cancelled for task in (a, b, c))
    assert log == [("begun", "a")]
    assert not queue._thread.is_alive()


def test_closing_waits_no_longer_than_told():
    queue, release = WorkQueue("test"), threading.Event()
    task = Task("segment", "deaf", lambda task: release.wait(30), lambda error: None)
    queue.add(task)
    wait_for(lambda: task.running)
    queue.close(0.05)
    assert not task.ended.is_set()
    release.set()
    assert task.ended.wait(10)


def test_steps_count_their_parts():
    task = Task("segment", "x", lambda task: None, lambda error: None)
    assert (task.step, task.finished, task.total) == ("", 0, 0)
    task.begin("encoding frames", 7)
    task.advance()
    task.advance(3)
    assert (task.step, task.finished, task.total) == ("encoding frames", 4, 7)
    task.begin("grouping")
    assert (task.step, task.finished, task.total) == ("grouping", 0, 0)
    task.cancel()
    for call in (task.check, task.advance, lambda: task.begin("more")):
        with pytest.raises(Cancelled):
            call()


def test_only_unexpected_errors_have_a_traceback(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    assert explain(ValueError("too long")) == "too long"
    assert explain(FileNotFoundError("no such run")) == "no such run"
    assert "memory" in explain(OutOfMemoryError("CUDA: 3 GiB"))
    assert capsys.readouterr().err == ""
    assert explain(KeyError("x")).startswith("an error inside the program, KeyError: 'x'")
    assert "KeyError: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), RuntimeError("at the end")])
def test_worker_survives_every_error(queue, monkeypatch, error):
    """Even if its traceback cannot be printed."""
    monkeypatch.setattr("traceback.print_exception", Mock(side_effect=OSError("broken pipe")))
    told = []

    def fail(task):
        raise error

    bad = Task("segment", "bad", fail, lambda problem: told.append(explain(problem)))
    good = Task("segment", "good", lambda task: None, lambda problem: told.append(problem))
    queue.add(bad)
    queue.add(good)
    assert good.ended.wait(10)
    assert told[1:] == [None]
    assert "an error inside the program" in told[0]
