"""Names of own code: where they lead, without an import, and what is wrong with them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from fedss import Config, ConfigError
from fedss.own_code import OwnCode, check_code, code_file, find_code, import_code, is_code
from tests.own import forget

LOUD = "raise SystemExit('imported')\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget(tmp_path)


def write(path: str, text: str = LOUD) -> Path:
    file = Path(path).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("mine:net", True),
        ("lab.nets:Net.small", True),
        ("größe:netz", True),
        ("timm:resnet18", False),
        ("timm.models:resnet18", True),
        ("conv4-32", False),
        ("mine", False),
        ("mine:", False),
        (":net", False),
        ("lab..nets:net", False),
        ("lab/nets:net", False),
        ("mine:net()", False),
        ("mine:4", False),
        ("mine:net\n", False),
        (None, False),
        (3, False),
    ],
)
def test_what_a_name_is(name, answer):
    assert is_code(name) is answer


def test_a_folder_without_init_is_a_package():
    """In a process of its own: what other tests leave of Python's import system is not in it."""
    script = "import sys; from fedss.own_code import code_file; print(code_file(sys.argv[1]))"
    for file, name in {
        "plain/nets.py": "plain.nets:net",
        "plain/deep/er/nets.py": "plain.deep.er.nets:net",
    }.items():
        expected = write(file)
        told = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True)
        assert told.stdout.strip() == str(expected), told.stderr


def test_a_module_is_found_and_nothing_is_imported():
    (first,) = (write(path) for path in ["mine.py"])
    write("lab/__init__.py")
    second, third = write("lab/nets.py"), write("lab/deep/__init__.py")
    before = set(sys.modules), [*sys.path]
    found = {
        "mine": first,
        "lab.nets": second,
        "lab.deep": third,
    }
    for module, file in found.items():
        assert code_file(f"{module}:net") == file
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert find_code(f"{module}:net") == OwnCode(f"{module}:net", digest)
    assert (set(sys.modules), sys.path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:net", "no module nowhere in .*; install its package, or start where it lies"),
        ("mine.inner:net", "no module mine.inner in"),
        ("folder:net", "expected a module with a file, and folder has none"),
        ("itertools:chain", "expected a module with a file"),
    ],
)
def test_a_module_that_is_not_there(name, message):
    write("mine.py")
    Path("folder").mkdir()
    for use in (find_code, import_code):
        with pytest.raises(ConfigError, match=f"^{name}: {message}"):
            use(name)


def test_the_current_directory_comes_first_as_with_python_m():
    """``wave`` is a module of Python's, too; nothing has imported it here."""
    program = (
        "import sys; from fedss.own_code import import_code; "
        "sys.path = [p for p in sys.path if p]; print(import_code('wave:net'))"
    )
    write("wave.py", "net = 'mine'\n")
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "mine\n"


def test_what_a_name_stands_for():
    write("mine.py", "class Net:\n    def small(): return 4\n")
    assert import_code("mine:Net.small")() == 4
    with pytest.raises(ConfigError, match=r"^mine:net: .*mine.py has no 'net'; did you mean Net\?"):
        import_code("mine:net")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all", "importing .*broken.py fails: ModuleNotFoundError: No module"),
        ("1 / 0", "importing .*broken.py fails: ZeroDivisionError: division by zero"),
        ("def", "importing .*broken.py fails: SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported(text, message):
    write("broken.py", text)
    with pytest.raises(ConfigError, match=f"^broken:net: {message}"):
        import_code("broken:net")


def test_code_is_trusted_and_the_same_or_refused():
    file = write("mine.py")
    kept = find_code("mine:net")
    check_code(kept, True, "RUN")
    with pytest.raises(ConfigError, match=f"^RUN: would import mine:net from {file}; allow it"):
        check_code(kept, False, "RUN")
    with pytest.raises(ConfigError, match="RUN: would import gone:net from nowhere"):
        check_code(OwnCode("gone:net", "0" * 64), False, "RUN")
    with pytest.raises(ConfigError, match="gone:net: no module gone"):
        check_code(OwnCode("gone:net", "0" * 64), True, "RUN")
    file.write_text("# another\n")
    now = hashlib.sha256(b"# another\n").hexdigest()
    message = (
        f"^RUN was made with another mine:net: its file had SHA-256 {kept.sha256[:12]}, "
        f"{file} has {now[:12]}; put"
    )
    with pytest.raises(ConfigError, match=message):
        check_code(kept, True, "RUN")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "softmax"}, "objective: expected package.module:function, got 'softmax'"),
        ({"sampler": "mine.draw"}, "sampler: 'mine.draw' is unknown"),
        ({"augment": "mine"}, "augment: 'mine' is unknown"),
        ({"method": "mine:loss"}, "method: 'mine:loss' is unknown"),
    ],
)
def test_a_setting_that_is_no_name(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)
