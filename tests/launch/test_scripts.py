"""The calling script must be one that workers can import again."""

import subprocess
import sys
from pathlib import Path

import pytest

from minimind_nb.launch import scripts


@pytest.mark.fault("F107")
@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_without_its_guard_is_refused(tmp_path: Path, guarded: bool) -> None:
    guard = "if __name__ == '__main__':" if guarded else "if True:"
    script = tmp_path / "script.py"
    script.write_text(
        "from minimind_nb.launch.scripts import refuse_unguarded_script\n"
        "def main():\n"
        "    refuse_unguarded_script('evaluate')\n"
        f"{guard}\n"
        "    main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is guarded
    if not guarded:
        assert f"{script}:5 calls evaluate at the top level of a script" in done.stderr
        assert 'if __name__ == "__main__":' in done.stderr
        assert "        … = mm.evaluate(…)" in done.stderr


def test_a_script_that_cannot_be_read_again_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "<stdin>", raising=False)
    monkeypatch.setattr(main, "__spec__", None, raising=False)
    with pytest.raises(RuntimeError, match="<stdin> cannot be read again by worker"):
        scripts.refuse_unguarded_script("train")
