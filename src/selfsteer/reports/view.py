"""`selfsteer view RUN`: the page of a run in a browser; while the run goes on how far it is, made anew every few seconds.

Served on loopback alone, below a random path, and only to whom names this machine in the request: another site that is open
in the same browser can neither guess the path nor reach it under a name of its own. Left out on purpose: anything that
changes a run.
"""

import hmac
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from selfsteer.reports.page import frame, table_html
from selfsteer.reports.tables import Cell, Row, Table
from selfsteer.runtime import duration
from selfsteer.stages.status import Status, status

REFRESH = 5
"""Seconds after which a browser asks for the page of a run under way again."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def live_page(run: Path) -> bytes:
    """report.html where the run has ended, else its stages. Raises ValueError where there is no run."""
    found = status(run)
    report = run / "report.html"
    if found["next"].startswith("nothing") and report.is_file():
        return report.read_bytes()
    return frame(run.name, (f"next: {found['next']}",), table_html(stages_table(found))).encode(errors="replace")


def stages_table(found: Status) -> Table:
    """The stages of a run, and how far each is."""

    def row(stage: Any) -> Row:
        counts = (Cell("" if stage[key] is None else f"{stage[key]:,}") for key in ("kept", "wanted"))
        time = Cell("" if stage["seconds"] is None else duration(stage["seconds"]))
        dropped = sorted(stage["dropped"].items(), key=lambda drop: -drop[1])
        listed = ", ".join(f"{count:,} {reason}" for reason, count in dropped)
        return Row(f"{stage['round']}  {stage['name']}", (Cell(stage["state"]), *counts, time, Cell(listed)))

    columns = ("state", "kept", "wanted", "time", "dropped")
    return Table("Stages", columns, tuple(map(row, found["stages"])), left=True, funnel=True)


@contextmanager
def viewing(run: Path, port: int = 0) -> Generator[str]:
    """Serve the page until the block ends; yields its address. Raises ValueError where there is no run, OSError for a port
    that is taken."""
    status(run)
    token = secrets.token_urlsafe(16)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost") or not hmac.compare_digest(self.path.encode(), f"/{token}/".encode()):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                body, ended = live_page(run), (run / "report.html").is_file()
            except (ValueError, OSError) as error:
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            if not ended:  # the finished page has a policy of its own, with the hash of its script
                self.send_header("Content-Security-Policy", _POLICY)
                self.send_header("Refresh", str(REFRESH))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are nobody's news."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{token}/"
        finally:
            server.shutdown()
            thread.join()
