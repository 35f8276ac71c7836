"""The steps of a rehearsal, in order: what a user does or what happens to machines, and what must come of it."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from tests.cluster.rehearsal.cluster import API_KEY, BUCKET, RAY, WITHIN, Cluster, StepError, check, wait_until
from tests.cluster.rehearsal.hosts import PROJECT
from tests.cluster.rehearsal.load import Load
from tests.cluster.rehearsal.prometheus import seen
from vladva.core import storage
from vladva.embed.table import read_embeddings
from vladva.train.audit import audit


@dataclass(frozen=True)
class Step:
    """What is run, whether it belongs to the short part, and which steps leave what it needs."""

    name: str
    short: bool
    after: tuple[str, ...]
    run: Callable[[Cluster], str]


STEPS: list[Step] = []


def step(*after: str, short: bool = False) -> Callable[[Callable[[Cluster], str]], Callable[[Cluster], str]]:
    """A step: its function returns what it saw, in a line, and raises StepError."""

    def add(run: Callable[[Cluster], str]) -> Callable[[Cluster], str]:
        STEPS.append(Step(run.__name__.replace("_", " "), short, after, run))
        return run

    return add


def chosen(words: Sequence[str]) -> list[Step]:
    """The steps whose name holds one of the words, with those they need, between up and down."""
    by_name = {each.name: each for each in STEPS}
    wanted: set[str] = set()

    def want(one: Step) -> None:
        if one.name not in wanted:
            wanted.add(one.name)
            for name in one.after:
                want(by_name[name])

    for one in STEPS:
        if one.run in (ray_up, ray_dashboard, ray_down) or any(word in one.name for word in words):
            want(one)
    return [one for one in STEPS if one.name in wanted]


def matched(pattern: str, text: str) -> re.Match[str]:
    """The first match. Raises StepError where there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise StepError(f"no {pattern} in {text[-4000:]}")
    return match


# --- bring it up, look at it


@step(short=True)
def ray_up(cluster: Cluster) -> str:
    cluster.prepare_laptop()
    bring_up(cluster)
    cluster.wait_for_nodes(3)
    shown = ""

    def counted() -> bool:  # the autoscaler, whose words these are, looks at its nodes every few seconds
        nonlocal shown
        shown = cluster.laptop("ray exec ~/on_prem.yaml 'RAY_AUTH_MODE=token ray status'")
        return "8.0 CPU" in shown

    wait_until(counted, 60, lambda: shown, pause=2)
    return "head and both workers alive; ray exec ... 'ray status' counts their CPUs"


def bring_up(cluster: Cluster) -> None:
    """Run the command that is the first line of cluster/on_prem.yaml."""
    text = (PROJECT / "cluster/on_prem.yaml").read_text()
    command = matched(r"\A# (RAY_UP_\S+ ray up) cluster/on_prem.yaml (--\S+)", text)
    cluster.laptop(f"{command[1]} ~/on_prem.yaml {command[2]} --yes", timeout=WITHIN["ray up"])


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
    seconds = forward_dashboard(cluster)
    shown = cluster.laptop("ray job list")
    check("[]" in shown or "No jobs" in shown, shown)
    return f"forwarded after {seconds:.0f} s; `ray job list` answers to the token"


def forward_dashboard(cluster: Cluster) -> float:
    """Run `ray dashboard` on the laptop; seconds until it forwards."""
    laptop = cluster.machines.laptop
    laptop.start("ray dashboard ~/on_prem.yaml", cluster.folder / "dashboard.log")
    address = RAY["RAY_API_SERVER_ADDRESS"]
    return wait_until(
        lambda: "401" in laptop.run(f"curl -s -o /dev/null -w '%{{http_code}}' {address}/api/jobs/").stdout,
        60,
        (cluster.folder / "dashboard.log").read_text,
    )


@step(short=True)
def doctor(cluster: Cluster) -> str:
    command = ("python", "cluster/doctor.py", "--all-nodes", "--storage", f"{BUCKET}/runs")
    job = cluster.submit(*command)
    if job.wait():  # three hosts on two busy cores: an S3 server that did not answer in time may answer now
        job = cluster.submit(*command)
    shown = job.succeed()
    check("no troubles on nodes: 3" in shown, shown)
    (rate,) = re.findall(r"all-reduce +(\S+ GB/s)", shown)
    return f"no troubles on nodes: 3; all-reduce {rate}"


