"""The steps of a rehearsal, in order: what a user does or what happens to machines, and what must come of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.rehearsal.cluster import BUCKET, RAY, WITHIN, Cluster, check, wait_until
from tests.cluster.rehearsal.hosts import PROJECT
from vladva.train.audit import audit


@dataclass(frozen=True)
class Step:
    """What is run, and whether it belongs to the short part."""

    name: str
    short: bool
    run: Callable[[Cluster], str]


STEPS: list[Step] = []


def step(*, short: bool = False) -> Callable[[Callable[[Cluster], str]], Callable[[Cluster], str]]:
    """A step: its function returns what it saw, in a line, and raises StepError."""

    def add(run: Callable[[Cluster], str]) -> Callable[[Cluster], str]:
        STEPS.append(Step(run.__name__.replace("_", " "), short, run))
        return run

    return add


# --- bring it up, look at it


@step(short=True)
def ray_up(cluster: Cluster) -> str:
    cluster.prepare_laptop()
    # The command is the one in the file's first line.
    command = re.match(
        r"# (RAY_UP_\S+ ray up) cluster/on_prem.yaml (--\S+)", (PROJECT / "cluster/on_prem.yaml").read_text()
    )
    check(command is not None, "cluster/on_prem.yaml does not begin with its command")
    cluster.laptop(f"{command[1]} ~/on_prem.yaml {command[2]} --yes", timeout=WITHIN["ray up"])
    cluster.wait_for_nodes(3)
    shown = cluster.laptop("ray exec ~/on_prem.yaml 'RAY_AUTH_MODE=token ray status'")
    check("8.0 CPU" in shown, shown)
    return "head and both workers alive; ray exec ... 'ray status' counts their CPUs"


@step(short=True)
def strangers_are_refused(cluster: Cluster) -> str:
    head = cluster.machines.head
    answer = head.run("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/").stdout
    check(answer == "401", answer)
    told = cluster.laptop(f"curl -s -m 5 http://{head.address}:8265/; echo exit $?", status=None)
    check("exit 7" in told, told)  # connection refused
    return "dashboard: 401 without the token; on the head's own address nothing listens"


@step(short=True)
def ray_dashboard(cluster: Cluster) -> str:
    laptop = cluster.machines.laptop
    laptop.start("ray dashboard ~/on_prem.yaml", cluster.folder / "dashboard.log")
    address = RAY["RAY_API_SERVER_ADDRESS"]
    seconds = wait_until(
        lambda: "401" in laptop.run(f"curl -s -o /dev/null -w '%{{http_code}}' {address}/api/jobs/").stdout,
        60,
        (cluster.folder / "dashboard.log").read_text,
    )
    shown = cluster.laptop("ray job list")
    check("[]" in shown or "No jobs" in shown, shown)
    return f"forwarded after {seconds:.0f} s; `ray job list` answers to the token"


@step(short=True)
def doctor(cluster: Cluster) -> str:
    shown = cluster.job("python", "cluster/doctor.py", "--all-nodes", "--storage", f"{BUCKET}/runs")
    check("no troubles on nodes: 3" in shown, shown)
    return "no troubles on nodes: 3"


@step(short=True)
def draw_scenes(cluster: Cluster) -> str:
    return cluster.job(
        "jobs/scenes.py", "--out", f"{BUCKET}/scenes", "--train", "192", "--test", "32", "--negatives", "8"
    ).splitlines()[-1]


@step(short=True)
def a_path_of_one_host_is_refused(cluster: Cluster) -> str:
    began = time.monotonic()
    lines = []
    for storage_option, reason in (("/tmp/runs", "does not see what the driver sees"), (".vladva", "Ray deletes")):
        job = cluster.submit(*train("refused", 4), "--storage", storage_option)
        check(job.wait() != 0 and reason in job.output, job.output)
        check("Traceback" not in job.output, job.output)
        lines += [line for line in job.output.splitlines() if reason in line]
    return f"{time.monotonic() - began:.0f} s for two; {lines[0]}"


# --- train


def train(name: str, steps: int, *options: str) -> list[str]:
    """A small run over both workers: eight chunks a step, which 1 or 2 workers share."""
    return [
        *("python", "jobs/train.py", "tiny", "--name", name, "--storage", f"{BUCKET}/runs"),
        *("--data.uri", f"{BUCKET}/scenes/train", "--train.steps", str(steps), "--train.global-batch", "32"),
        *("--train.chunk-size", "8", "--data.run-length", "4", "--train.checkpoint-every", "2", "--train.audit"),
        *("--cluster.workers", "2", "--cluster.min-workers", "1", "--cluster.cpus-per-worker", "1.5"),
        *("--cluster.placement", "SPREAD", "--cluster.resize-every-s", "20"),
        *options,
    ]


def audited(cluster: Cluster, name: str) -> str:
    """The audit's figures, kept for the report. Raises StepError unless each sample came exactly once."""
    report = audit(f"{BUCKET}/runs/{name}")
    figures = report.figures()
    cluster.figures.setdefault("samples", []).append({"run": name, **figures})
    check(report.ok, report.problems())
    return f"{figures['delivered']} delivered, {figures['duplicated']} twice, {figures['missing']} missing"


def on_two_hosts(cluster: Cluster, name: str) -> str:
    places = cluster.places(f"{BUCKET}/runs/{name}")
    check(len({place["node"] for place in places}) == 2, places)
    check({place["interface"] for place in places} == {"eth0"}, places)
    return ", ".join(f"rank {place['rank']} on {place['node']}" for place in places)


@step(short=True)
def train_while_a_host_dies(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/killed"
    job = cluster.submit(*train("killed", 30))
    cluster.wait_for_step(run, 4, job)
    where = on_two_hosts(cluster, "killed")
    victim = cluster.machines.workers[1]
    victim.kill()
    cluster.faults.append(f"{victim.name} SIGKILLed in training")
    output = job.succeed()
    check("Traceback" not in output, output)
    check(len(cluster.places(run)) == 1, cluster.places(run))
    victim.boot()
    cluster.rejoin(victim)
    return f"{where}; went on with one worker; {audited(cluster, 'killed')}"


@step(short=True)
def audit_as_a_job(cluster: Cluster) -> str:
    line = cluster.job("jobs/audit.py", f"{BUCKET}/runs/killed").splitlines()
    figures = json.loads(next(each for each in reversed(line) if each.startswith("{")))
    check(figures["duplicated"] == figures["missing"] == 0, figures)
    return json.dumps(figures)


# --- and at the end


@step(short=True)
def ray_down(cluster: Cluster) -> str:
    cluster.laptop("ray down ~/on_prem.yaml --yes", timeout=120)
    began = time.monotonic()
    names = ("raylet", "gcs_server", "ray::", "dashboard.py")

    def left() -> dict[str, list[str]]:
        return {
            host.name: lines
            for host in (cluster.machines.head, *cluster.machines.workers)
            if (lines := [line for name in names for line in host.processes(name)])
        }

    wait_until(lambda: not left(), WITHIN["end"], lambda: str(left()), pause=2)
    return f"no process of Ray on any host {time.monotonic() - began:.0f} s after it"
