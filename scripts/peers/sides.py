"""The sides of the benchmark, and the processes that run them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml
from exchange import ALL_BUT_LAST, EVERY_TOKEN

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parent.parent / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class Side:
    """Something that is timed: a program, and what is asked of it."""

    name: str
    program: str
    """ours, kronfluence or bergson: a file of scripts/peers and its environment."""
    request: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    """That work together, with a thread each for every thread asked for."""


def engine_side(name: str, processes: int = 1, **config: Any) -> Side:
    """The engine with some keys of InfluenceConfig."""
    return Side(name, "ours", {"side": "engine", "config": config}, processes)


RUN_DEFAULTS: dict[str, Any] = dict.fromkeys(("factor_fraction", "sketch_fraction", "eigenvalue_fraction"))
"""As many sequences and sums for the curvature as a run of this project takes by itself."""
SIDES = {
    side.name: side
    for side in (
        Side("floor", "ours", {"side": "floor"}),
        Side("selected-floor", "ours", {"side": "floor", "selected": True}),
        Side("padded-floor", "ours", {"side": "padded floor"}),
        engine_side("engine"),
        engine_side("engine-bf16", product_dtype="bfloat16"),
        engine_side("default", **RUN_DEFAULTS),
        engine_side("default-bf16", **RUN_DEFAULTS, product_dtype="bfloat16"),
        Side("no-first-position", "ours", {"side": "first positions"}),
        Side("kronfluence", "kronfluence"),
        Side("kronfluence-bf16", "kronfluence", {"dtype": "bfloat16"}),
        Side("bergson", "bergson"),
    )
}
PEERS = [side.name for side in SIDES.values() if side.program != "ours"]
DEFAULT_SIDES = [name for name in SIDES if name not in ("selected-floor", "no-first-position", "kronfluence-bf16")]
CONVENTIONS = {"kronfluence": EVERY_TOKEN, "bergson": ALL_BUT_LAST}
"""The positions that a peer's program counts: see the notes in its file."""


def variant(text: str) -> Side:
    """A side from "name: key=value, key=value"; keys of InfluenceConfig, and processes."""
    name, _, settings = text.partition(":")
    pairs = dict(part.split("=", 1) for part in settings.split(",") if part.strip())
    return engine_side(name.strip(), **{key.strip(): yaml.safe_load(value) for key, value in pairs.items()})


class Worker:
    """A side's process(es), kept between its runs so that they load once."""

    def __init__(self, side: Side, folder: Path, threads: int) -> None:
        python = sys.executable if side.program == "ours" else str(PEER_PYTHON)
        script = HERE / ("ours.py" if side.program == "ours" else f"{side.program}_side.py")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.side = side
        self.log = folder / f"{side.name}.log"
        self.processes: list[subprocess.Popen[str]] = []
        self.answers: list[TextIO] = []
        for rank in range(side.processes):
            settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(side.processes)}
            if side.processes > 1:
                settings |= {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            # A pipe of its own for the answers: libraries print, some as soon as they are imported.
            end, other_end = os.pipe()
            with self.log.open("a") as log:
                process = subprocess.Popen(
                    [python, str(script), str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env=os.environ | settings | {"ANSWERS": str(other_end)},
                    pass_fds=[other_end],
                    cwd=folder,
                )
            os.close(other_end)
            self.processes.append(process)
            self.answers.append(os.fdopen(end))

    def run(self, **request: Any) -> dict[str, Any]:
        """One run: the first process's answer, with the memory and processor seconds of all.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
        line = json.dumps({**self.side.request, **request}) + "\n"
        try:
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            answers = [json.loads(answer.readline()) for answer in self.answers]
        except (OSError, json.JSONDecodeError) as error:
            self.close()  # also: waits until it has printed what it had to say
            end = "\n".join(self.log.read_text().splitlines()[-12:])
            codes = [process.returncode for process in self.processes]
            raise RuntimeError(f"{self.side.name} failed (exit codes {codes}, negative: a signal):\n{end}") from error
        return {**answers[0], **{key: sum(answer[key] for answer in answers) for key in ("cpu", "peak")}}

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            try:
                process.communicate(timeout=30)  # it ends where its requests do
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for answer in self.answers:
            answer.close()


@contextmanager
def workers(sides: Sequence[Side], folder: Path, threads: int) -> Iterator[dict[str, Worker]]:
    """A worker for each side, by name."""
    with ExitStack() as stack:
        found = {}
        for side in sides:
            found[side.name] = Worker(side, folder, threads)
            stack.callback(found[side.name].close)
        yield found


def in_turns(
    running: Mapping[str, Worker], repeats: int, keep: Callable[[dict[str, list[dict[str, Any]]]], None]
) -> dict[str, list[dict[str, Any]]]:
    """The answers of all sides: each once, then each once more, ...; keep: is given those so far after each."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for repeat in range(repeats):
        for name, worker in running.items():
            answers[name].append(worker.run())
            print(f"{repeat + 1}/{repeats} {name}: {answers[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
            keep(answers)
    return answers
