"""README's quickstart with an installed wheel, a few rounds of it: ``make check-dist``.

PYTHON -P tests/wheel.py        # the PYTHON that it is installed for, without extras
"""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fedss

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    assert Path(fedss.__file__).is_relative_to(sys.prefix), f"{fedss.__file__} is not the wheel's"
    extras = [
        name for name in ("timm", "flwr", "starlette", "onnx") if importlib.util.find_spec(name)
    ]
    assert not extras, f"expected no extras, found {extras}"
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    code = code.replace("rounds=110", "rounds=3, glyphs_classes=80, glyphs_clients=16")
    assert "rounds=3" in code, "README's quickstart has no rounds=110"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        os.chdir(folder)
        exec(code, {})
        assert re.fullmatch(r"R@1 [\d.]+, MAP@10 [\d.]+, \d+ unseen classes\n", out.getvalue())
        assert "<svg" in Path("runs/quickstart/report.html").read_text()
        command = Path(sys.executable).with_name("fedss")
        for words in (
            ["report", "runs/quickstart"],
            ["export", "runs/quickstart", "--format", "safetensors"],
        ):
            subprocess.run([command, *words], check=True, stdout=subprocess.DEVNULL)
        os.chdir("/")
    print(f"fedss {fedss.__version__} from {Path(fedss.__file__).parent}: {out.getvalue().strip()}")


if __name__ == "__main__":
    main()
