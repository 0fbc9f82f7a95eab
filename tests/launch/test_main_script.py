"""The main script of a program in another process."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import dataclasses, enum, functools, pickle, sys
from lightning_mgpu.launch.main_script import MainScript, pickled_by_name
from lightning_mgpu.launch.pickler import dumps
from lightning_mgpu.launch.process_state import ProcessState

print("imported as", __name__)
COUNT = 0

class Act(enum.Enum):
    relu = 0

@dataclasses.dataclass
class Conf:
    act: Act = Act.relu

    class Inner:
        pass

def decorated(function):
    return functools.wraps(function)(lambda: None)

@decorated
def task(conf):
    global COUNT
    COUNT += 1
    main = sys.modules["__main__"]
    assert main.COUNT == COUNT == 1
    assert type(conf) is Conf is main.Conf
    assert conf.act is Act.relu
    assert (Conf.__module__, Conf.Inner.__module__, main.__name__) == 3 * ("__main__",)
    assert pickle.loads(pickle.dumps(Conf.Inner)) is Conf.Inner
    print("ran in", main.__file__, getattr(main.__spec__, "name", None))

if __name__ == "__main__":
    original, local = task.__wrapped__, lambda value: value
    with pickled_by_name():
        state = ProcessState.capture(1, main=MainScript.of_this_process())
        data = dumps((original, Conf(), local))
    with open("sent", "wb") as file:
        pickle.dump((state, data), file)
"""

_RECEIVER = """
import pickle
with open("sent", "rb") as file:
    state, data = pickle.load(file)
for _ in range(2):
    state.apply()
task, conf, local = pickle.loads(data)
task(conf)
assert local(3) == 3
"""


def call(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package() -> Path:
    path = Path("package", "app.py")
    path.parent.mkdir()
    path.with_name("__init__.py").touch()
    path.with_name("other.py").touch()
    path.write_text("from . import other" + _SCRIPT)
    return path


def test_script_is_imported_once_and_is_the_main_module() -> None:
    Path("app.py").write_text(_SCRIPT)
    assert call("app.py") == "imported as __main__\n"
    Path("app.py").unlink()  # as on a machine that does not have it
    path = Path.cwd() / "app.py"
    assert call("-c", _RECEIVER) == f"imported as __mp_main__\nran in {path} None\n"


def test_module_that_is_run_is_imported(package: Path) -> None:
    assert call("-m", "package.app") == "imported as __main__\n"
    received = call("-c", _RECEIVER)
    assert received == f"imported as __mp_main__\nran in {package.absolute()} package.app\n"


@pytest.mark.parametrize("name", ["__main__", "<stdin>"])
def test_program_without_a_script_of_its_own_has_none(name: str) -> None:
    code = (
        "from lightning_mgpu.launch.main_script import MainScript\n"
        "print(MainScript.of_this_process())\n"
    )
    if name == "__main__":
        Path("package").mkdir()
        Path("package", "__main__.py").write_text(code)
        assert call("-m", "package") == "None\n"
    assert call("-c", code) == "None\n"


def test_script_that_would_run_the_program_again_is_named() -> None:
    Path("app.py").write_text(_SCRIPT + "else:\n    sys.exit('again')\n")
    call("app.py")
    done = subprocess.run([sys.executable, "-c", _RECEIVER], capture_output=True, text=True)
    assert "app.py cannot be imported by the trial's process (SystemExit: again)." in done.stderr
    assert 'Put what runs the program below `if __name__ == "__main__":`' in done.stderr


def test_class_that_only_the_program_defines_is_named() -> None:
    code = _SCRIPT.replace("    original, local", "    class Late: pass\n    original, local")
    Path("app.py").write_text(code.replace("Conf(), local))", "Late(), local))"))
    call("app.py")
    done = subprocess.run([sys.executable, "-c", _RECEIVER], capture_output=True, text=True)
    assert "MainScriptError: The main script has no `Late` when it is imported" in done.stderr
