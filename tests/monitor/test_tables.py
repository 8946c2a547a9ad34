from minimind_nb.monitor.tables import Facts, Table, columns_of, shorten


def test_a_table_is_aligned_in_a_terminal():
    table = Table("runs", ["name", "loss"], [["a", "2.5"], ["longer", "10"]])
    assert repr(table) == "runs\n  name    loss\n  a       2.5\n  longer  10"


def test_chinese_takes_two_columns():
    assert [columns_of(text) for text in ("ab", "中文，", "")] == [2, 6, 0]
    table = Table("答", ["问", "x"], [["中文", "1"], ["a", "2"]])
    assert repr(table) == "答\n  问    x\n  中文  1\n  a     2"


def test_a_long_cell_is_cut_to_one_line_in_a_terminal_only():
    assert shorten("a\n b  c") == "a b c"
    assert shorten("x" * 60) == "x" * 60
    assert shorten("x" * 61) == "x" * 59 + "…"
    assert shorten("中" * 31) == "中" * 29 + "…"
    table = Table("t", ["answer"], [["y" * 99]])
    assert "y" * 60 not in repr(table)
    assert "y" * 99 in table._repr_html_()


def test_what_a_page_shows_is_escaped():
    page = Table("<t>", ["<c>"], [["<b>&"]])._repr_html_()
    assert page.startswith("<b>&lt;t&gt;</b><table><tr><th ")
    assert "&lt;c&gt;</th>" in page and "&lt;b&gt;&amp;</td>" in page
    page = Facts("<t>", {"<n>": "<v>"})._repr_html_()
    assert "&lt;n&gt;</td><td " in page and "&lt;v&gt;</td>" in page


def test_a_table_without_rows_is_its_title():
    table = Table("Runs in out: none", ["name"], [])
    assert repr(table) == "Runs in out: none"
    assert table._repr_html_() == "<b>Runs in out: none</b><table><tr></tr></table>"


def test_facts_are_a_dictionary_that_shows_itself():
    facts = Facts("machine", {"GPU": "none", "memory": "4 GiB"})
    assert facts["memory"] == "4 GiB"
    assert repr(facts) == "machine\n  GPU     none\n  memory  4 GiB"
    assert repr(Facts("empty", {})) == "empty"