@step(short=True)
def draw_scenes(cluster: Cluster) -> str:
    size = ("--train", "192", "--test", "32", "--negatives", "8")
    return last_line(cluster.job("jobs/scenes.py", "--out", f"{BUCKET}/scenes", *size))


@step(short=True)
def a_path_of_one_host_is_refused(cluster: Cluster) -> str:
    began = time.monotonic()
    lines = []
    for storage_option, reason in (("/tmp/runs", "not seen on 10.77.0.12, 10.77.0.13"), (".vladva", "Ray deletes")):
        job = cluster.submit(*train("refused", 4), "--storage", storage_option)
        check(job.wait() != 0 and reason in job.output, job.output)
        check("Traceback" not in job.output, job.output)
        lines += [line for line in job.output.splitlines() if reason in line]
    return f"{time.monotonic() - began:.0f} s for two; {lines[0]}"


# --- train


def train(name: str, steps: int, *options: str) -> list[str]:
    """A small run, of which a host holds one worker: four chunks a step, which 1 or 2 workers share."""
    return [
        *("python", "jobs/train.py", "tiny", "--name", name, "--storage", f"{BUCKET}/runs"),
        *("--data.uri", f"{BUCKET}/scenes/train", "--train.steps", str(steps), "--train.global-batch", "32"),
        *("--train.chunk-size", "8", "--data.run-length", "4", "--train.checkpoint-every", "2", "--train.audit"),
        *("--cluster.workers", "2", "--cluster.min-workers", "1", "--cluster.cpus-per-worker", "3"),
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


@step("draw scenes", short=True)
def train_while_a_host_dies(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/killed"
    job = cluster.submit(*train("killed", 30))
    cluster.wait_for_step(run, 4, job)
    where = on_two_hosts(cluster, "killed")
    victim = cluster.machines.workers[1]
    victim.kill()
    cluster.faults.append(f"{victim.name} SIGKILLed in training")
    job.succeed()
    check(len(cluster.places(run)) == 1, cluster.places(run))
    victim.boot()
    cluster.rejoin(victim)
    return f"{where}; went on with one worker; {audited(cluster, 'killed')}"


@step("train while a host dies", short=True)
def audit_as_a_job(cluster: Cluster) -> str:
    line = cluster.job("jobs/audit.py", f"{BUCKET}/runs/killed").splitlines()
    figures = json.loads(next(each for each in reversed(line) if each.startswith("{")))
    check(figures["duplicated"] == figures["missing"] == 0, figures)
    return json.dumps(figures)


# --- jobs


@step()
def exit_codes_and_spellings(cluster: Cluster) -> str:
    for script in (["python", "jobs/train.py"], ["jobs/train.py"]):
        output = cluster.job(*script, "tiny", "--dry-run")
        check("GiB" in output, output)
        job = cluster.submit(*script, "tinny")
        check(job.wait() == 1 and "error: unknown recipe 'tinny'" in job.output, job.output)
        check("Traceback" not in job.output, job.output)
    verbose = cluster.submit("VLADVA_TRACEBACK=1", "python", "jobs/train.py", "tinny")
    check(verbose.wait() == 1 and "Traceback" in verbose.output, verbose.output)
    return "both spellings end with 0 and with 1; VLADVA_TRACEBACK=1 shows where"


@step("draw scenes")
def job_stop_leaves_nothing(cluster: Cluster) -> str:
    job = cluster.submit(*train("stopped", 1000))
    cluster.wait_for_step(f"{BUCKET}/runs/stopped", 2, job)
    cluster.laptop(f"ray job stop {job.name}")
    seconds = wait_until(lambda: not training(cluster), WITHIN["end"], lambda: str(training(cluster)), pause=2)
    job.wait()
    return f"no worker and no driver on any host {seconds:.0f} s after `ray job stop`"


def training(cluster: Cluster) -> list[str]:
    """Processes of a training run, on all hosts."""
    hosts = (cluster.machines.head, *cluster.machines.workers)
    names = ("RayTrainWorker", "TrainController", "SplitCoordinator", "jobs/train.py")
    return [line for host in hosts for name in names for line in host.processes(name)]


@step()
def doctor_finds_planted_faults(cluster: Cluster) -> str:
    first, second = cluster.machines.workers
    first.run(f"ip route add blackhole {second.address}/32")
    try:
        found = examined(cluster, "--storage", "/tmp/runs", "--recipe", "llava_1_5_7b")
    finally:
        first.run(f"ip route del blackhole {second.address}/32")
    for subject in ("storage", "connections", "all-reduce", "object store"):
        check(bool(found[subject]["trouble"]), found[subject])
    check("does not reach" in found["connections"]["trouble"], found["connections"])
    first.slow("40mbit")
    cluster.faults.append(f"{first.name} on a link of 40 Mbit/s")
    try:
        slow = examined(cluster)["all-reduce"]
    finally:
        first.slow(None)
    check("slower than" in slow["trouble"], slow)
    return f"disk of one host, two hosts cut off from each other, small object store, slow link ({slow['found']})"


def examined(cluster: Cluster, *options: str) -> dict[str, dict[str, Any]]:
    """What the doctor finds between the nodes."""
    job = cluster.submit("python", "cluster/doctor.py", "--all-nodes", "--json", *options)
    job.wait()
    line = next(line for line in job.output.splitlines() if line.startswith('{"troubles"'))
    return json.loads(line)["nodes"]["between the nodes"]


@step("draw scenes")
def train_while_a_host_is_drained(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/drained"
    job = cluster.submit(*train("drained", 40, "--train.checkpoint-every", "100"))
    head, victim = cluster.machines.head, cluster.machines.workers[1]
    wait_until(lambda: storage.exists(f"{run}/metrics.jsonl"), WITHIN["checkpoint"], lambda: job.output[-3000:])
    node = cluster.node_id(victim)
    reason = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message rehearsal --deadline-remaining-seconds 60"
    address = f"--address {head.address}:6379 --node-id {node}"
    done = victim.run(f"RAY_AUTH_MODE=token ray drain-node {address} {reason}")
    check(done.returncode == 0, done.stdout)
    saved = cluster.wait_for_step(run, 1, job)
    check(saved < 40, f"the run ended before it had taken notice: {job.output[-3000:]}")
    victim.kill()
    cluster.faults.append(f"{victim.name} drained as before the end of a spot instance, then gone")
    job.succeed()
    victim.boot()
    cluster.rejoin(victim)
    return f"checkpoint after step {saved} at once, none was due; {audited(cluster, 'drained')}"


@step("draw scenes")
def train_grows_back(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/grown"
    job = cluster.submit(*train("grown", 120))
    cluster.wait_for_step(run, 4, job)
    victim = cluster.machines.workers[1]
    victim.kill()
    cluster.faults.append(f"{victim.name} SIGKILLed in training, and back before its end")

    def wait_for_workers(number: int) -> float:
        def there() -> bool:
            check(job.process.poll() is None, job.output)
            return len(cluster.places(run)) == number

        return wait_until(there, WITHIN["checkpoint"], lambda: f"{number} workers: {job.output[-3000:]}", pause=2)

    alone = wait_for_workers(1)
    victim.boot()
    cluster.rejoin(victim)
    grown = wait_for_workers(2)
    where = on_two_hosts(cluster, "grown")
    job.succeed()
    times = f"with one worker {alone:.0f} s after the kill, with two again {grown:.0f} s after the host was a node"
    return f"{times}; {where}; {audited(cluster, 'grown')}"


@step("draw scenes")
def train_through_a_link_that_is_down(cluster: Cluster) -> str:
    job = cluster.submit(*train("partitioned", 24))
    cluster.wait_for_step(f"{BUCKET}/runs/partitioned", 4, job)
    victim = cluster.machines.workers[0]
    victim.link("down")
    time.sleep(60)
    victim.link("up")
    cluster.faults.append(f"link of {victim.name} down for 60 s")
    job.succeed()
    cluster.rejoin(victim)
    return audited(cluster, "partitioned")


@step("draw scenes")
def train_over_a_slow_link(cluster: Cluster) -> str:
    victim = cluster.machines.workers[1]
    victim.slow("20mbit")
    cluster.faults.append(f"{victim.name} on a link of 20 Mbit/s")
    try:
        cluster.job(*train("slow", 6))
    finally:
        victim.slow(None)
    return f"{on_two_hosts(cluster, 'slow')}; {audited(cluster, 'slow')}"


# --- from data to hits, all on s3://


@step()
def prepare_a_table_of_images(cluster: Cluster) -> str:
    rows = [{"image": drawn(number), "caption": f"a scene with the number {number}"} for number in range(24)]
    with io.BytesIO() as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
        storage.write_bytes_atomically(f"{BUCKET}/lake/images.parquet", file.getvalue())
    output = cluster.job("jobs/prepare.py", f"{BUCKET}/lake", "--out", f"{BUCKET}/prepared", "--samples-per-shard", "8")
    check(len(storage.list_files(f"{BUCKET}/prepared", ".tar")) == 3, output)
    return last_line(output)


def drawn(number: int) -> bytes:
    """A small image that is like no other."""
    with io.BytesIO() as file:
        Image.new("RGB", (48, 48), (number * 10 % 256, number * 37 % 256, 80)).save(file, "PNG")
        return file.getvalue()


def last_line(output: str) -> str:
    """What a job said last."""
    return output.splitlines()[-1].strip() if output else ""


TEXTS = 3000


@step("train while a host dies")
def embed_while_a_host_dies(cluster: Cluster) -> str:
    corpus, table = f"{BUCKET}/corpus.txt", f"{BUCKET}/texts"
    lines = "".join(f"object number {number} is left of a square\n" for number in range(TEXTS))
    storage.write_bytes_atomically(corpus, lines.encode())
    command = ["jobs/embed.py", f"{BUCKET}/runs/killed", "--data", corpus, "--kinds", "text", "--out", table]
    job = cluster.submit(*command, "--actors", "2", "--cpus-per-actor", "2", "--batch-size", "16")

    def begun() -> bool:
        check(job.process.poll() is None, job.output)
        return len(storage.list_files(table, ".parquet")) >= 4

    wait_until(begun, WITHIN["checkpoint"], lambda: job.output[-3000:])
    victim = cluster.machines.workers[0]
    victim.kill()
    cluster.faults.append(f"{victim.name} SIGKILLed while embedding")
    output = job.succeed()
    victim.boot()
    cluster.rejoin(victim)
    ids = read_embeddings(table)["id"].to_pylist()
    cluster.figures["items_lost"] = TEXTS - len(set(ids))
    cluster.figures["items_duplicated"] = len(ids) - len(set(ids))
    check(len(ids) == len(set(ids)) == TEXTS, f"{len(ids)} rows of {len(set(ids))} ids")
    return f"{TEXTS} texts, each once: {last_line(output)}"


@step("train while a host dies")
def embed_index_evaluate_search_verify(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/killed"
    table, index = f"{run}/embeddings", f"{run}/index"
    cluster.job("jobs/embed.py", run, "--data", f"{BUCKET}/scenes/test", "--out", table)
    cluster.job("jobs/index.py", table, "--out", index)
    found = cluster.job("jobs/search.py", index, "a red circle", "--model", run)
    check("1" in found, found)
    scores = f"{BUCKET}/evaluation"
    cluster.job("jobs/evaluate.py", f"trained={run}", "--data", f"{BUCKET}/scenes", "--out", scores)
    check(storage.exists(f"{scores}/scores.json"), storage.list_files(scores))
    where = ("--data", f"{BUCKET}/scenes/train", "--out", f"{BUCKET}/verify")
    same = cluster.job("jobs/verify.py", run, *where, "--samples", "8")
    check("the same, to" in same, same)
    return last_line(same)


# --- serve


@step("embed index evaluate search verify")
def serving_while_a_host_dies(cluster: Cluster) -> str:
    config = yaml.safe_load((PROJECT / "cluster/serve.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    run = f"{BUCKET}/runs/killed"
    config["applications"][0]["args"] |= {
        "model": run, "index": f"{run}/index", "name": "vladva", "min_replicas": 2, "max_replicas": 2, "num_cpus": 0.5,
    }  # fmt: skip
    (cluster.machines.laptop.folder / "root/serve.yaml").write_text(yaml.safe_dump(config))
    cluster.laptop(f"serve deploy --address {RAY['RAY_API_SERVER_ADDRESS']} ~/serve.yaml")
    workers = cluster.machines.workers
    load = Load([f"http://{worker.address}:8000" for worker in workers], API_KEY)
    wait_until(lambda: all(load.answers(host) for host in load.hosts), 300, lambda: cluster.laptop(
        f"serve status --address {RAY['RAY_API_SERVER_ADDRESS']}", status=None), pause=2)  # fmt: skip
    replicas = {host.name: len(host.processes("ray::ServeReplica")) for host in workers}
    check(all(replicas.values()), replicas)
    with load:
        time.sleep(15)
        workers[1].kill()
        cluster.faults.append(f"{workers[1].name} SIGKILLed while serving")
        time.sleep(45)
    workers[1].boot()
    cluster.rejoin(workers[1])
    cluster.figures["requests"] = load.figures()
    cluster.figures["failed_requests"] = load.failed
    cluster.laptop(f"serve shutdown --address {RAY['RAY_API_SERVER_ADDRESS']} --yes")
    check(load.failed == 0, load.figures())
    return f"replicas {replicas}; {load.figures()}"


@step("serving while a host dies")
def every_panel_of_the_dashboard_has_figures(cluster: Cluster) -> str:
    check(bool(cluster.prometheus), "no prometheus on PATH: apt-get install prometheus")
    panels = json.loads((PROJECT / "cluster/grafana.json").read_text())["panels"]
    asked = {
        target["expr"].replace("$__rate_interval", "30s"): panel["title"]
        for panel in panels
        for target in panel.get("targets", [])
    }
    empty = [
        f"{title}: {expression}" for expression, title in asked.items() if not seen(cluster.prometheus, expression)
    ]
    check(not empty, f"without a figure: {empty}")
    check(seen(cluster.prometheus, "ray_vladva_train_loos") == 0, "a figure that there is not was found")
    return f"{len(asked)} expressions, each with figures of what was run above"


@step()
def node_types_of_ray_cluster_yaml(cluster: Cluster) -> str:
    output = cluster.laptop("python tests/cluster/rehearsal/node_types.py ray_cluster.yaml", timeout=600)
    found = json.loads(last_line(output))
    none = {"data": 0, "gpu_on_demand": 0, "gpu_spot": 0}
    check(found["before"] == none, found)
    check(found["for a CPU task"]["data"] == 1, found)  # neither the head, which has no CPUs, nor a GPU machine
    check(found["for a CPU task"]["gpu_spot"] == found["for a CPU task"]["gpu_on_demand"] == 0, found)
    check(found["for a GPU"]["gpu_spot"] == 1 and found["for a GPU"]["gpu_on_demand"] == 0, found)
    more = found["for more GPUs than spot has"]
    check(more["gpu_spot"] == 2 and more["gpu_on_demand"] >= 1, found)
    check(found["idle"] == none, found)
    return json.dumps(found)


# --- the head


@step("draw scenes")
def train_while_the_head_is_lost(cluster: Cluster) -> str:
    run = f"{BUCKET}/runs/headless"
    job = cluster.submit(*train("headless", 24))
    cluster.wait_for_step(run, 4, job)
    head = cluster.machines.head
    head.kill()
    cluster.faults.append("head SIGKILLed in training, and started again")
    head.boot()
    bring_up(cluster)
    cluster.wait_for_nodes(3, WITHIN["ray up"])
    forward_dashboard(cluster)
    output = cluster.job(*train("headless", 24))
    check("Traceback" not in output, output)
    return f"the same command went on; {audited(cluster, 'headless')}"


# --- and at the end


@step(short=True)
def ray_down(cluster: Cluster) -> str:
    cluster.laptop("ray down ~/on_prem.yaml --yes", timeout=120)
    for worker in cluster.machines.workers:  # as on_prem.yaml says for who does not want to wait two minutes
        cluster.laptop(f"ssh -o StrictHostKeyChecking=no {worker.address} \"bash -lc 'ray stop'\"", timeout=120)
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
