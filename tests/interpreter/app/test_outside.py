"""Files outside of the server's folder cannot be read, and requests from pages of other sites are refused."""

import shutil

import pytest

module = pytest.importorskip("interpreter.app.server", reason="starlette is not installed")
from interpreter.app.web import HEADERS  # noqa: E402

SECRET = b"this must stay here"
SECURITY = ("content-security-policy", "x-content-type-options", "referrer-policy", "cross-origin-resource-policy")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run that may be changed."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def served(serve, run, clip):
    """A server next to a secret, and a tab with a clip and segments."""
    server = serve(runs=[run])
    for folder in (server.folder.parent, server.folder, run, run / "samples"):
        (folder / "secret.txt").write_bytes(SECRET)
        (folder / "secret.png").write_bytes(SECRET)
    (run / "samples" / "image-000009.png").symlink_to(run / "secret.png")
    (run / "samples" / "image-000008.png").mkdir()
    tab = server.client.open_tab()
    assert tab.upload(clip).status == 200
    tab.segment("run-0")
    return server, tab


UP = [
    "../",
    "..%2f",
    "%2e%2e/",
    "%2e%2e%2f",
    "%2E%2E%2F",
    "..%5c",
    "..\\",
    "....//",
    "%252e%252e%252f",
    "./../",
    "/../",
]
PLACES = [
    "/page/{}server.py",
    "/page/{}__main__.py",
    "/page/{}{}{}{}{}{}{}{}etc/passwd",
    "/{}interpreter/app/server.py",
    "/api/runs/run-0/pictures/{}secret.png",
    "/api/runs/run-0/pictures/{}config.json",
    "/api/runs/run-0/{}training",
    "/api/runs/{}training",
    "/api/s/TOKEN/download/{}secret.txt",
    "/api/s/TOKEN/download/{}{}secret.txt",
    "/api/s/TOKEN/labels/{}main/0",
    "/api/s/TOKEN/frames/{}secret.txt",
    "/api/s/{}secret.txt",
]
OTHERS = [
    "/page/",
    "/page//etc/passwd",
    "/page/%2fetc%2fpasswd",
    "/page/%00",
    "/page/index.html%00.txt",
    "/page/" + "x" * 3000,
    "//etc/passwd",
    "/etc/passwd",
    "/api/runs/run-0/pictures/secret.png",
    "/api/runs/run-0/pictures/secret.txt",
    "/api/runs/run-0/pictures/image-000009.png",
    "/api/runs/run-0/pictures/image-000008.png",
    "/api/runs/run-0/pictures/%2fetc%2fpasswd",
    "/api/runs/run-0/pictures//etc/passwd",
    "/api/runs/run-0/pictures/",
    "/api/runs/run-0/pictures/image-000001.png%00",
    "/api/runs/run-1/training",
    "/api/runs/RUN/training",
    "/api/runs//training",
    "/api/s/TOKEN/download/secret.txt",
    "/api/s/TOKEN/download/%2fetc%2fpasswd",
    "/api/s/TOKEN/download/walk.mp4",
    "/api/s/TOKEN/labels/secret/0",
]


def test_no_address_leads_outside(served, run):
    server, tab = served
    own = module.__file__.encode()
    for path in [*OTHERS, *(place.replace("{}", up) for place in PLACES for up in UP)]:
        path = path.replace("TOKEN", tab.token).replace("RUN", str(run).replace("/", "%2f"))
        answer = server.client.get(path)
        assert 400 <= answer.status < 500, path
        assert not any(text in answer.content for text in (SECRET, b"root:", b"import", b"optim", own)), path


def test_pictures_of_a_run_are_served(served, run):
    server, _ = served
    shown = server.client.get("/api/runs/run-0/training").json["pictures"]
    assert shown
    assert not {(p["stage"], p["step"]) for p in shown} & {("image", 8), ("image", 9)}
    for picture in shown:
        name = f"{picture['stage']}-{picture['step']:06d}.png"
        assert server.client.get(picture["url"]).content == (run / "samples" / name).read_bytes()


def test_page_and_its_files_are_served(server):
    page = server.client.get("/")
    assert page.content == (module.PAGE / "index.html").read_bytes()
    assert page.headers["content-type"].startswith("text/html")
    for file in module.PAGE.iterdir():
        answer = server.client.get(f"/page/{file.name}")
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript")


