"""Several tabs at once: their places in the queue, and what happens to a closed tab."""

import threading
from types import SimpleNamespace

import pytest

from interpreter.app.session import Session

from .client import wait_for


@pytest.fixture
def held(monkeypatch):
    """Segmenting lasts until `held.end` is set; `held.begun` and `held.stopped` list the tabs, by their tokens."""

    held = SimpleNamespace(begun=[], stopped=[], end=threading.Event())

    def segmented(self, task, clip, choice):
        held.begun.append(self.token)
        while not held.end.wait(0.01):
            if task.cancelled:
                held.stopped.append(self.token)
            task.check()
        raise ValueError("the end of a task that was held")

    monkeypatch.setattr(Session, "_segmented", segmented)
    yield held
    held.end.set()


def working(server, clip, held, count):
    """Open this many tabs and start segmenting in each; the first one has started."""
    tabs = [server.client.open_tab() for _ in range(count)]
    for tab in tabs:
        assert tab.upload(clip).status == 200
        assert tab.post("segment", source="cluster", settings={}).status == 202
    wait_for(lambda: held.begun == [tabs[0].token])
    return tabs


def places(tabs):
    jobs = [tab.state()["job"] for tab in tabs]
    return [job and (job["state"], job["ahead"]) for job in jobs]


def test_tabs_wait_in_order_and_know_their_place(server, clip, held):
    tabs = working(server, clip, held, 4)
    assert places(tabs) == [("running", 0), ("waiting", 1), ("waiting", 2), ("waiting", 3)]
    assert tabs[1].post("cancel").status == 200
    assert places(tabs) == [("running", 0), None, ("waiting", 1), ("waiting", 2)]
    assert tabs[0].post("cancel").status == 200
    wait_for(lambda: held.begun == [tabs[0].token, tabs[2].token])
    assert held.stopped == [tabs[0].token]
    assert places(tabs) == [None, None, ("running", 0), ("waiting", 1)]
    held.end.set()
    for tab in tabs[2:]:
        assert tab.finish()["error"]["text"] == "the end of a task that was held"
    assert held.begun == [tabs[i].token for i in (0, 2, 3)]
    assert [tab.state()["error"] for tab in tabs[:2]] == [None, None]


def test_new_task_of_a_tab_takes_the_place_of_its_old_one(server, clip, held):
    tabs = working(server, clip, held, 3)
    tabs[1].post("segment", source="run-0", settings={})
    assert places(tabs) == [("running", 0), ("waiting", 2), ("waiting", 1)]
    tabs[0].post("compare", left="run-0", right="cluster")
    wait_for(lambda: held.stopped == [tabs[0].token])
    wait_for(lambda: held.begun == [tabs[0].token, tabs[2].token])
    assert places(tabs) == [("waiting", 2), ("waiting", 1), ("running", 0)]
    assert tabs[0].state()["job"]["kind"] == "compare"


def test_page_answers_while_a_task_runs(server, clip, held):
    (tab,) = working(server, clip, held, 1)
    assert tab.get("frames/4").status == 200
    assert server.client.get("/").status == 200
    assert server.client.get("/api/runs").status == 200
    assert tab.post("edit", kind="undo").status == 404


def test_removing_the_clip_stops_its_task(server, clip, held):
    first, second = working(server, clip, held, 2)
    server.client.send("DELETE", f"/api/s/{first.token}/clip")
    wait_for(lambda: held.begun == [first.token, second.token])
    assert first.state()["job"] is None
    server.client.send("DELETE", f"/api/s/{second.token}")
    wait_for(lambda: held.stopped == [first.token, second.token])
    assert server.client.get(f"/api/s/{second.token}").status == 404
    assert server.files() == []


