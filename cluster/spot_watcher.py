#!/usr/bin/env python
"""Tell Ray when AWS is about to take this node away: `cluster/spot_watcher.py --address HEAD:6379`, beside `ray start`.

AWS announces the end of a spot instance two minutes before, to the instance alone. Ray has no watcher of
its own; told of it, Ray Train lets the workers save a checkpoint, and starts nothing new here. On other instances it
waits for a notice that never comes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

METADATA = "http://169.254.169.254"  # the same on every instance; AWS_EC2_METADATA_SERVICE_ENDPOINT names another
SECONDS = 5.0  # AWS asks for a look every five

logger = logging.getLogger(__name__)


def end_of_instance(endpoint: str) -> datetime | None:
    """When this instance is to be stopped or terminated; None where nothing is announced. Raises OSError.

    Source: the instance metadata service, version 2 (a token, then `spot/instance-action`).
    """
    ask_token = urllib.request.Request(
        f"{endpoint}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(ask_token, timeout=SECONDS) as answer:
        token = answer.read().decode()
    ask = urllib.request.Request(
        f"{endpoint}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(ask, timeout=SECONDS) as answer:
            action = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(action["time"].replace("Z", "+00:00"))


def drain(address: str, node_id: str | None, seconds: int) -> None:
    """Tell Ray that the node has so many seconds left. Raises subprocess.CalledProcessError."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "AWS takes the spot instance back"]
    node = ["--node-id", node_id] if node_id else []
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [str(ray), "drain-node", "--address", address, *node, *reason, "--deadline-remaining-seconds", str(seconds)],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the head: HOST:6379")
    parser.add_argument("--node-id", help="Ray's id of the node; without it, the one that this machine runs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    while True:
        try:
            end = end_of_instance(endpoint)
        except OSError as error:
            logger.warning("%s: %s", endpoint, error)
            end = None
        if end is not None:
            left = max(0, int((end - datetime.now(timezone.utc)).total_seconds()))
            logger.info("this instance ends at %s, in %d s", end, left)
            try:
                drain(options.address, options.node_id, left)
                return
            except subprocess.CalledProcessError as error:  # the head may be busy: again while there is time
                logger.warning("%s", error)
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()
