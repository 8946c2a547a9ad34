import numpy as np

from minimind_nb.monitor.data_report import END, LEARNED, DataReport, Finding, Preview

QUESTION = "<|im_start|>user\n1 < 2 & 中文<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def make_preview():
    answer = f"{QUESTION}{LEARNED}<b>好</b>.<|im_end|>\n{END}"
    return Preview("2 rows are read", [[answer, answer], ["one & two"]], SPECIAL)


def test_a_terminal_shows_what_is_learned_between_brackets():
    preview = make_preview()
    document = f"{QUESTION}⟦<b>好</b>.<|im_end|>\n⟧"
    assert preview == [document * 2, "one & two"]
    assert repr(preview) == f"2 rows are read\n\n{document * 2}\n\none & two"


def test_a_page_shows_documents_apart_and_what_is_learned_on_a_tint():
    page = make_preview()._repr_html_()
    assert page.count('<div class="card sample">') == 2
    head = '<span class="faint">&lt;|im_start|&gt;user</span>\n1 &lt; 2 &amp; 中文'
    assert page.count(f"<div>{head}") == 2
    end = '<span class="faint">&lt;|im_end|&gt;</span>\n</span></div>'
    assert f'<span class="learned">&lt;b&gt;好&lt;/b&gt;.{end}' in page
    assert "<div>one &amp; two</div>" in page


def test_a_report_shows_figures_charts_and_findings_and_is_a_dict():
    rows = np.array([[0, 3, 0, 1]])
    found = Finding("equal <again>", rows, "line 3 (as 1)", '{"a": 1}', "drop=['x']")
    charts = {"rows by tokens": (np.array([1, 4, 0]), 1)}
    report = DataReport(
        {"rows": 1234, "share_cut": 0.5}, {"x": found}, charts, make_preview()
    )
    assert report["rows"] == 1234
    text = "1 × equal <again>: line 3 (as 1)\n  {\"a\": 1}\n  drop=['x']"
    assert repr(report).endswith(text)
    assert "2 rows are read\n  rows       1,234\n  share_cut  0.5\n" in repr(report)
    page = report._repr_html_()
    assert "<b>equal &lt;again&gt;</b>: line 3 (as 1)" in page
    assert 'class="" style="height:25.0%"' in page
    assert 'class="marked" style="height:100.0%"' in page
    assert "<summary>2 samples</summary>" in page


def test_a_report_without_findings_says_so():
    report = DataReport({}, {}, {"none": (np.zeros(2), 2)}, make_preview())
    assert repr(report).endswith("Nothing to leave out was found.")
    assert "Nothing to leave out was found." in report._repr_html_()
