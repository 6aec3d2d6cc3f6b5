"""A batch on a real Dask scheduler with two workers, one of which is killed in the middle."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_many import Sent, answers, write_batch
from test_registration import QUICK

from loftr_curriculum.registration import register_many
from loftr_curriculum.registration.journal import read_results

pytest.importorskip("distributed", reason="needs pip install -e '.[cluster]'")
ROOT = Path(__file__).resolve().parents[1]
WAIT = 60  # seconds for whatever a loaded machine is slow at


class Careful(Sent):
    "Tells which process answers, and takes its time."

    def match(self, *images, **rest):
        Path(os.environ["SEEN_BY"], str(os.getpid())).touch()
        time.sleep(0.1)
        return super().match(*images, **rest)


def wait_for(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Cluster:
    "A scheduler and workers of one thread each on the loopback."

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        (folder / "seen").mkdir()
        (folder / "elsewhere").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        self.start("dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")

    def start(self, program, *words):
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        more = {"PYTHONPATH": path, "SEEN_BY": str(self.folder / "seen"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", *words],
            env=os.environ | more,
            cwd=self.folder / "elsewhere",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def add_worker(self):
        place = ("--host", "127.0.0.1", "--local-directory", str(self.folder))
        return self.start(
            "dask_worker", self.address, *place, "--no-nanny", "--nthreads", "1", "--no-dashboard"
        )

    def seen(self):
        "The numbers of the processes that answered."
        return {int(path.name) for path in (self.folder / "seen").iterdir()}

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_answers_as_one_process(cluster, tmp_path):
    write_batch(tmp_path, 12)
    with open(tmp_path / "pairs.csv", "a") as table:
        table.write("lost,img/f.png,img/none.png\n")
    more = dict(config=QUICK, progress=False)
    os.environ["SEEN_BY"] = str(cluster.folder)
    try:
        register_many(tmp_path / "pairs.csv", tmp_path / "one", matcher=Careful(), **more)
    finally:
        del os.environ["SEEN_BY"]
    workers = [cluster.add_worker(), cluster.add_worker()]
    batch = subprocess.Popen(
        [sys.executable, "-c", BATCH, cluster.address],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )
    cluster.processes.append(batch)
    wait_for(lambda: len(cluster.seen()) == 2 or batch.poll() is not None)
    assert batch.poll() is None and cluster.seen() == {worker.pid for worker in workers}
    workers[0].send_signal(signal.SIGKILL)
    done = len(read_results(tmp_path / "many" / "results.csv"))
    assert done < 12, "the worker was killed after the batch"
    assert batch.wait(WAIT) == 0
    assert workers[1].poll() is None
    assert answers(tmp_path / "many") == answers(tmp_path / "one")
    for name in ("transforms.json", "settings.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


BATCH = """
import sys
from pathlib import Path
from test_many_cluster import Careful, QUICK
from loftr_curriculum.registration import register_many
folder = Path()
count = register_many(
    folder / "pairs.csv",
    folder / "many",
    matcher=Careful(),
    config=QUICK,
    scheduler=sys.argv[1],
    progress=False,
)
assert count == dict(ok=12, doubtful=0, failed=0, unreadable=1), count
"""


def test_a_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("loftr_curriculum.registration.workers.PATIENCE", 1)
    write_batch(tmp_path, 1)
    with pytest.raises(ValueError, match="scheduler tcp://127.0.0.1:9: no scheduler answers there"):
        register_many(
            tmp_path / "pairs.csv",
            tmp_path / "out",
            matcher=Sent(),
            config=QUICK,
            progress=False,
            scheduler="tcp://127.0.0.1:9",
        )
