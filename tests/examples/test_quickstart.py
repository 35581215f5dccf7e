"""The quickstart does what it says: at a small size in each run, and as the file it is where things are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"


@pytest.mark.gloo
def test_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import quickstart  # type: ignore[import-not-found]  # a script, not a module of the package

    text = quickstart.read_text([])
    assert len(text) > 1000
    quickstart.main(quickstart.Settings(text, processes=2, hidden=64, heads=4, vocab=512, batch=8, seq=16, steps=3))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("equal (float64, 2 ranks") for line in lines)
    rows = [line.split() for line in lines if len(line.split()) == 5 and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert float(rows[2][1]) < float(rows[0][1])
    assert float(lines[-1].rpartition(" ")[2]) < 1e-4


@pytest.mark.parametrize(
    "before,arguments,line",
    [
        ("sys.modules['transformers'] = None", "[]", "quickstart: transformers is not installed; pip install transformers"),
        ("", "['missing.txt']", "quickstart: missing.txt: No such file or directory; give the path of a text file"),
    ],
)
def test_failures_are_one_line(before: str, arguments: str, line: str, tmp_path: Path) -> None:
    code = f"import runpy, sys\n{before}\nsys.argv = ['quickstart.py', *{arguments}]\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line + "\n")
