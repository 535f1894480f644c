import html.parser
import sys

import pytest

from jaxlm.config import UserError
from jaxlm.run import report
from jaxlm.run.log import MetricsLog

PNG = b"\x89PNG\r\n\x1a\n"


def run(tmp_path, name="a", evals=True):
    m = MetricsLog(tmp_path / name)
    for step in range(1, 31):
        m.write(step, {"train/loss": 5.0 / step + 1.0 if step != 7 else float("nan")})
        if evals and step % 10 == 0:
            m.write(step, {"eval/python/loss": 2.0 / step + 1.2, "eval/all/loss": 2.0 / step + 1.2})
    return tmp_path / name


@pytest.mark.parametrize("evals", [True, False])
def test_loss_curve(tmp_path, evals):
    pytest.importorskip("matplotlib")
    p = report.loss_curve(run(tmp_path, evals=evals))
    assert p == tmp_path / "a" / "report" / "loss.png" and p.read_bytes().startswith(PNG)


def test_training_does_not_need_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.loss_curve(run(tmp_path)) is None
    assert "no loss curve" in caplog.text and ".[report]" in caplog.text


def test_compare(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [run(tmp_path, "a"), run(tmp_path, "b")]
    assert report.compare(runs, tmp_path / "both.png").read_bytes().startswith(PNG)
    with pytest.raises(UserError, match="has no metric 'eval/x'"):
        report.compare(runs, tmp_path / "both.png", "eval/x")


def test_smooth_has_no_bias():
    assert report.smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert report.smooth([0.0, 1.0], 0.5) == pytest.approx([0.0, 1 / 1.5])


class Parsed(html.parser.HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links, self.data = [], [], [], []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def test_page_is_whole_escaped_and_needs_nothing_else(tmp_path):
    evil = '<script>alert("x")</script> & "'
    (tmp_path / "i.png").write_bytes(PNG)
    page = report.Page(evil)
    page.figures([("1.23", evil)])
    for add in (page.heading, page.subheading, page.paragraph, page.pre):
        add(evil)
    page.table(["name", evil, "value"], [[evil, 12345, 0.123456], ["b", 2, 1.0]])
    page.table(["empty"], [])
    page.bars([(evil, 0.75), ("b", 0.25)], ("token", "probability"))
    page.pieces([(evil, 7)])
    page.details(evil, evil)
    page.continuation(evil, evil)
    page.image(tmp_path / "i.png", evil)
    page.heading("second")
    page.write(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    parsed = Parsed(text)
    assert "script" not in parsed.tags
    assert evil in parsed.data
    assert parsed.links[:2] == ["#s1", "#s2"]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert "12,345" in text and "0.1235" in text and "75.00%" in text


def test_page_without_sections():
    page = report.Page("t")
    page.paragraph("p")
    assert "p" in Parsed(page.render()).data