def test_tab_needs_its_token(served):
    server, tab = served
    other = server.client.open_tab()
    for token in ("", "x", tab.token[:-1], tab.token + "x", tab.token.swapcase(), "%00", other.token):
        for path in ("", "/events", "/frames/0", "/labels/main/0", "/download/png", "/clip"):
            if token != other.token or path not in ("", "/events"):
                answer = server.client.get(f"/api/s/{token}{path}")
                assert answer.status in (404, 405, 422), (token, path)
                assert b"walk" not in answer.content
        for action in ("segment", "compare", "cancel", "edit", "download"):
            if token != other.token:
                assert server.client.send("POST", f"/api/s/{token}/{action}", {"kind": "undo"}).status == 404
    assert other.state()["clip"] is None
    assert tab.state()["panes"]["main"] is not None


@pytest.mark.parametrize("headers", [{}, {"X-Interpreter": "0"}, {"Origin": "http://127.0.0.1"}])
def test_change_without_the_header_of_the_page_is_refused(served, headers):
    server, tab = served
    before = tab.state()
    changes = [("POST", f"/{action}") for action in ("segment", "compare", "cancel", "edit", "download")]
    changes += [("PUT", "/clip?name=a.mp4"), ("DELETE", "/clip"), ("DELETE", ""), ("PATCH", "/clip")]
    for method, path in changes:
        answer = server.client.send(method, f"/api/s/{tab.token}{path}", b"{}", headers)
        assert answer.status == 403
        assert answer.error == "this request does not come from the page"
    tabs = len(server.sessions._sessions)
    assert server.client.send("POST", "/api/sessions", headers=headers).status == 403
    assert len(server.sessions._sessions) == tabs
    assert tab.state() == before


def test_origin_of_a_request_does_not_matter(server):
    for origin in ("null", "https://elsewhere.example"):
        answer = server.client.send("POST", "/api/sessions", headers={"X-Interpreter": "1", "Origin": origin})
        assert answer.status == 201
        assert not any(name.startswith("access-control") for name in answer.headers)
        asked = server.client.send("OPTIONS", "/api/sessions", headers={"Origin": origin})
        assert not any(name.startswith("access-control") for name in asked.headers)


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "127.0.0.1.elsewhere.example", "localhost.elsewhere.example", ""]
)
def test_other_host_name_is_refused(server, host):
    for method, path in (("GET", "/"), ("GET", "/api/runs"), ("POST", "/api/sessions")):
        answer = server.client.raw([f"{method} {path} HTTP/1.1", f"Host: {host}", "X-Interpreter: 1"])
        assert answer.status == 400
    for own in ("127.0.0.1", "localhost", f"localhost:{server.client.place.split(':')[1]}"):
        assert server.client.raw(["GET / HTTP/1.1", f"Host: {own}"]).status == 200


def test_every_answer_has_the_security_headers(served):
    server, tab = served
    picture = server.client.get("/api/runs/run-0/training").json["pictures"][0]["url"]
    pages = ["/", "/page/main.js", "/page/nothing.js", "/nothing", "/api/runs", "/api/runs/run-1/training", picture]
    pages += ["/api/runs/run-0/curves.png", f"/api/s/{tab.token}", "/api/s/nothing"]
    pages += [f"/api/s/{tab.token}/{path}" for path in ("frames/0", "frames/9", "labels/main/0", "download/png")]
    answers = {path: server.client.get(path) for path in pages}
    answers["another site"] = server.client.send("POST", "/api/sessions", {}, headers={})
    answers["another name"] = server.client.raw(["GET / HTTP/1.1", "Host: example.com", "Connection: close"])
    answers["another method"] = server.client.send("POST", "/api/runs", {})
    assert [answers[f"another {what}"].status for what in ("site", "name", "method")] == [403, 400, 405]
    assert answers["/nothing"].error == "GET /nothing: Not Found"
    for path, answer in answers.items():
        headers = answer.headers
        for name in SECURITY:
            assert headers[name] == HEADERS[{n.lower(): n for n in HEADERS}[name]], path
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    kept = [path for path in pages if "max-age" in server.client.get(path).headers["cache-control"]]
    assert kept == [picture, "/api/runs/run-0/curves.png"]


def test_pictures_are_kept_under_the_address_of_their_version(served):
    _, tab = served
    state = tab.state()
    clip, version = state["clip"]["id"], state["panes"]["main"]["version"]

    def is_kept(path):
        return "max-age" in tab.get(path).headers["cache-control"]

    assert is_kept(f"frames/0?clip={clip}")
    assert not is_kept(f"frames/0?clip={clip - 1}")  # requested before another clip was uploaded
    assert is_kept(f"labels/main/0?version={version}")
    assert not is_kept(f"labels/main/0?version={version - 1}")
