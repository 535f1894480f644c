"""A judge behind a local address, in a few lines."""

import contextlib
import functools
import http.server
import json
import threading


@contextlib.contextmanager
def server(answer):
    """A local address; `answer(request as JSON, headers, how many came before)` gives (status, headers, bytes)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, asked, dict(self.headers)))
            status, headers, data = answer(asked, len(seen) - 1)
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=functools.partial(http_server.serve_forever, 0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}/v1", seen
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()


def chosen(text, status=200, **headers):
    return status, headers, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
