"""An interpreter that stands in for the one that holds vLLM: it serves what a test says, guarded by the key, on loopback."""

import sys
from pathlib import Path

from tiny import END_ID

from selfsteer.engines import serving

PYTHON = """#!{python}
import sys
if sys.argv[1] == "-c":
    {probe}
    print("vllm-is-there 0.0 {on_cpu}")
    sys.exit()
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
arguments = sys.argv[1:]
log = {log!r} + f"/{{os.getpid()}}"
key = os.environ["VLLM_API_KEY"]
with open(log, "w") as file:
    json.dump({{"arguments": arguments, "key": key, "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}}, file)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def guarded(self):
        if self.headers["Authorization"] != f"Bearer {{key}}":
            self.answer({{"error": "Unauthorized"}}, 401)
            return True
    def do_GET(self):
        self.guarded() or self.answer({{"data": [{{"id": "the model"}}]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.guarded():
            return
        ids = [*asked["prompt"], 20, {end}]
        choice = {{"text": "not looked at", "finish_reason": "stop", "token_ids": ids}}
        {during}
        self.answer({{"choices": [choice], "asked": asked}})
    def log_message(self, *_):
        pass
{before}
ThreadingHTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


def scripted_vllm(folder: Path, *, probe: str = "pass", before: str = "", during: str = "pass", on_cpu: int = 0) -> str:
    """The interpreter, in the folder; what each server was started with lies in the folder `started` beside it.

    probe, before, during: statements for the import of vLLM, for the start, and for each request (`choice` is its answer).
    """
    started = folder / "started"
    started.mkdir(exist_ok=True)
    path = folder / "python"
    filled = PYTHON.format(
        python=sys.executable,
        probe=probe,
        before=before,
        during=during,
        on_cpu=on_cpu,
        log=str(folder / "started"),
        end=END_ID,
    )
    path.write_text(filled, encoding="utf-8")
    path.chmod(0o755)
    serving.find_vllm.cache_clear()
    return str(path)