def test_closed_tab_stops_working_and_is_then_forgotten(serve, clip, held):
    server = serve(leave=0.0)
    tab = server.client.open_tab()
    with tab.watched() as states:
        states.follow()
        tab.upload(clip)
        tab.post("segment", source="cluster", settings={})
        wait_for(lambda: held.begun)
        for _ in range(3):
            server.sessions.tidy()
        wait_for(lambda: states.seen[-1]["job"])
        session = server.session(tab)
        assert not session.task.cancelled
    wait_for(lambda: session.connections == 0)
    wait_for(lambda: held.stopped == [tab.token])
    assert session.clip is not None
    assert len(server.files()) == 1
    server.sessions.forget = 0.0
    wait_for(lambda: not any(server.folder.iterdir()))
    assert "no longer has this page's clip" in server.client.get(f"/api/s/{tab.token}/events").error
    assert tab.get("frames/0").status == 404


def test_reloaded_tab_finds_its_clip_and_its_task(serve, clip, held):
    server = serve()
    tab = server.client.open_tab()
    session = server.session(tab)
    with tab.watched() as states:
        states.next()
        tab.upload(clip)
        tab.post("segment", source="cluster", settings={})
        wait_for(lambda: held.begun)
    wait_for(lambda: session.connections == 0)
    server.sessions.tidy()  # closed only a moment ago
    with tab.watched() as states:
        state = states.next()
        assert (state["clip"]["name"], state["job"]["state"]) == ("walk.mp4", "running")
        server.sessions.leave = server.sessions.forget = 0.0  # it was not closed at all
        for _ in range(3):
            server.sessions.tidy()
        assert server.session(tab) is session
        assert tab.get("frames/0").status == 200
        assert not session.task.cancelled


def test_second_stream_keeps_a_tab_open(serve, clip, held):
    server = serve(leave=0.0)
    tab = server.client.open_tab()
    with tab.watched() as first:
        first.next()
        tab.upload(clip)
        tab.post("segment", source="cluster", settings={})
        wait_for(lambda: held.begun)
        with tab.watched() as second:
            second.next()
        wait_for(lambda: server.session(tab).connections == 1)
        server.sessions.tidy()
        assert not server.session(tab).task.cancelled


def test_clip_more_than_the_server_keeps_is_refused(serve, clip):
    server = serve(clips=2)
    first, second, third = (server.client.open_tab() for _ in range(3))
    assert [tab.upload(clip).status for tab in (first, second, first)] == [200, 200, 200]
    line = third.upload(clip).error
    assert "keeps 2 clips" in line
    assert "--max-clips" in line
    assert third.state()["clip"] is None
    server.client.send("DELETE", f"/api/s/{first.token}")
    assert third.upload(clip).status == 200


def test_uploads_under_way_count_as_clips(serve, clip):
    server = serve(clips=1)
    first, second = server.client.open_tab(), server.client.open_tab()
    with server.sessions.place_for(server.session(first)):
        assert "keeps 1 clips" in second.upload(clip).error
    assert second.upload(clip).status == 200


def test_disconnected_page_is_told_why_its_work_stopped(serve, clip, held):
    server = serve(leave=0.05)
    (tab,) = working(server, clip, held, 1)
    wait_for(lambda: held.stopped == [tab.token])
    assert "the page was disconnected" in tab.state()["error"]["text"]


def test_one_tab_that_fails_does_not_stop_the_care_for_others(serve, clip, held, monkeypatch, capsys):
    server = serve(leave=60.0, forget=0.0)
    first, second = server.client.open_tab(), server.client.open_tab()

    def fail():
        raise OSError("the disk is gone")

    monkeypatch.setattr(server.session(first), "close", fail)
    wait_for(lambda: server.client.get(f"/api/s/{second.token}").status == 404)
    assert "the disk is gone" in capsys.readouterr().err


def test_streams_end_with_the_server(serve, clip, held):
    server = serve()
    (tab,) = working(server, clip, held, 1)
    with tab.watched() as states:
        thread = states.follow()
        wait_for(lambda: states.seen)
        server.close()
        thread.join(10)
        assert not thread.is_alive()
    assert held.stopped == [tab.token]
