"""`selfsteer view RUN`: the page of a run in a browser; while the run goes on how far it is, made anew every few seconds.

What is sealed by then has a page of its own beside it, as the finished run will: pairs can be read before the policy is
aligned on them, and nobody who reads is interrupted.

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

from selfsteer.reports.drawing import Cell, Row, Table
from selfsteer.reports.page import frame, page, table_html
from selfsteer.reports.reading import Reading, reading_of
from selfsteer.runtime import counted, duration
from selfsteer.stages.status import Status, status
from selfsteer.store.folder import RunFolder

REFRESH = 5
"""Seconds after which a browser asks for the page of a run under way again."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


SO_FAR = "so-far"
"""The place of the page of what is sealed."""


def report_of(run: Path, found: Status) -> bytes | None:
    """report.html where the run has ended, else None."""
    report = run / "report.html"
    return report.read_bytes() if found["next"].startswith("nothing") and report.is_file() else None


def stages_page(run: Path, found: Status) -> bytes:
    """How far a run under way is."""
    link = ""
    if any(stage["state"] == "sealed" for stage in found["stages"]):
        link = f'<p><a href="{SO_FAR}">Read what there is so far</a>: measures, plots and pairs of the sealed stages.</p>'
    return frame(run.name, (f"next: {found['next']}",), link + table_html(stages_table(found))).encode(errors="replace")


def page_so_far(run: Path) -> bytes:
    """The page of what is sealed."""
    from selfsteer.stages.summary import so_far  # brings torch along

    folder = RunFolder.view(run)
    metrics = so_far(folder)
    reading = reading_of(folder, metrics, metrics["run"]["seed"]) if metrics["rounds"] else Reading()
    return page(metrics, reading).encode(errors="replace")


def stages_table(found: Status) -> Table:
    """The stages of a run, and how far each is."""

    def row(stage: Any) -> Row:
        counts = (Cell("" if stage[key] is None else f"{stage[key]:,}") for key in ("kept", "wanted"))
        time = Cell("" if stage["seconds"] is None else duration(stage["seconds"]))
        dropped = Cell(counted(stage["dropped"]))
        return Row(f"{stage['round']}  {stage['name']}", (Cell(stage["state"]), *counts, time, dropped))

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
            host = self.headers.get("Host", "").partition(":")[0]
            asked, place = self.path.encode(), f"/{token}/".encode()
            so_far = hmac.compare_digest(asked, place + SO_FAR.encode())
            if host not in ("127.0.0.1", "localhost") or not (so_far or hmac.compare_digest(asked, place)):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                found = status(run)
                report = report_of(run, found)
                body = report or (page_so_far(run) if so_far else stages_page(run, found))
            except (ValueError, OSError) as error:
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            if not report and not so_far:  # a page with pairs has a policy of its own, with the hash of its script
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
