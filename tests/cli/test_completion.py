"""TAB in the shells that are installed here, each after `prunus --install-completion`."""

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prunus

#: What is typed before TAB -> the line after it. Each has one completion.
LINES = {
    "prunus reco": "prunus recover ",
    "prunus prune --reconstruct-": "prunus prune --reconstruct-epochs ",
    "prunus prune dense out --method magn": "prunus prune dense out --method magnitude ",
    "prunus inspect dense-": "prunus inspect dense-folder/",
}
READY = "ready> "
SKIP_BASH = sys.platform == "darwin"  # its bash is older than 4.4


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request, tmp_path, monkeypatch) -> str:
    """A shell whose home has a program and its completion, and the folder `dense-folder`."""
    name = request.param
    if os.name != "posix" or shutil.which(name) is None or (name == "bash" and SKIP_BASH):
        pytest.skip(f"needs {name}")
    program = tmp_path / "bin" / "prunus"
    program.parent.mkdir()
    source = Path(prunus.__file__).parents[1]
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(source)!r})\n"
        "from prunus.cli import main\nmain()\n"
    )
    program.chmod(0o755)
    (tmp_path / "dense-folder").mkdir()
    for startup in (".bashrc", ".zshrc"):
        (tmp_path / startup).write_text(f"PS1='{READY}'\n")
    path = f"{program.parent}:{os.environ['PATH']}"
    home = str(tmp_path)
    for variable, value in {"HOME": home, "ZDOTDIR": home, "PATH": path, "TERM": "dumb"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    # A shell becomes the program where it is the last command, and is not found then.
    command = [name, "-ic", "prunus --install-completion; true"]
    subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)
    return name


def test_tab_completes_verbs_options_choices_and_files(shell):
    for typed, expected in LINES.items():
        if shell == "fish":
            command = ["fish", "-c", "complete -C $argv[1]", typed]
            offered = subprocess.check_output(command, text=True, timeout=120).splitlines()
            words = [line.partition("\t")[0] for line in offered]
            assert words == [expected.split()[-1]], offered
        else:
            assert expected in press_tab(shell, typed, expected)


def press_tab(shell: str, typed: str, expected: str) -> str:
    """What a terminal shows when `typed` and TAB are pressed in a new shell."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.execlp(shell, shell, "-i")
    # What is typed, and what the terminal shows before. The first TAB of a new zsh loads the
    # completion and rings the bell; the next one completes.
    keys = [(READY, f"{typed}\t")] + ([("\a", "\t")] if shell == "zsh" else [])
    shown, deadline = "", time.monotonic() + 60
    try:
        while time.monotonic() < deadline and expected not in shown.replace("\a", ""):
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
            if keys and keys[0][0] in shown:
                os.write(terminal, keys.pop(0)[1].encode())
                shown = shown.replace("\a", "")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    return shown.replace("\a", "")
