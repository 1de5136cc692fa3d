"""The real app on a free port, and what a visitor with bad intent tries."""

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import app
import gradio as gr
import httpx
import pytest
from gate import MAX_BODY, MAX_UPLOAD, Gate
from gradio import processing_utils
from PIL import Image

SECRET = b"nobody may read this"
QUIET = {"prevent_thread_lock": True, "quiet": True}


def served(tiny_sdxl, lora, folder, **more):
    """The app's address, and its page."""
    page_folder = folder / "data"
    running, url, shared = app.launch(
        base=str(tiny_sdxl), loras=[str(lora)], data_dir=page_folder, runs_dir=folder / "runs", options=QUIET, **more
    )
    assert shared is None
    return running, url.rstrip("/")


@pytest.fixture(scope="module")
def site(tiny_sdxl, lora, tmp_path_factory):
    """The running app, its address, and a folder with a secret beside what it serves."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "secret.txt").write_bytes(SECRET)
    running, url = served(tiny_sdxl, lora, folder)
    (folder / "data" / "votes.sqlite").write_bytes(SECRET)
    media = folder / "data" / "media"
    media.mkdir(exist_ok=True)
    (media / "seen.png").write_bytes(b"for all to see")
    (media / "link.png").symlink_to(folder / "secret.txt")
    yield running, url, folder
    gr.close_all()


@pytest.fixture(scope="module")
def far_away():
    """A server of another, which counts who asks it."""
    hits = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            stream = io.BytesIO()
            Image.new("RGB", (8, 8)).save(stream, "PNG")
            self.send_response(200)
            self.send_header("content-length", str(len(stream.getvalue())))
            self.end_headers()
            self.wfile.write(stream.getvalue())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/picture.png", hits
    server.shutdown()


@pytest.fixture
def as_if_public(monkeypatch):
    """Gradio itself refuses addresses of this machine; here it takes them as it takes the addresses of others."""
    monkeypatch.setattr(processing_utils, "PUBLIC_HOSTNAME_WHITELIST", ["127.0.0.1"])


def call(url, name, data):
    """The answer of an endpoint: its status, and what its events say."""
    begun = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data})
    if begun.status_code != 200:
        return begun.status_code, begun.text
    event = begun.json()["event_id"]
    return 200, httpx.get(f"{url}/gradio_api/call/{name}/{event}", timeout=120).text


def score_of(file):
    return [[file], "a fox", ["embedded-hps"]]


def file_data(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png", **more}


def test_it_is_reached_from_this_machine_alone(site):
    assert site[1].startswith("http://127.0.0.1:")
    assert site[0].get_blocks().server_name == "127.0.0.1"


def test_files_outside_of_the_media_are_not_served(site):
    _, url, folder = site
    media = folder / "data" / "media"
    assert httpx.get(f"{url}/gradio_api/file={media}/seen.png").content == b"for all to see"
    tried = [
        f"{folder}/secret.txt",
        f"{folder}/data/votes.sqlite",
        f"{media}/link.png",
        f"{media}/../votes.sqlite",
        f"{media}/..%2Fvotes.sqlite",
        f"{media}/%2e%2e/votes.sqlite",
        f"{media}/%252e%252e/votes.sqlite",
        f"{media}/..\\votes.sqlite",
        f"{media}/seen.png/../../votes.sqlite",
        f"/{folder}/secret.txt",
        f"file://{folder}/secret.txt",
        quote(str(folder / "secret.txt"), safe=""),
        "../" * 20 + str(folder / "secret.txt").lstrip("/"),
        "/etc/passwd",
        "demo/app.py",
        str(app.__file__),
    ]
    for path in tried:
        for place in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"):
            answer = raw(url, place + path)
            assert SECRET not in answer, path
            assert b"root:" not in answer, path
            assert b"Middleware(Gate)" not in answer, path


def raw(url, target):
    """What the server sends for a path that no client has tidied up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        parts = []
        while part := line.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_file_that_was_not_uploaded_is_not_read(site):
    _, url, folder = site
    for path in (folder / "secret.txt", folder / "data" / "media" / "link.png", "/etc/passwd"):
        said = call(url, "score", score_of(file_data(str(path))))[1]
        assert "error" in said
        assert "passwd" not in said


