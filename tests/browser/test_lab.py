"""What the other tests of this folder assume of JupyterLab."""


def test_cells_run_in_a_notebook_and_are_saved(lab):
    file = lab.open_notebook(["1 + 1", "import time\ntime.sleep(60)"])
    assert "2" in lab.run_cell(0).inner_text()
    lab.run_cell(1, wait=False)
    lab.interrupt()
    lab.wait_idle()
    assert "KeyboardInterrupt" in lab.output(1).inner_text()
    lab.set_theme(dark=True)
    lab.screenshot("lab-dark")
    lab.save()
    assert "KeyboardInterrupt" in file.read_text()


def test_html_is_shown_on_a_light_and_a_dark_page(show):
    for dark in (False, True):
        assert show("<b>text 你好</b>", "page", dark).inner_text("b") == "text 你好"
