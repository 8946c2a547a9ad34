import numpy as np

from minimind_nb.monitor.data_report import DataReport, Preview
from minimind_nb.monitor.tables import Facts

QUESTION = "<|im_start|>user\n1 < 2 & 中文<|im_end|>\n<|im_start|>assistant\n"
ANSWER = f"{QUESTION}⟦<b>好</b>.<|im_end|>\n⟧"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
PREVIEW = Preview("2 rows are read", [[ANSWER, ANSWER], ["one & two"]], SPECIAL)


def make_report(findings):
    facts = Facts("2 rows are read", {"rows": 1234}, "Without them: <code>")
    charts = {"rows by tokens": np.array([1, 4, 0])}
    return DataReport(facts, ["a.jsonl"], findings, charts, PREVIEW)


def test_a_terminal_shows_what_is_learned_between_brackets():
    assert repr(PREVIEW) == f"2 rows are read\n\n{ANSWER}\n{ANSWER}\n\none & two"


def test_a_page_shows_documents_apart_and_what_is_learned_on_a_tint():
    page = PREVIEW._repr_html_()
    assert page.count('<div class="card sample">') == 2
    head = '<span class="faint">&lt;|im_start|&gt;user</span>\n1 &lt; 2 &amp; 中文'
    assert page.count(f"<div>{head}") == 2
    end = '<span class="faint">&lt;|im_end|&gt;</span>\n</span></div>'
    assert f'<span class="learned">&lt;b&gt;好&lt;/b&gt;.{end}' in page
    assert "<div>one &amp; two</div>" in page


def test_a_report_shows_figures_charts_and_the_first_lines_of_each_kind():
    report = make_report({"x": {n: f"as <{n}>" for n in range(4)}})
    assert "rows  1,234" in repr(report)
    assert "x     4     line 0, as <0> line 1, as <1> line 2, as <2> …" in repr(report)
    page = report._repr_html_()
    assert "line 0, as &lt;0&gt;\nline 1, as &lt;1&gt;" in page
    assert "Without them: &lt;code&gt;" in page
    assert '<i style="height:25.0%"></i><i style="height:100.0%"></i>' in page
    assert "<summary>2 samples</summary>" in page


def test_a_report_without_findings_is_shown():
    assert repr(make_report({})).rstrip().endswith("Rows to look at")
    assert "2 samples" in make_report({})._repr_html_()
