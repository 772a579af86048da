"""Programs that stand in for servers, on loopback: they answer as a test says."""

import sys
from pathlib import Path
from textwrap import indent

from tiny import END_ID

from selfsteer.engines import serving

HTTP = """
import json, os, pathlib, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def guarded(self):
        if key is not None and self.headers["Authorization"] != f"Bearer {key}":
            self.answer({"error": "Unauthorized"}, 401)
            return True
    def do_GET(self):
        self.guarded() or self.answer({"data": [{"id": name}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.guarded() or reply(self, asked)
    def log_message(self, *_):
        pass
"""

SERVE = """
ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""

PROBED = """#!{python}
import sys
if sys.argv[1] == "-c":
    {probe}
    print("vllm-is-there 0.0 {on_cpu}")
    sys.exit()
"""

VLLM = """
arguments, name, key = sys.argv[1:], "the model", os.environ["VLLM_API_KEY"]
port = arguments[arguments.index("--port") + 1]
devices = os.environ.get("CUDA_VISIBLE_DEVICES")
pathlib.Path({started!r}, str(os.getpid())).write_text(json.dumps(dict(arguments=arguments, key=key, devices=devices)))
def reply(self, asked):
    choice = {{"text": "not looked at", "finish_reason": "stop", "token_ids": [*asked["prompt"], 20, {end}]}}
{during}
    self.answer({{"choices": [choice]}})
{before}
"""

CHAT = """
model, port, *words = sys.argv[1:]
name, key = {name}, None
def reply(self, asked):
    text = {text}
{during}
    self.answer({{"choices": [{{"finish_reason": "stop", "message": {{"content": text}}}}]}})
{before}
"""


def put_vllm(folder: Path, *, probe: str = "pass", before: str = "", during: str = "pass", on_cpu: int = 0) -> str:
    """An interpreter in place of the one that holds vLLM; what each server was started with lies in `folder/started`.

    probe, before, during: statements for the import of vLLM, for the start, and for each request (`asked`, a `choice` to
    answer with, the handler `self`).
    """
    started, path = folder / "started", folder / "python"
    started.mkdir(exist_ok=True)
    probed = PROBED.format(python=sys.executable, probe=probe, on_cpu=on_cpu)
    vllm = VLLM.format(started=str(started), end=END_ID, before=before, during=indent(during, "    "))
    path.write_text(probed + HTTP + vllm + SERVE, encoding="utf-8")
    path.chmod(0o755)
    serving.find_vllm.cache_clear()
    return str(path)


def put_server(path: Path, text: str, *, name: str = "model", before: str = "", during: str = "pass") -> Path:
    """A program that takes a model, a port and more words, and serves chat completions of a text.

    text, name: expressions for what a request (`asked`) is answered with and for what the model is called. before, during:
    statements for the start and for each request.
    """
    chat = CHAT.format(name=name, text=text, before=before, during=indent(during, "    "))
    path.write_text(HTTP + chat + SERVE, encoding="utf-8")
    return path
