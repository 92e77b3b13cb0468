"""The live view in a real terminal: what stands on the screen, also when the window changes, and what is left of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.net.cli_kit import MESH, Place, a_place, lines_of, wait_until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]


class Terminal:
    """A window of tmux, on a server of its own."""

    def __init__(self, place: Place, width: int = 100, height: int = 30) -> None:
        self.place = place
        # A socket's path may have about a hundred characters, which a test's own directory may exceed.
        self.directory = Path(tempfile.mkdtemp(prefix="mesh-"))
        self.socket = str(self.directory / "tmux")
        self.tmux("-f", os.devnull, "new-session", "-d", "-x", str(width), "-y", str(height), "env PS1='$ ' sh")
        self.wait_for("$")

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, *arguments], env=self.place.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", "Enter")

    def key(self, name: str) -> None:
        self.tmux("send-keys", name)

    def screen(self, *, joined: bool = False) -> list[str]:
        """Non-empty lines; ``joined``: as they were written, whatever the window's width."""
        return list(lines_of(self.tmux("capture-pane", "-p", *(["-J"] if joined else []), "-S", "-200")))

    def wait_for(self, words: str, within: float = 30.0) -> str:
        def there() -> str | None:
            return next((line for line in self.screen() if words in line), None)

        try:
            return wait_until(there, within, words)
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self.screen()])) from error

    def shell(self) -> psutil.Process:
        return psutil.Process(int(self.tmux("list-panes", "-F", "#{pane_pid}").strip()))

    def cursor_is_shown(self) -> bool:
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def close(self) -> None:
        children = self.shell().children(recursive=True)
        self.tmux("kill-server")
        _, alive = psutil.wait_procs(children, timeout=10)
        for process in alive:
            process.kill()
        shutil.rmtree(self.directory)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    for place in a_place(tmp_path / "screen"):
        window = Terminal(place)
        yield window
        window.close()


def mesh(*arguments: str, state: Path, discovery: bool = False, name: str = "kitchen") -> str:
    ports = [] if discovery else ["--no-discovery"]
    ports += ["--state-dir", str(state), "--name", name, "--bind-host", "127.0.0.1"]
    return shlex.join([*MESH, *arguments, *ports, "--api-port", "0", "--bind-port", "0"])


def test_the_screen_from_start_to_ctrl_c(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type(mesh("up", "--demo", state=tmp_path / "s") + "; echo status $?")
    terminal.wait_for("the next machine joins with")
    lines = terminal.screen(joined=True)
    said = [line.split()[0] for line in lines if line.split()[0] in ("mesh", "model", "plan", "ready", "invite")]
    assert said == ["model", "model", "mesh", "plan", "ready", "invite", "mesh"], "\n".join(lines)
    assert any(line.startswith("ready   http://localhost:") and "mesh-demo, hosted here" in line for line in lines)
    command = next(line for line in lines if line.startswith("mesh up --join mesh1"))
    assert len(command.split()) == 4, "one line to paste, however the window breaks it"
    assert not any("loading on" in line for line in lines), "a bar is gone when its work is done"

    terminal.tmux("resize-window", "-x", "60", "-y", "20")
    family = terminal.shell().children(recursive=True)
    assert any("llama-server" in process.name() for process in family)
    terminal.key("C-c")
    terminal.wait_for("stopping (again to stop at once)")
    terminal.wait_for("status 0")
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert terminal.cursor_is_shown()
    terminal.type("echo typed $((20+3))")
    terminal.wait_for("typed 23")


def test_bars_and_lines_do_not_mix(terminal: Terminal, tmp_path: Path) -> None:
    """A model large enough that checking it shows a bar, which lines and a narrower window must survive."""
    model = tmp_path / "mid.gguf"
    assert terminal.place.run("models", "demo", str(model), "--preset", "mid").code == 0
    for remembered in (terminal.place.root / "cache" / "fingerprints").glob("*"):
        remembered.unlink()
    terminal.type(mesh("up", "--model", str(model), state=tmp_path / "s") + "; echo status $?")
    terminal.tmux("resize-window", "-x", "80", "-y", "20")
    terminal.wait_for("ready ")
    kinds = [line.split()[0] for line in terminal.screen(joined=True)]
    after = kinds[kinds.index("model") :]
    assert after[: after.index("ready") + 1] == ["model", "mesh", "plan", "ready"], terminal.screen()
    terminal.key("C-c")
    terminal.wait_for("status 0")


def test_a_machine_that_waits_to_be_let_in_shows_its_code_until_somebody_types_it(
    terminal: Terminal, tmp_path: Path
) -> None:
    kitchen = terminal.place.start("up", "--demo", discovery=True)
    kitchen.wait_for("ready")
    terminal.tmux("resize-window", "-x", "60")
    command = mesh("client", state=tmp_path / "s", discovery=True, name="laptop") + "; echo status $?"
    terminal.type(command)
    terminal.wait_for("mesh approve ")
    terminal.key("C-c")
    terminal.wait_for("status 0")
    assert any("stopping; this machine is in no mesh" in line for line in terminal.screen())
    assert terminal.cursor_is_shown()

    terminal.type("clear")
    terminal.tmux("clear-history")
    terminal.type(command)
    code = terminal.wait_for("mesh approve ").split()[-1]
    asks = kitchen.wait_for('asks to use this mesh as "laptop"; if it is yours, type the code that it shows:')
    assert asks.endswith(f"mesh approve CODE --state-dir {kitchen.state}")
    approved = kitchen.run("approve", code)
    assert approved.out.startswith("let in laptop (")
    assert approved.out.endswith("as a lite client\n")
    terminal.wait_for('joined "kitchen"')
    terminal.wait_for("ready")
    terminal.key("C-c")
    terminal.wait_for("status 0")