@pytest.mark.usefixtures("as_if_public")
def test_no_url_is_fetched(site, far_away):
    _, url, _ = site
    address, hits = far_away
    tried = [
        httpx.get(f"{url}/gradio_api/file={address}"),
        httpx.get(f"{url}/gradio_api/file/{address}"),
        httpx.get(f"{url}/gradio_api/file={quote(address, safe='')}"),
        httpx.get(f"{url}/gradio_api/proxy={address}"),
    ]
    assert all(answer.status_code in (400, 403) for answer in tried)
    assert call(url, "score", score_of(file_data(address)))[0] == 403
    asked = {"data": [*score_of(file_data(address))], "fn_index": 0, "session_hash": "s"}
    assert httpx.post(f"{url}/gradio_api/queue/join", json=asked).status_code == 403
    assert httpx.post(f"{url}/gradio_api/run/score", json=asked).status_code == 403
    call(url, "score", score_of(file_data("none.png", url=address)))
    call(url, "score", score_of(file_data(address.upper())))
    assert hits == []


@pytest.mark.usefixtures("as_if_public")
def test_without_the_gate_gradio_would_fetch_it(site, far_away, monkeypatch):
    _, url, _ = site
    address, hits = far_away

    async def open_gate(self, scope, receive, send):
        await self.app(scope, receive, send)

    monkeypatch.setattr(Gate, "__call__", open_gate)
    call(url, "score", score_of(file_data(address)))
    assert hits
    hits.clear()


def upload(url, files):
    return httpx.post(f"{url}/gradio_api/upload", files=files, timeout=60)


def test_an_uploaded_picture_is_scored(site):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "PNG")
    path = upload(site[1], {"files": ("a.png", stream.getvalue())}).json()[0]
    said = call(site[1], "score", score_of(file_data(path)))[1]
    assert "event: complete" in said
    assert "1 scored, 0 left out" in said


def test_uploads_are_limited_in_size_and_number(site):
    _, url, _ = site
    assert upload(url, {"files": ("a.png", b"\0" * (MAX_UPLOAD + 1))}).status_code == 413
    half = b"\0" * (MAX_UPLOAD // 2 + 1)
    assert upload(url, [("files", ("a.png", half)), ("files", ("b.png", half))]).status_code == 413
    assert upload(url, {"files": ("a.exe.png", b"small")}).status_code == 200
    body = {"data": ["x" * (MAX_BODY + 1), *score_of(None)[1:]]}
    assert httpx.post(f"{url}/gradio_api/call/score", json=body).status_code == 413

    def endless():
        yield b"x"

    assert httpx.post(f"{url}/gradio_api/upload", content=endless()).status_code == 411


def test_an_upload_keeps_to_its_folder(site):
    running, url, folder = site
    for name in ("../../up.png", "/tmp/up.png", "..\\up.png"):
        path = upload(url, {"files": (name, b"x")}).json()[0]
        assert Path(path).resolve().is_relative_to(running.uploaded_file_dir)
        assert "mmalign-demo-" in path  # and not the folder that all gradio programs share
    assert not list(folder.rglob("up.png"))


def test_large_pictures_are_left_out(site):
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    path = upload(site[1], {"files": ("bomb.png", stream.getvalue())}).json()[0]
    assert "error" in call(site[1], "score", score_of(file_data(path)))[1]


def compare_of(**changes):
    asked = {"prompt": "a fox", "names": ["base"], "scorers": ["embedded-hps"], "seed": 0, "count": 1, "steps": 1}
    asked |= {"guidance": 1, "strength": 1, "picture": None} | changes
    return list(asked.values())


def test_models_and_scorers_come_from_the_list_alone(site, tiny_sdxl):
    for changes in (
        {"names": [str(tiny_sdxl)]},
        {"names": ["stabilityai/sdxl-turbo"]},
        {"scorers": ["../../scorers/hpsv2"]},
    ):
        assert "error" in call(site[1], "compare", compare_of(**changes))[1]


def test_a_prompt_stays_text(site):
    prompt = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    status, said = call(site[1], "compare", compare_of(prompt=prompt))
    assert status == 200
    assert "event: complete" in said
    assert "onerror" not in said
    assert "<script" not in said


def test_a_password_is_asked_for(tiny_sdxl, lora, tmp_path):
    running, url = served(tiny_sdxl, lora, tmp_path, auth="me:secret")
    try:
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=demo/app.py"):
            assert httpx.get(url + path).status_code == 401
        assert upload(url, {"files": ("a.png", b"x")}).status_code == 401
        assert httpx.post(f"{url}/gradio_api/call/compare", json={"data": compare_of()}).status_code == 401
        wrong = {"username": "me", "password": "guess"}
        assert httpx.post(f"{url}/login", data=wrong).status_code == 400
        with httpx.Client() as client:
            assert client.post(f"{url}/login", data=wrong | {"password": "secret"}).status_code == 200
            assert client.get(f"{url}/config").status_code == 200
    finally:
        running.get_blocks().close()
