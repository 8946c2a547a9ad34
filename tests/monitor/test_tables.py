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
    assert '<div class="title">&lt;t&gt;</div><table>' in page
    assert "<tr><th>&lt;c&gt;</th></tr><tr><td>&lt;b&gt;&amp;</td></tr>" in page
    facts = Facts("<t>", {"<n>": "<v>"})
    assert "<tr><td>&lt;n&gt;</td><td>&lt;v&gt;</td></tr>" in facts._repr_html_()
    card = Facts("<t>", {"<n>": "<v>"}, "<&>")._repr_html_()
    assert '&lt;t&gt;</div>&lt;&amp;&gt;<div class="facts">' in card
    assert "&lt;n&gt;</div>&lt;v&gt;</div>" in card


def test_numbers_stand_to_the_right_on_a_page():
    rows = [["a", "2.5", "1 MiB", "3"], ["longer", "", "nan", "4 of 5"]]
    page = Table("runs", ["name", "loss", "size", "step"], rows)._repr_html_()
    number = ' class="number"'
    for tag, row in (("th", ["name", "loss", "size", "step"]), ("td", rows[1])):
        name, loss, size, step = row
        assert (
            f"<tr><{tag}>{name}</{tag}><{tag}{number}>{loss}</{tag}>"
            f"<{tag}{number}>{size}</{tag}><{tag}>{step}</{tag}></tr>"
        ) in page


def test_a_table_without_rows_is_its_title():
    table = Table("Runs in out: none", ["name"], [])
    assert repr(table) == "Runs in out: none"
    assert "Runs in out: none</div><table></table>" in table._repr_html_()


def test_facts_are_a_dictionary_that_shows_itself():
    facts = Facts("machine", {"GPU": "none", "memory": "4 GiB"}, "It works.")
    assert facts["memory"] == "4 GiB"
    assert repr(facts) == "machine\nIt works.\n  GPU     none\n  memory  4 GiB"
    assert repr(Facts("empty", {})) == "empty"
    long = Facts("t", {"n": 60 * "wide "})
    assert repr(long).count("wide") == 60, "only the cells of tables are cut"
